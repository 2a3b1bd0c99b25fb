"""Mode fast: 8-bit views within 2.2 grey levels of the released processing, normalised by the model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vl.config.model import CLIP_MEAN, CLIP_STD
from megatron_vl.data import fast_views
from megatron_vl.data.batch import mask_documents
from megatron_vl.data.crops import RELEASED, CropRule, plan_crops
from megatron_vl.data.decode import DecodeRule, make_views
from megatron_vl.data.fast_views import make_fast_views, pixels_of, resize_in_float
from megatron_vl.data.image_backend import PillowBackend
from megatron_vl.data.loader import Place, eval_loader, train_loader
from megatron_vl.ops.pixels import normalised
from megatron_vl.train.step import stage_inputs
from tests.data.test_decode import CASES, GOLDEN, SAME_JPEG_DECODER, encoded, exif
from tests.data.tiny import MODEL, chat, make_data, write_jsonl

MAX_LEVELS, MAX_MEAN = 2.2, 3e-3
FAST = PillowBackend(mode="fast")
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))

# Sizes for every branch of the crop rule; the comment says which.
SIZES = {
    (640, 480): "small, no crops",
    (640, 380): "small and long: enlarged windows",
    (728, 728): "small by a hair",
    (1008, 1008): "no resize of the canvas",
    (1000, 300): "black below the canvas",
    (1109, 505): "one more window",
    (1050, 250): "very long: the window is the short side",
    (250, 1050): "very high",
    (3100, 800): "limited",
    (400, 5000): "limited and very high: three resizes",
    (1500, 70): "thin",
    (150, 3500): "thin after limiting",
    (100, 20): "padded",
    (1, 1): "a pixel",
    (1, 300): "a line, padded",
    (3023, 97): "odd",
}


def noise(width: int, height: int) -> Image.Image:
    """The worst case: independent pixels, half of them at the ends of the scale."""
    generator = np.random.default_rng(width * 7919 + height)
    values = generator.integers(-128, 384, (height, width, 3)).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8))


def gradient(width: int, height: int) -> Image.Image:
    """Slow ramps, another one in each channel."""
    x, y = np.linspace(0, 255, width)[None, :], np.linspace(255, 0, height)[:, None]
    planes = [x + 0 * y, y + 0 * x, (x + y) / 2]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def distance(fast: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest difference in grey levels; largest difference of a channel's mean, normalised."""
    if len(exact) == 0:
        return 0.0, 0.0
    levels = (fast.to(torch.float32) - (exact * STD + MEAN) * 255).abs().max().item()
    means = normalised(fast, torch.float32).double().mean((2, 3)) - exact.double().mean((2, 3))
    return levels, means.abs().max().item()


def check_close(fast, exact) -> None:
    for ours, theirs in zip(fast, exact, strict=True):
        assert ours.dtype == torch.uint8 and ours.shape == theirs.shape
        levels, mean = distance(ours, theirs)
        assert levels <= MAX_LEVELS and mean <= MAX_MEAN, (levels, mean)


@pytest.mark.parametrize("size", SIZES, ids=SIZES.values())
def test_every_branch_of_the_crop_rule(size):
    rgb, plan = noise(*size), plan_crops(*size)
    check_close(make_fast_views(pixels_of(rgb), plan), make_views(rgb, plan))


@pytest.mark.parametrize("size", [(1000, 300), (1500, 900), (640, 380)])
def test_gradients(size):
    rgb, plan = gradient(*size), plan_crops(*size)
    check_close(make_fast_views(pixels_of(rgb), plan), make_views(rgb, plan))


@pytest.mark.parametrize("name", CASES)
def test_golden_pictures(name):
    case = CASES[name]
    backend = replace(
        FAST,
        crop_rule=CropRule(boundary_rule=case["rule"][:2]),
        decode_rule=DecodeRule(case["alpha"] or "white"),
    )
    header = backend.header(GOLDEN / case["file"])
    views = backend.views(GOLDEN / case["file"], backend.plan(header.size))
    stored = np.load(GOLDEN / case["npz"])
    other_decoder = case["format"] == "JPEG" and not SAME_JPEG_DECODER
    for pixels, golden, stats in (
        (views[0], stored["global"][None], [case["global_stats"]]),
        (views[1], stored["crops"], case["crop_stats"]),
    ):
        if len(stats) == 0:
            continue
        ours = normalised(pixels, torch.float32)
        off = (ours[..., ::7, ::7] - torch.from_numpy(golden).float()).abs() * STD * 255
        assert off.max() <= MAX_LEVELS + 0.1 + 7 * other_decoder  # 0.1: float16 of the file
        means = torch.tensor([view["mean"] for view in stats], dtype=torch.float64)
        assert (ours.double().mean((2, 3)) - means).abs().max() <= MAX_MEAN + 1e-2 * other_decoder


def test_where_nothing_is_resized_the_modes_are_equal():
    rgb = noise(1008, 1008)
    _, fast = make_fast_views(pixels_of(rgb), plan_crops(1008, 1008), with_global=False)
    _, exact = make_views(rgb, plan_crops(1008, 1008), with_global=False)
    assert torch.equal(normalised(fast, torch.float32), exact)
    assert normalised(fast, torch.bfloat16).dtype == torch.bfloat16
    assert normalised(exact, torch.float32) is exact


def test_a_rank_computes_only_its_own_views():
    pixels, plan = pixels_of(noise(1100, 800)), plan_crops(1100, 800)
    whole, crops = make_fast_views(pixels, plan)
    none, some = make_fast_views(pixels, plan, crops=[3, 1], with_global=False)
    assert none.shape == (0, 3, 728, 728) and torch.equal(some, crops[[3, 1]])
    only, no_crops = make_fast_views(pixels, plan, crops=[])
    assert torch.equal(only, whole) and no_crops.shape == (0, 3, 504, 504)
    assert crops.is_contiguous(memory_format=torch.channels_last)


def test_grey_alpha_and_orientation_meet_the_bound():
    photo = noise(900, 700)
    for data in (
        encoded(photo.convert("L"), "PNG"),
        encoded(photo.convert("LA"), "PNG"),
        encoded(Image.merge("RGBA", (*photo.split(), photo.split()[0])), "PNG"),
        encoded(photo, "JPEG", exif=exif(6)),
        encoded(photo.convert("CMYK"), "JPEG"),
    ):
        plan = FAST.plan(FAST.header(data).size)
        check_close(FAST.views(data, plan), PillowBackend().views(data, plan))


def test_the_bound_finds_a_wrong_resize(monkeypatch):
    """Planted: no antialiasing; limiting left out; thin images without Pillow's first two resizes."""
    interpolate = torch.nn.functional.interpolate
    rgb, plan = noise(1024, 768), plan_crops(1024, 768)
    with monkeypatch.context() as patch:
        plain = lambda *args, antialias, **kwargs: interpolate(*args, **kwargs)  # noqa: E731
        patch.setattr(torch.nn.functional, "interpolate", plain)
        fast = make_fast_views(pixels_of(rgb), plan)
    assert distance(fast[0], make_views(rgb, plan)[0])[0] > 20
    rgb, plan = noise(400, 5000), plan_crops(400, 5000)
    with monkeypatch.context() as patch:
        patch.setattr(fast_views, "_is_thin", lambda plan, rule: False)
        fast = make_fast_views(pixels_of(rgb), plan)
    assert distance(fast[1], make_views(rgb, plan)[1])[0] > MAX_LEVELS


@pytest.mark.parametrize("size", [(1024, 768), (3100, 700)])
def test_resizing_in_float_as_a_gpu_would(size, monkeypatch):
    rgb, plan = noise(*size), plan_crops(*size)
    monkeypatch.setattr(
        fast_views, "resize", lambda x, s: x if x.shape[1:] == (s[1], s[0]) else resize_in_float(x, s)
    )
    check_close(make_fast_views(pixels_of(rgb), plan), make_views(rgb, plan))


def test_many_sizes_of_noise():
    generator = np.random.default_rng(5)
    for _ in range(8):
        width, height = (int(side) for side in np.exp(generator.uniform(1, 7.2, 2)))
        rgb, plan = noise(width, height), plan_crops(width, height)
        if plan.num_crops <= 12:
            check_close(make_fast_views(pixels_of(rgb), plan), make_views(rgb, plan))


@pytest.fixture(scope="module")
def fast_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    records = [
        chat("q", "a", "small.png", "wide.png", id="good"),
        chat("q", "a", "small.png", "cut.jpg", id="cut off"),
        chat("q", "a", id="text"),
        chat("q", "a", "wide.png", id="fine"),
    ]
    data = make_data(folder, image_mode="fast", seq_length=64)
    path = write_jsonl(folder / "train.jsonl", records)
    return replace(data, train=[path], eval=[path])


def test_batches_carry_bytes_of_a_quarter_of_the_size(fast_data):
    fast = eval_loader(fast_data, MODEL, Place(), 4, 4).next_step()[0]
    exact = eval_loader(replace(fast_data, image_mode="exact"), MODEL, Place(), 4, 4).next_step()[0]
    assert fast.fingerprint() == exact.fingerprint()
    for ours, theirs in ((fast.crop_pixels, exact.crop_pixels), (fast.global_pixels, exact.global_pixels)):
        assert ours.dtype == torch.uint8 and 4 * ours.nbytes == theirs.nbytes
        # but for the image that cannot be decoded: black in one mode, the mean colour in the other
        good = [n for n, view in enumerate(ours) if view.any()]
        assert 0 < len(good) < len(ours)
        check_close((ours[good],), (theirs[good],))
    inputs = stage_inputs(fast, torch.device("cpu"))
    assert inputs.crop_pixels.dtype == inputs.global_pixels.dtype == torch.uint8


def test_an_empty_share_and_a_rank_without_tower(fast_data):
    text_only = replace(fast_data, eval=fast_data.eval)
    batch = eval_loader(text_only, MODEL, Place(vision_rank=15, vision_size=16), 4, 4).next_step()[0]
    assert len(batch.crop_pixels) == len(batch.global_pixels) == 0
    assert batch.crop_pixels.dtype == torch.uint8
    none = eval_loader(text_only, MODEL, Place(vision_rank=None), 4, 4).next_step()[0]
    assert len(none.crop_pixels) == 0


def test_shares_are_made_alike(fast_data):
    whole = eval_loader(fast_data, MODEL, Place(), 4, 4).next_step()[0]
    parts = [
        eval_loader(fast_data, MODEL, Place(vision_rank=rank, vision_size=3), 4, 4).next_step()[0]
        for rank in range(3)
    ]
    for field in ("crop_pixels", "global_pixels"):
        mine = sorted(view.numpy().tobytes() for part in parts for view in getattr(part, field))
        assert mine == sorted(view.numpy().tobytes() for view in getattr(whole, field))


def test_worker_processes_hand_over_the_same_bytes(fast_data):
    inline = train_loader(fast_data, MODEL, Place(), 2, 4)
    background = train_loader(replace(fast_data, num_workers=1), MODEL, Place(), 2, 4, timeout_seconds=100)
    for one, other in zip(inline.next_step(), background.next_step(), strict=True):
        assert torch.equal(one.crop_pixels, other.crop_pixels)
        assert one.crop_pixels.stride() == other.crop_pixels.stride()
    background.close()


def test_a_failed_image_is_black_and_its_document_is_masked(fast_data):
    batch = eval_loader(fast_data, MODEL, Place(), 4, 4).next_step()[0]
    assert [(bad.document, bad.record.reason) for bad in batch.failed] == [(1, "truncated")]
    black = [not view.any() for view in batch.global_pixels]
    assert black == [False, False, False, True, False]  # of the globals of documents 0, 0, 1, 1, 3
    assert torch.isfinite(normalised(batch.global_pixels, torch.float32)).all()
    labels = mask_documents(batch, [1]).labels
    assert (labels[1] == -100).all() and (labels[0] != -100).any()


def test_the_rule_of_the_released_model_is_what_is_tested():
    assert (RELEASED.global_size, RELEASED.crop_size, RELEASED.max_side) == (728, 504, 3024)
