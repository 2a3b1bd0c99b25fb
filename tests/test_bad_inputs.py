"""One table of bad inputs and what each of them says: the error of a description, or the reason of a refusal.

    config      `load_checked_run`, and the exit code of `python -m megatron_vl config`
    image       a sample with the image through `RowBuilder`, its pixels through `with_pixels`
    data        a line of JSONL through the training loader, then `bad_samples.jsonl`
    checkpoint  `model_from_hf` and `HFCheckpoint.check` on a directory in the released layout
    tool        the arguments of a tool

`DIR` in a text stands for the folder that the case was made in.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_vl.__main__ import main
from megatron_vl.checkpoint.hf_load import HFCheckpoint
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.data.bad_samples import BadSample, BadSampleLog
from megatron_vl.data.batch import collate
from megatron_vl.data.loader import Place, train_loader
from megatron_vl.data.rows import RowBuilder
from megatron_vl.errors import CheckpointError, ConfigErrors, DataError
from megatron_vl.plan.checks import load_checked_run
from tests.data.tiny import MODEL, chat, make_data, raw, write_jsonl
from tests.tiny_release import INDEX, edit_json, fresh_tensors, write_release, write_weights

TINY = ("preset=step3_vl_tiny",)
TP, PP, CP = (f"parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
VPP = "parallel.virtual_pipeline_model_parallel_size"

# Overrides of the tiny preset on 4 ranks -> every problem, in order.
CONFIG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "recomputed groups that are not full": (
        (
            "recompute.vision=full",
            "recompute.vision_num_layers=2",
            "recompute.decoder=full",
            f"{PP}=2",
            "parallel.pipeline_decoder_layers=[1,3]",
            "recompute.decoder_num_layers=2",
        ),
        (
            "recompute.vision_num_layers = 2: must divide model.vision.num_layers = 3; choose one of 1, 3",
            "recompute.decoder_num_layers = 2: must divide the decoder layers of every stage, 1, 3; choose one of 1",
        ),
    ),
    "unknown key": (
        ("train.micro_batchsize=2",),
        ("train.micro_batchsize: unknown key; did you mean train.micro_batch_size?",),
    ),
    "key of another section": (
        ("train.seq_length=8",),
        ("train.seq_length: unknown key; did you mean data.seq_length?",),
    ),
    "wrong type": (("data.seq_length=long",), ("data.seq_length = long: must be a whole number; got a str",)),
    "not an override": (
        ("seq_length",),
        (
            "command line = seq_length: is not of the form section.key=value; write e.g. "
            "train.global_batch_size=64",
        ),
    ),
    "tp does not divide heads": (
        (f"{TP}=3", "world=3"),
        (
            f"{TP} = 3: must divide model.text.num_attention_heads = 4; choose one of 1, 2, 4",
            f"{TP} = 3: must divide model.text.ffn_hidden_size = 256; choose one of 1, 2, 4",
            f"{TP} = 3: must be a divisor or a multiple of model.text.num_query_groups = 2 (Megatron-Core's "
            "rule); "
            "choose another size",
        ),
    ),
    "tp does not divide the tower's heads": (
        (f"{TP}=4", "model.vision.num_attention_heads=2", "parallel.vision_placement=tensor"),
        (
            f"{TP} = 4: must divide model.vision.num_attention_heads = 2 with parallel.vision_placement "
            '"tensor" '
            '("data" has no such rule); choose one of 1, 2',
        ),
    ),
    "cp does not divide the sequence": (
        (f"{CP}=4", "data.seq_length=4100"),
        (
            "data.seq_length = 4100: must be a multiple of 2 x context_parallel_size 4 = 8; choose 4096 or "
            "4104",
        ),
    ),
    "sp without tp": (
        ("parallel.sequence_parallel=true",),
        (
            f"parallel.sequence_parallel = true: has nothing to shard with {TP} = 1; set it false, or {TP} "
            "to 2 or more",
        ),
    ),
    "vpp without pp": (
        (f"{VPP}=2",),
        (f"{VPP} = 2: interleaving needs {PP} of at least 2; remove it or use more stages",),
    ),
    "layers do not sum": (
        (f"{PP}=2", "parallel.pipeline_decoder_layers=[1, 2]"),
        (
            "parallel.pipeline_decoder_layers = [1, 2]: sums to 3, but the decoder has 4 layers; make the "
            "sum 4",
        ),
    ),
    "batch not divisible": (
        ("train.global_batch_size=6",),
        (
            "train.global_batch_size = 6: must be a multiple of train.micro_batch_size 1 x 4 data-parallel "
            "replicas = 4; choose 4 or 8",
        ),
    ),
    "ranks do not divide": (
        (f"{TP}=2", f"{PP}=2", "world=6"),
        ("world size = 6: must be a multiple of TP2 x CP1 x PP2 = 4; start 4 or 8 ranks",),
    ),
    "backend without its device": (
        ("parallel.device=cpu", "parallel.layer_backend=transformer_engine"),
        (
            "parallel.layer_backend = transformer_engine: needs a CUDA device, but parallel.device = cpu; "
            "set parallel.layer_backend torch",
        ),
    ),
}

# Name of the file -> reason of the refusal and what the detail says.
IMAGES: dict[str, tuple[str, str]] = {
    "cut.jpg": ("truncated", "truncated"),
    "empty.png": ("empty", "empty.png' has 0 bytes"),
    "text.jpg": (
        "unsupported_format",
        "no JPEG, PNG, WebP, BMP, TIFF or GIF: it begins with b'not an image'",
    ),
    "huge.png": ("too_many_pixels", "60000x60000 has 3600000000 pixels, the limit is 178956970"),
    "none.png": ("missing", "there is no 'none.png' under DIR"),
    "folder": ("not_a_file", "is not a regular file"),
    "zero.png": ("zero_size", "the image is 0x5 pixels"),
    "vector.svg": ("unsupported_format", "it begins with b'<svg xmlns=\"'"),
    "moving.gif": ("animated", "GIF of several frames or pages"),
    "deep.png": ("high_depth_grey", "mode I;16: values above 255 would become white"),
    "noise.png": ("corrupt", ""),
    "thin.png": ("too_many_crops", "2000x33 makes 68 crops, the limit is 36"),
    "../outside.png": ("outside_root", "'../outside.png' lies outside the data root DIR"),
    "/etc/hostname": ("outside_root", "'/etc/hostname' lies outside the data root DIR"),
    "link.png": ("outside_root", "'link.png' lies outside the data root DIR"),
    "http://example.com/a.png": (
        "remote",
        "'http://example.com/a.png' is a URL; download it and give its path",
    ),
    "data:image/png;base64,iVBORw0KGgo=": ("remote", "is a URL"),
    "a\0b.png": ("bad_path", "is not a path"),
}
DECODED = ("cut.jpg", "noise.png")  # their headers are good: only the rank that decodes them can tell


def line(user: object = "hi", assistant: object = "ok", **more: object) -> dict:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": turns, **more}


IMAGE = {"type": "image", "image": "small.png"}
# A line of JSONL -> reason and detail.
DATA: dict[str, tuple[object, str, str]] = {
    "placeholder in user text": (
        line("see <im_patch>"), "placeholder_in_text",
        "messages[0] contains the special token <im_patch> as text",
    ),
    "chat token in user text": (
        line("a<|im_end|>b"), "placeholder_in_text",
        "messages[0] contains the special token <|im_end|> as text",
    ),
    "more images than placeholders": (
        line("<image> what?", images=["small.png", "wide.png"]), "image_count",
        "2 images in the list, but 1 placeholders in the text",
    ),
    "fewer images than placeholders": (
        line("<image><image> what?", images=["small.png"]), "image_count",
        "1 images in the list, but 2 placeholders in the text",
    ),
    "placeholder without images": (
        line("<image> what?"), "image_count", "0 images in the list, but 1 placeholders in the text",
    ),
    "longer than seq_length": (line("hi " * 200), "too_long", "tokens, data.seq_length = 96"),
    "broken JSON": (b'{"messages": [', "broken_json", "Expecting value: line 1 column 15 (char 14)"),
    "not UTF-8": (b'{"text": "\xff"}', "not_utf8", "byte 10 of the line is 0xff"),
    "not an object": (b"[1, 2]", "not_an_object", "the line is a list, not a JSON object"),
    "no messages": ({"question": "?", "answer": "!"}, "missing_messages",
                    "has only answer, question; one of messages, text or content must be given"),
    "empty messages": ({"messages": []}, "missing_messages",
                       "messages is []; it must be a list with at least one turn"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role",
                     'messages[0].role is "tool"; known are system, user, assistant'),
    "turn without content": ({"messages": [{"role": "user"}]}, "bad_message",
                             'messages[0] is {"role": "user"}; it must be an object with role and content'),
    "empty turn": (line(""), "empty_message", "messages[0].content has neither text nor image"),
    "unknown part": (line([{"type": "video", "video": "a.mp4"}]), "unknown_part",
                     'messages[0].content[0] is {"type": "video", "video": "a.mp4"}; known types are text, '
                     'image, '
                     "image_url"),
    "image in an assistant turn": (line("hi", [IMAGE]), "image_in_assistant",
                                   "messages[1] is an assistant turn with an image; the model writes text "
                                   "only"),
    "nothing to learn": ({"messages": [{"role": "user", "content": "hi"}]}, "no_loss_tokens",
                         "no token to learn from with data.loss_on = assistant"),
    "lone surrogate": (b'{"text": "a\\ud800"}', "bad_text", "the document holds the lone surrogate U+D800"),
    "image by URL": (line([{"type": "image_url", "image_url": {"url": "https://x.y/z.png"}}, {"type": "text",
                     "text": "?"}]), "remote", "'https://x.y/z.png' is a URL; download it and give its path"),
}  # fmt: skip

NORM = "model.norm.weight"


def without(name: str):
    return lambda folder: write_weights(folder, {n: t for n, t in fresh_tensors().items() if n != name})


def with_tensor(name: str, tensor: torch.Tensor):
    return lambda folder: write_weights(folder, {**fresh_tensors(), name: tensor})


def moved_to(shard: str):
    def change(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map={**weight_map, NORM: shard})

    return change


def config(section: str = "", **values: object):
    return lambda folder: edit_json(folder / "config.json", section, **values)


def overwritten(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


ONE = "DIR: 1 tensor(s) do not fit the model:\n  "
# What is done to a good directory -> the error.
CHECKPOINTS = {
    "missing tensor": (without(NORM), ONE + "missing: model.norm.weight [128]"),
    "unexpected tensor": (with_tensor("model.rotary.inv_freq", torch.ones(2)), ONE +
    "unexpected: model.rotary.inv_freq"),
    "wrong shape": (
        with_tensor(NORM, torch.ones(64)), ONE + "shape: model.norm.weight is [64], the model wants [128]",
    ),
    "wrong dtype": (
        with_tensor(NORM, torch.ones(128, dtype=torch.int64)),
        ONE + "dtype: model.norm.weight is I64, expected one of F32, BF16, F16, F64",
    ),
    "tensor in another shard": (
        moved_to("model-00002.safetensors"),
        "DIR: 2 tensor(s) do not fit the model:\n  not in its shard: model.norm.weight, which "
        f"{INDEX} puts in model-00002.safetensors\n  not in the index: model.norm.weight in "
        "model-00001.safetensors",
    ),
    "path traversal": (
        moved_to("../other/model.safetensors"),
        f"DIR/{INDEX}: shards ['../other/model.safetensors'] must be plain file names inside the directory",
    ),
    "missing shard": (
        moved_to("model-00003.safetensors"),
        f"DIR: shard(s) ['model-00003.safetensors'] named by {INDEX} are missing",
    ),
    "damaged shard": (
        overwritten("model-00002.safetensors", b"\xff" * 64),
        "DIR/model-00002.safetensors: not a readable safetensors file (Error while deserializing header: ",
    ),
    "index without a map": (
        overwritten(INDEX, b'{"weight_map": []}'),
        f"DIR/{INDEX}: weight_map must be an object of tensor names and shards",
    ),
    "no weights": (
        lambda folder: (folder / INDEX).unlink(), f"DIR: neither {INDEX} nor model.safetensors is there",
    ),
    "config is not JSON": (overwritten("config.json", b"{"), "DIR/config.json: is not JSON ("),
    "other activation": (
        config("vision_config", hidden_act="gelu"),
        'vision_config.hidden_act = gelu: only "quick_gelu" is implemented; use a checkpoint with '
        '"quick_gelu"',
    ),
    "tied embeddings": (
        config("text_config", tie_word_embeddings=True),
        "text_config.tie_word_embeddings = true: only false is implemented; use a checkpoint with false",
    ),
    "crop that is no square": (
        config(patch_token_len=80), "patch_token_len = 80: must be a perfect square; e.g. 64 or 81",
    ),
    "image_token_len of another size": (
        config(image_token_len=169),
        "image_token_len = 169: image_size 112 with patch_size 14 gives a grid of 8 x 8, downsampled 2 x 2 "
        "= 4 tokens; "
        "set image_token_len 4 or correct image_size",
    ),
    "other decoder": (
        config("text_config", model_type="llama"),
        'text_config.model_type = llama: only "qwen3" is implemented; use a checkpoint with "qwen3"',
    ),
}  # fmt: skip


def test_the_table_is_as_long_as_asked_for():
    assert len(CONFIG) + len(IMAGES) + len(DATA) + len(CHECKPOINTS) >= 36


@pytest.mark.parametrize("case", CONFIG)
def test_config(case):
    arguments, problems = CONFIG[case]
    world = next((int(a.removeprefix("world=")) for a in arguments if a.startswith("world=")), 4)
    overrides = [a for a in arguments if not a.startswith("world=")]
    with pytest.raises(ConfigErrors) as caught:
        load_checked_run(None, [*TINY, *overrides], world_size=world)
    assert tuple(map(str, caught.value.problems)) == problems


def test_several_config_errors_at_once_and_the_exit_code(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("preset: step3_vl_tiny\ntrian: {}\nparallel: {tensor_model_parallel_size: 3}\n")
    assert main(["config", str(path), "data.seq_length=long", "optim.adam_eps=0"]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.splitlines() == [
        "6 problems in the configuration:",
        "  trian: unknown key; did you mean train?",
        "  data.seq_length = long: must be a whole number; got a str",
        "  optim.adam_eps = 0: must be greater than 0; change the value",
        *(f"  {problem}" for problem in CONFIG["tp does not divide heads"][1]),
    ]


def png(width: int, height: int) -> bytes:
    """A PNG that ends after its header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data root with everything that IMAGES names; links and files outside of it exist, too."""
    folder = tmp_path_factory.mktemp("bad") / "root"
    folder.mkdir()
    config = make_data(folder)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image, whatever its name says")
    (folder / "huge.png").write_bytes(png(60_000, 60_000))
    (folder / "zero.png").write_bytes(png(0, 5))
    (folder / "folder").mkdir()
    (folder / "vector.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("I;16", (8, 8), 700).save(folder / "deep.png")
    Image.new("RGB", (2000, 33)).save(folder / "thin.png")
    noise = bytearray((folder / "small.png").read_bytes())
    noise[45:60] = b"\x55" * 15  # inside the pixels
    (folder / "noise.png").write_bytes(noise)
    shutil.copy(folder / "small.png", folder.parent / "outside.png")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return config


@pytest.fixture(scope="module")
def builder(data) -> RowBuilder:
    return RowBuilder(data, MODEL)


@pytest.mark.parametrize("name", IMAGES)
def test_image(builder, name):
    row, images = builder.build(raw(chat("What?", "red", name, id="bad")))
    if name in DECODED:
        batch = collate([row], len(row.ids), 0, MODEL.vision.image_size, MODEL.vision.crop_size)
        (failed,) = builder.with_pixels(batch, [images], range(len(batch.view_kinds))).failed
        record = failed.record
    else:
        assert len(row.ids) == 0 and not images
        record = row.refused
    reason, detail = IMAGES[name]
    assert (record.id, record.source, record.line, record.reason) == ("bad", "lines.jsonl", 7, reason)
    assert detail.replace("DIR", builder.data.data_root) in record.detail


def test_data_through_the_loader(data, tmp_path):
    """Every bad line is refused with its reason, the good ones stay, and the record is written once."""
    good = [chat("What?", "red", "small.png", id=f"good{n}") for n in range(2)]
    bad = [record for record, _, _ in DATA.values()]
    path = write_jsonl(tmp_path / "train.jsonl", [good[0], *bad, good[1]])
    loader = train_loader(replace(data, train=[path]), MODEL, Place(), 1, len(bad) + 2)
    refused, kept = [], []
    log = BadSampleLog(str(tmp_path / "run" / "bad_samples.jsonl"), write=True)
    for _ in range(2):  # two epochs
        for batch in loader.next_step():
            refused += log.add(batch.refused)
            kept += [name for name, length in zip(batch.sample_ids, batch.doc_lengths) if length]
            assert batch.num_loss_tokens > 0 or batch.refused
    assert sorted(kept) == ["good0", "good0", "good1", "good1"]
    found = {record.line: record for record in refused}
    for number, (case, (_, reason, detail)) in enumerate(DATA.items(), start=2):
        record = found[number]
        assert (case, record.source, record.reason) == (case, path, reason)
        assert detail in record.detail, case
    written = (tmp_path / "run" / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [BadSample(**json.loads(text)) for text in written] == refused and len(refused) == len(DATA)
    reasons = Counter(reason for _, reason, _ in DATA.values())
    assert log.by_reason == reasons and log.by_source == {path: len(DATA)}
    assert log.summary().startswith("19 bad samples: image_count 3, ")
    again = BadSampleLog(log.path, write=True)  # a resumed run
    assert again.add(refused) == [] and again.by_reason == reasons


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"train": ["DIR/none.jsonl"]},
            "DIR/none.jsonl: cannot be read (No such file or directory); correct the path",
        ),
        ({"train": []}, "no JSONL file is given; name at least one, e.g. data.train=[train.jsonl]"),
        (
            {"train": ["DIR/empty.png"]},
            "DIR/empty.png: holds no sample; every line that is not blank must be one JSON",
        ),
        ({"tokenizer": "DIR/none.json"}, "data.tokenizer = DIR/none.json: no such file; give the path of a"),
        (
            {"tokenizer": "DIR/small.png"},
            "data.tokenizer = DIR/small.png: must end in .json (Hugging Face) or .model",
        ),
    ],
)
def test_data_files(data, changes, error):
    def here(value):
        return (
            [here(item) for item in value]
            if isinstance(value, list)
            else value.replace("DIR", data.data_root)
        )

    good = {"train": [str(Path(data.data_root) / "text.jpg")]}
    bad = replace(data, **{**good, **{name: here(value) for name, value in changes.items()}})
    with pytest.raises(DataError) as caught:
        train_loader(bad, MODEL, Place(), 1, 1)
    assert str(caught.value).startswith(here(error))


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "good")


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(release, tmp_path, case):
    change, error = CHECKPOINTS[case]
    folder = tmp_path / "release"
    shutil.copytree(release, folder)
    HFCheckpoint(folder).check(model_from_hf(folder))
    change(folder)
    with pytest.raises((CheckpointError, ConfigErrors)) as caught:
        HFCheckpoint(folder).check(model_from_hf(folder))
    shown = [str(problem) for problem in getattr(caught.value, "problems", [])] or [str(caught.value)]
    assert len(shown) == 1
    assert shown[0].replace(str(folder), "DIR").startswith(error)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ("tp2qq", "data", "dense"),
            "layout 'tp2qq': 'qq' is no part; use e.g. tp2, tp2sp, tp4sp, pp2, pp4 or all",
        ),
        (("tp2tp4", "data", "dense"), "layout 'tp2tp4': 'tp4' is no part; use e.g. "),
        (("all", "vision", "dense"), "placement 'vision' is unknown; use data or tensor"),
        (("all", "data", "thd"), "format 'thd' is unknown; use dense or packed"),
    ],
)
def test_arguments_of_check_parity(arguments, error):
    from megatron_vl.errors import ConfigError
    from megatron_vl.parity.check import make_cases

    with pytest.raises(ConfigError) as caught:
        make_cases(*arguments, "cpu")
    assert str(caught.value).startswith(error)
