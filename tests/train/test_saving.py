"""Saving: any layout writes what any other reads, bit by bit; in the background; failures leave the old ones."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_vl.checkpoint.stored import Stored
from megatron_vl.parallel.world import LocalWorld
from tests.train import on_ranks, saving_on_ranks
from tests.train.tiny_run import LAYOUTS, load, losses, make_files, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("data"))


def run(world, config: Path, layout: str, *keys: str):
    return world.run(LAYOUTS[layout][0], on_ranks.pretrain, load(config, layout, *keys))


def differences(one: Path, two: Path) -> list[str]:
    """Keys of weights and optimizer that are not the same bits in both."""
    a, b = Stored(one), Stored(two)
    keys = {key for stored in (a, b) for key in stored.tensors if not key.startswith("rng/")}
    assert len(keys) > 290
    return sorted(
        key
        for key in keys
        if key not in a.tensors
        or key not in b.tensors
        or a.tensors[key].dtype != b.tensors[key].dtype
        or not torch.equal(a.read(key), b.read(key))
    ) + [key for key in ("progress", "optimizer_steps", "source_dtypes") if a.state[key] != b.state[key]]


@pytest.mark.parametrize(
    ("first", "second", "precision", "keys"),
    [
        ("tp2pp2", "dp2", "bf16", []),
        ("dp2tp2", "tp2pp2", "bf16", ["parallel.vision_placement=tensor"]),
        ("cp2", "dp2tp2", "bf16", ["parallel.use_distributed_optimizer=false"]),
        ("dp2tp2", "1", "fp32", ["parallel.sequence_parallel=true"]),
        ("tp2pp2", "dp2", "bf16", ["parallel.vision_placement=all"]),
    ],
)
def test_loading_and_saving_in_another_layout_changes_no_bit(
    world, data, tmp_path, first, second, precision, keys
):
    """Weights, fp32 main weights, both moments, step counts, progress. keys: of the first layout."""
    config = write_config(data, tmp_path / "run")
    precise = f"precision.params={precision}"
    run(world, config, first, "train.train_steps=2", precise, *keys)
    saved = tmp_path / "run" / "checkpoints" / "step_00000002"
    if precision == "bf16":
        stored = Stored(saved)
        assert stored.tensors["model/lm_head.weight"].dtype == torch.bfloat16
        assert stored.tensors["optimizer/main/lm_head.weight"].dtype == torch.float32
        assert set(stored.state["optimizer_steps"].values()) == {2}
    ranks = LAYOUTS[second][0]
    world.run(
        ranks,
        saving_on_ranks.resaved,
        load(config, second, precise, "train.train_steps=2"),
        str(tmp_path / "two"),
    )
    assert differences(saved, tmp_path / "two" / "step_00000002") == []


def test_frozen_parts_have_no_state_and_are_unfrozen_later(world, data, tmp_path):
    config = write_config(data, tmp_path / "run")
    frozen = ["model.freeze_vision=true", "model.freeze_projector=true"]
    run(world, config, "tp2pp2", "train.train_steps=2", *frozen)
    stored = Stored(tmp_path / "run" / "checkpoints" / "step_00000002")
    tower = [key for key in stored.tensors if "vision_model." in key or "vit_large_projector" in key]
    assert tower and all(key.startswith("model/") for key in tower)
    (after,) = run(world, config, "1", "train.train_steps=4")
    assert "had no optimizer state (frozen, or never trained): it starts at zero" in after.printed
    later = Stored(tmp_path / "run" / "checkpoints" / "step_00000004")
    steps = later.state["optimizer_steps"]
    assert steps["vision_model.conv1.weight"] == 2 and steps["lm_head.weight"] == 4
    assert not torch.equal(
        later.read("model/vision_model.conv1.weight"), stored.read("model/vision_model.conv1.weight")
    )
    assert len(losses(tmp_path / "run")) == 4


def test_training_goes_on_while_a_save_is_written_and_the_save_is_of_its_moment(world, data, tmp_path):
    config = write_config(data, tmp_path / "run")
    for seen in world.run(2, saving_on_ranks.overlapped, load(config, "dp2"), str(tmp_path)):
        assert seen.pending and not seen.ready and seen.moved and seen.stored_is_then
        assert seen.visible == ["step_00000001.tmp"]


def test_a_save_that_takes_too_long_names_the_rank_and_the_limit(world, data, tmp_path):
    config = write_config(data, tmp_path / "run")
    run(world, config, "dp2", "train.train_steps=1")
    loaded = load(config, "dp2", "checkpoint.timeout_seconds=2")
    for error, seconds in world.run(2, saving_on_ranks.stalled, loaded, 1):
        assert "rank 1 (dp1 pp0 cp0 tp0) did not finish writing to" in error
        assert (
            "checkpoint.timeout_seconds = 2" in error and "older checkpoints" in error and "intact" in error
        )
        assert seconds < 15
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_00000001"


def test_retention_keeps_the_newest_and_every_nth(world, data, tmp_path):
    config = write_config(data, tmp_path / "run")
    keys = ["checkpoint.keep_last=2", "checkpoint.keep_every=3"]
    printed = world.run(2, saving_on_ranks.many, load(config, "dp2", *keys), 7)[0]
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "latest", "step_00000003", "step_00000006", "step_00000007",
    ]  # fmt: skip
    assert (folder / "latest").read_text() == "step_00000007\n" and printed.count("saved ") == 7


def saved_once(world, data, tmp_path) -> tuple[Path, Path]:
    config = write_config(data, tmp_path / "run")
    run(world, config, "dp2", "train.train_steps=1")
    return config, tmp_path / "run" / "checkpoints"


def assert_step_1_is_intact(world, config: Path, folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000001"]
    assert Stored(folder / "step_00000001").check_files() == []
    assert world.run(2, on_ranks.refused, load(config, "dp2")) == ["", ""]


def test_a_rank_that_cannot_write_is_named_by_all(world, data, tmp_path):
    config, folder = saved_once(world, data, tmp_path)
    errors = world.run(2, on_ranks.refused, load(config, "dp2"), "full disk on 1")
    assert errors[0] == errors[1]
    assert (
        f"saving {folder / 'step_00000002'} failed: rank 1 (dp1 pp0 cp0 tp0) could not write to" in errors[0]
    )
    assert "No space left on device" in errors[0] and "are intact" in errors[0]
    assert_step_1_is_intact(world, config, folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_seen_before_writing_and_while_writing(world, data, tmp_path, small_disk):
    config = write_config(data, tmp_path / "run")
    loaded = load(config, "dp2", f"run_dir={small_disk}/run")
    for error in world.run(2, saving_on_ranks.error_of_saving, loaded):
        assert "bytes and its disk has" in error and "make room, or keep fewer" in error
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []
    with LocalWorld(2) as own:  # torch's writer keeps what it failed with, and the job's groups with it
        errors = own.run(2, saving_on_ranks.error_of_saving_without_check, loaded)
    for error in errors:
        assert "could not write to" in error and ("No space left" in error or "unexpected pos" in error)
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []


@pytest.fixture
def read_only(tmp_path):
    """A folder below a read-only mount, which stops root too."""
    folder = tmp_path / "read_only"
    (folder / "run" / "checkpoints").mkdir(parents=True)
    commands = [
        ["mount", "--bind", str(folder), str(folder)],
        ["mount", "-o", "remount,ro,bind", str(folder)],
    ]
    if os.geteuid() != 0 or any(subprocess.run(c, capture_output=True).returncode for c in commands):
        pytest.skip("a read-only mount needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_folder_is_refused_by_all_ranks(world, data, tmp_path, read_only):
    config = write_config(data, tmp_path / "run")
    loaded = load(config, "dp2")
    for error in world.run(2, saving_on_ranks.error_of_saving_in, loaded, str(read_only / "run/checkpoints")):
        assert "could not be made" in error and "Read-only file system" in error and "write access" in error


def test_a_file_in_the_place_of_the_folder_is_refused(world, data, tmp_path):
    config = write_config(data, tmp_path / "run")
    run(world, config, "dp2", "train.train_steps=1", "checkpoint.save_at_end=false")
    folder = tmp_path / "run" / "checkpoints"
    assert not folder.exists()
    folder.write_text("")
    for error in world.run(
        2, saving_on_ranks.error_of_saving_in, load(write_config(data, tmp_path / "b"), "dp2"), str(folder)
    ):
        assert error.startswith("CheckpointError: ") and "could not be made" in error


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda c: os.truncate(max(c.glob("*.distcp"), key=lambda p: p.stat().st_size), 1000),
    "flipped": lambda c: flip(max(c.glob("*.distcp"), key=lambda p: p.stat().st_size)),
    "no index": lambda c: (c / ".metadata").unlink(),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(world, data, tmp_path, how):
    config = write_config(data, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    run(world, config, "dp2", "train.train_steps=2", "checkpoint.save_interval=1")
    DAMAGE[how](folder / "step_00000002")
    strict = world.run(2, on_ranks.refused, load(config, "dp2", "checkpoint.strict=true"))
    for error in strict:
        assert (
            error.startswith("CheckpointError: checkpoint.strict: ")
            and str(folder / "step_00000002") in error
        )
    done = run(world, config, "dp2", "train.train_steps=3")
    printed = done[0].printed
    assert f"damaged checkpoint {folder / 'step_00000002'}: " in printed
    assert f"using {folder / 'step_00000001'}" in printed
    assert f"resumed from {folder / 'step_00000001'}: step 1" in printed
    whole = write_config(data, tmp_path / "whole")
    run(world, whole, "dp2", "train.train_steps=3")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)


def test_a_half_written_checkpoint_is_named_and_removed_by_the_next_save(world, data, tmp_path):
    config, folder = saved_once(world, data, tmp_path)
    shutil.copytree(folder / "step_00000001", folder / "step_00000002.tmp")
    (folder / "step_00000002.tmp" / "manifest.json").unlink()
    for error in world.run(2, on_ranks.refused, load(config, "dp2", "checkpoint.strict=true")):
        assert f"half-written checkpoint {folder / 'step_00000002.tmp'}: its saving did not end" in error
    printed = run(world, config, "dp2", "train.train_steps=2")[0].printed
    assert f"half-written checkpoint {folder / 'step_00000002.tmp'}" in printed
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000001", "step_00000002"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(world, data, tmp_path):
    config, folder = saved_once(world, data, tmp_path)
    DAMAGE["flipped"](folder / "step_00000001")
    for error in world.run(2, on_ranks.refused, load(config, "dp2")):
        assert (
            "none of its 1 checkpoint(s) is good" in error
            and "sha256" in error
            and "another run_dir" in error
        )


def test_latest_may_be_lost_or_wrong(world, data, tmp_path):
    config, folder = saved_once(world, data, tmp_path)
    (folder / "latest").write_text("step_00000009")
    printed = run(world, config, "dp2", "train.train_steps=1")[0].printed
    assert "latest names 'step_00000009', which is not there; using" in printed and "resumed from" in printed
    (folder / "latest").unlink()
    assert "resumed from" in run(world, config, "dp2", "train.train_steps=1")[0].printed


def test_first_weights_from_a_checkpoint(world, data, tmp_path):
    """``train.init_from``: the weights, and nothing else of it."""
    config, folder = saved_once(world, data, tmp_path)
    second = write_config(data, tmp_path / "second")
    keys = [f"train.init_from={tmp_path / 'run'}", "train.train_steps=1", "optim.weight_decay=0"]
    flat = "schedule.phases=[{tokens: 100000, lr_start: 0, lr_end: 0, style: constant}]"
    (done,) = run(world, second, "1", *keys, flat, "schedule.warmup_tokens=0")
    assert done.progress.step == 1 and "resumed" not in done.printed
    one, two = Stored(folder / "step_00000001"), Stored(tmp_path / "second" / "checkpoints" / "step_00000001")
    names = [f"model/{name}" for name in one.weight_names]
    assert all(torch.equal(one.read(name), two.read(name)) for name in names)
    assert set(two.state["optimizer_steps"].values()) == {1}
    wrong = load(second, "1", *keys[:1], "model.text.rotary_base=5e5", f"run_dir={tmp_path / 'third'}")
    with pytest.raises(Exception, match=r"model\.text\.rotary_base"):
        world.run(1, on_ranks.pretrain, wrong)


def test_the_state_says_where_the_run_stands(world, data, tmp_path):
    _, folder = saved_once(world, data, tmp_path)
    state = json.loads((folder / "step_00000001" / "state.json").read_text())
    progress = state["progress"]
    assert (progress["step"], progress["tokens"], progress["samples"], progress["skipped"]) == (1, 512, 8, 0)
    assert state["layout"]["dp"] == 2 and "train.jsonl (24 samples" in progress["data"]
