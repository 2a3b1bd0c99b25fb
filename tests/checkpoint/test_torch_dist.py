"""The files of a checkpoint: what is written is read, by us, by torch and by Megatron-Core, and nothing else is."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_vl.checkpoint.stored import Stored, check_files
from megatron_vl.checkpoint.torch_dist import Item, matrix_shape, publish, write
from megatron_vl.config.dump import to_yaml
from megatron_vl.config.load import load_run
from megatron_vl.errors import CheckpointError
from tests.checkpoint import on_ranks

CONFIG = to_yaml(load_run(overrides=["preset=step3_vl_tiny"]).config)
STATE = {"format": 1, "progress": {"step": 3, "tokens": 9}}
A, B = torch.arange(60.0).reshape(10, 6), torch.arange(7).to(torch.bfloat16).reshape(7, 1)


def items(a: torch.Tensor = A, drop: int | None = None) -> list[Item]:
    """``a`` in three rectangles and ``b`` whole."""
    boxes = [((0, 0), (4, 6)), ((4, 0), (6, 2)), ((4, 2), (6, 4))]
    parts = [
        Item("model/a", (10, 6), a.dtype, (r, c), (n, m), lambda r=r, c=c, n=n, m=m: a[r : r + n, c : c + m])
        for (r, c), (n, m) in boxes
    ]
    parts.append(Item("model/b", (7, 1), B.dtype, (0, 0), (7, 1), lambda: B))
    return [item for number, item in enumerate(parts) if number != drop]


def make(folder: Path, threads: int = 2) -> Path:
    (folder / "x.tmp").mkdir(parents=True)
    written = write(folder / "x.tmp", items(), threads=threads)
    publish(folder / "x.tmp", folder / "step_00000003", [written], STATE, CONFIG)
    return folder / "step_00000003"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


def test_matrix_shapes():
    assert [matrix_shape(s) for s in ((5,), (5, 3), (8, 4, 3, 3))] == [(5, 1), (5, 3), (8, 36)]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_written_is_read(tmp_path, threads):
    stored = Stored(make(tmp_path, threads))
    assert torch.equal(stored.read("model/a"), A) and torch.equal(stored.read("model/b"), B)
    assert stored.read("model/b").dtype == torch.bfloat16
    for r, c, n, m in ((0, 0, 10, 6), (2, 1, 5, 3), (9, 5, 1, 1), (0, 3, 4, 2)):
        assert torch.equal(stored.read_box("model/a", (r, c), (n, m)), A[r : r + n, c : c + m])
    assert stored.state == STATE and stored.model.text.num_layers == 4
    assert stored.check_files() == [] and not (tmp_path / "x.tmp").exists()
    assert len(list(stored.folder.glob("*.distcp"))) == threads


def test_torch_and_megatron_core_read_it(world, made):
    """The formats `torch_dist` of both, whole tensors and shards."""
    (read,) = world.run(1, on_ranks.read_by_others, str(made))
    assert torch.equal(read["torch"], A) and torch.equal(read["megatron"], A)
    assert torch.equal(read["megatron shard"], A[5:]) and torch.equal(read["megatron b"], B)


def test_a_view_is_not_written_with_its_whole_storage(tmp_path):
    big = torch.zeros(1_000_000, 1)
    (tmp_path / "x").mkdir()
    written = write(tmp_path / "x", [Item("model/a", (3, 1), big.dtype, (0, 0), (3, 1), lambda: big[:3])])
    assert sum(size for size, _ in written.files.values()) < 5_000


@pytest.mark.parametrize("drop", [0, 1, 2])
def test_tensors_with_holes_are_not_published(tmp_path, drop):
    (tmp_path / "x.tmp").mkdir()
    written = write(tmp_path / "x.tmp", items(drop=drop))
    with pytest.raises(ValueError, match="model/a: its parts have"):
        publish(tmp_path / "x.tmp", tmp_path / "x", [written], STATE, CONFIG)
    assert not (tmp_path / "x").exists()


def test_ranks_that_disagree_are_not_published(tmp_path):
    (tmp_path / "x.tmp").mkdir()
    one = write(tmp_path / "x.tmp", items(), prefix="__0_")
    two = write(tmp_path / "x.tmp", items(drop=3), prefix="__1_")
    with pytest.raises(ValueError, match="model/a: two parts at"):
        publish(tmp_path / "x.tmp", tmp_path / "x", [one, two], STATE, CONFIG)


def test_the_error_of_a_writing_thread_is_raised(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    (tmp_path / "x").mkdir()
    for threads in (1, 3):
        with pytest.raises(OSError, match="No space left"):
            write(
                tmp_path / "x",
                [*items(), Item("model/c", (1, 1), torch.float32, (0, 0), (1, 1), full)],
                prefix=f"__{threads}_",
                threads=threads,
            )


def damage(folder: Path, how: str) -> None:
    data = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    if how == "truncated":
        data.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "missing":
        data.unlink()
    else:
        (folder / how).unlink()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("truncated", "the manifest says"),
        ("flipped", "is damaged: its sha256 is not the manifest's"),
        ("missing", "is missing"),
        (".metadata", ".metadata is missing"),
        ("state.json", "state.json is missing"),
        ("manifest.json", "manifest.json cannot be read"),
    ],
)
def test_damage_is_found(tmp_path, how, expected):
    folder = make(tmp_path)
    damage(folder, how)
    problems = check_files(folder)
    assert len(problems) == 1 and expected in problems[0]
    halves = [check_files(folder, share=(k, 2)) for k in (0, 1)]
    assert [p for half in halves for p in half if "manifest.json" not in p] == (
        problems if how != "manifest.json" else []
    )
    if how == "flipped":
        assert check_files(folder, digests=False) == []
    if how in (".metadata", "state.json", "manifest.json"):
        with pytest.raises(CheckpointError, match=how.removeprefix(".")):
            Stored(folder)


def test_reading_damaged_bytes_is_a_clear_error(tmp_path):
    folder = make(tmp_path, threads=1)
    damage(folder, "truncated")
    stored = Stored(folder)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp cannot be read: .* the checkpoint is damaged"):
        for key in stored.tensors:
            stored.read(key)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_from_an_index_is_executed(tmp_path):
    folder = make(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: names \w+\.mkdir, which no index"):
        Stored(folder)
    assert not (tmp_path / "executed").exists()


def test_nothing_from_a_tensor_is_executed(tmp_path):
    folder = make(tmp_path, threads=1)
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Malicious(tmp_path / "executed"), protocol=2) * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Stored(folder).read("model/a")
    assert not (tmp_path / "executed").exists()


def test_files_outside_of_the_folder_are_refused(tmp_path):
    folder = make(tmp_path)
    stored = pickle.loads((folder / ".metadata").read_bytes())
    for info in stored.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (folder / ".metadata").write_bytes(pickle.dumps(stored))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        Stored(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert any("'../../etc/passwd' outside of the folder" in p for p in check_files(folder))


def test_an_unknown_format_is_refused(tmp_path):
    folder = make(tmp_path)
    (folder / "state.json").write_text(json.dumps({**STATE, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2; this version reads format 1"):
        Stored(folder)
