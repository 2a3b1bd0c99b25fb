"""An image that only one rank fails to decode, and ranks that read different files."""

from pathlib import Path

import pytest
from PIL import Image

from tests.data.tiny import chat, write_jsonl
from tests.train import on_ranks
from tests.train.tiny_run import load, losses, make_files, read_lines, write_config

SMALL, WIDE = "one view", "four views"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """8 samples, one step; two have a JPEG that ends before its pixels do. whole.jsonl: all readable."""
    folder = make_files(tmp_path_factory.mktemp("feed"), samples=6)
    lines = {"train": read_lines(folder / "train.jsonl"), "whole": read_lines(folder / "train.jsonl")}
    for name, size in ((SMALL, (96, 80)), (WIDE, (160, 60))):
        picture = folder / f"whole_{size[0]}.jpg"
        Image.effect_noise(size, 90).convert("RGB").save(picture, quality=95)
        content = picture.read_bytes()
        (folder / f"cut_{size[0]}.jpg").write_bytes(content[: len(content) // 2])
        for split, prefix in (("train", "cut"), ("whole", "whole")):
            lines[split].append(chat("What colour?", "red", f"{prefix}_{size[0]}.jpg", id=name))
    for split, records in lines.items():
        write_jsonl(folder / f"{split}.jsonl", records)
    return folder


def test_a_decode_failure_on_one_rank_masks_the_document_on_all(world, data, tmp_path):
    cut = load(write_config(data, tmp_path / "cut"), "tp2pp2")
    whole = load(write_config(data, tmp_path / "whole"), "tp2pp2", f"data.train=[{data / 'whole.jsonl'}]")
    ranks = world.run(4, on_ranks.first_step, cut)
    # Ranks 0 and 1 share out the views; behind the first stage nothing is decoded.
    assert sorted(len(rank.failed) for rank in ranks) == [0, 0, 1, 2]
    assert (
        sum(SMALL in rank.failed for rank in ranks) == 1 and sum(WIDE in rank.failed for rank in ranks) == 2
    )
    assert ranks[2].failed == ranks[3].failed == []
    assert all(sorted(rank.masked) == sorted([SMALL, WIDE]) for rank in ranks)
    masked = world.run(4, on_ranks.first_step, whole, (SMALL, WIDE))
    unmasked = world.run(4, on_ranks.first_step, whole)
    for rank, reference in zip(ranks, masked):
        assert rank.loss == pytest.approx(reference.loss, rel=1e-7) and rank.tokens == reference.tokens
        assert rank.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
        assert rank.bad_samples == 2
    assert unmasked[0].tokens > ranks[0].tokens and unmasked[0].loss != ranks[0].loss


def test_training_goes_on_and_each_bad_sample_is_written_once(world, data, tmp_path):
    """Three epochs over the same two broken files; then the run is resumed for one more."""
    config = write_config(data, tmp_path / "run")
    for steps in (3, 4):
        world.run(4, on_ranks.pretrain, load(config, "tp2pp2", f"train.train_steps={steps}"))
    records = read_lines(tmp_path / "run" / "bad_samples.jsonl")
    assert sorted((r["id"], r["reason"], r["line"]) for r in records) == [
        (WIDE, "truncated", 8), (SMALL, "truncated", 7),
    ]  # fmt: skip
    assert all(r["source"] == str(data / "train.jsonl") and "cut_" in r["detail"] for r in records)
    found = losses(tmp_path / "run")
    assert len(found) == 4 and found[4] < found[1]
    assert {r["bad_samples"] for r in read_lines(tmp_path / "run" / "metrics.jsonl")} == {2}


@pytest.mark.parametrize("placement", ["data", "tensor"])
def test_every_layout_masks_alike(world, data, tmp_path, placement):
    """dp2tp2: only one of the two replicas meets a given bad sample."""
    config = write_config(data, tmp_path / "run")
    one = world.run(1, on_ranks.first_step, load(config))[0]
    ranks = world.run(
        4, on_ranks.first_step, load(config, "dp2tp2", f"parallel.vision_placement={placement}")
    )
    for rank in ranks:
        assert (rank.tokens, rank.bad_samples) == (one.tokens, 2)
        assert rank.loss == pytest.approx(one.loss, rel=1e-6)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_failed_image_has_no_gradient_at_all(world, data, tmp_path, mode):
    """Its pixels are the mean colour or, in mode fast, black."""
    config = load(write_config(data, tmp_path / "run"), "1", f"data.image_mode={mode}")
    bad = world.run(1, on_ranks.gradients_of_parts, config, SMALL)[0]
    assert bad["vision_model"] == 0.0 and bad["projector"] == 0.0 and bad["language_model"] > 0
    good = world.run(1, on_ranks.gradients_of_parts, config, "train0")[0]
    assert good["vision_model"] > 0 and good["projector"] > 0


def test_ranks_that_read_different_files_are_refused(world, data, tmp_path):
    """One word differs in one file on one node."""
    lines = (data / "train.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(lines.replace("What colour?", "How many?"))
    config = load(write_config(data, tmp_path / "run"), "tp2pp2")
    errors = world.run(4, on_ranks.disagreeing, config, 1, str(tmp_path / "other.jsonl"))
    for rank, error in enumerate(errors):
        assert error.startswith(f"DataError: rank {rank} (dp0 pp{rank // 2} cp0 tp{rank % 2}): ")
        assert "have read different data" in error and "must be the same on every node" in error
    fingerprints = [error.split("fingerprint ")[1].split(",")[0] for error in errors]
    assert len(set(fingerprints)) == 2 and fingerprints.count(fingerprints[1]) == 1


def test_a_step_without_a_single_good_sample_ends_the_run_on_all_ranks(world, data, tmp_path):
    """Mostly a wrong data_root: better said at once than after a night."""
    write_jsonl(tmp_path / "bad.jsonl", [chat("What?", "red", "missing.png", id=f"b{n}") for n in range(8)])
    config = load(write_config(data, tmp_path / "run"), "tp2pp2", f"data.train=[{tmp_path / 'bad.jsonl'}]")
    for error in world.run(4, on_ranks.refused, config, "train"):
        assert error.startswith(
            "DataError: step 1: none of its 8 samples has a scored token; 8 bad samples: missing 8"
        )
    reasons = [record["reason"] for record in read_lines(tmp_path / "run" / "bad_samples.jsonl")]
    assert reasons == ["missing"] * 8
