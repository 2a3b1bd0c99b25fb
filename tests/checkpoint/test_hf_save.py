"""Files in the released layout written in pieces: the library reads them back, shards keep to their size."""

import json
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_vl.checkpoint import weights as weights_module
from megatron_vl.checkpoint.digests import Digests, digest, read_digests, write_digests
from megatron_vl.checkpoint.hf_load import INDEX
from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.checkpoint.hf_save import Gate, plan_shards, write_shards
from megatron_vl.checkpoint.random_release import random_weights
from megatron_vl.checkpoint.safetensors_file import ShardReader, ShardWriter, TensorSpec
from megatron_vl.checkpoint.weights import HFWeights, Weight, Whole, row_blocks
from megatron_vl.config.presets import STEP3_VL_10B
from megatron_vl.errors import CheckpointError
from tests.fixtures.paths import TINY_A

FORMATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def weights_of(tensors: dict[str, torch.Tensor]) -> dict[str, Weight]:
    def rows(tensor):
        matrix = tensor.reshape(tensor.shape[0], -1)
        return lambda first, count: matrix[first : first + count]

    return {spec.name: Weight(spec, rows(tensors[spec.name])) for spec in specs_of(tensors)}


def test_the_library_reads_back_every_format_and_shape(tmp_path):
    tensors = {
        f"{str(dtype)[6:]}_{len(shape)}": torch.randn(shape).to(dtype)
        for dtype in FORMATS
        for shape in ((7,), (3, 5), (2, 3, 5, 7))
    }
    path = tmp_path / "x.safetensors"
    writer = ShardWriter(path, specs_of(tensors))
    for name, tensor in reversed(tensors.items()):  # any order, in pieces
        middle = tensor.numel() // 2
        flat = tensor.reshape(-1)
        writer.write(name, middle * tensor.itemsize, flat[middle:])
        writer.write(name, 0, flat[:middle])
    writer.sync()
    writer.close()
    assert path.stat().st_size == writer.nbytes
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            assert file.get_tensor(name).dtype == tensor.dtype and torch.equal(file.get_tensor(name), tensor)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0


def test_the_reader_agrees_with_the_library_on_files_of_others():
    for path in sorted(TINY_A.glob("model-*.safetensors")):
        reader, expected = ShardReader(path), load_file(path)
        assert set(reader.specs) == set(expected)
        for name, tensor in expected.items():
            spec = reader.specs[name]
            assert (spec.shape, spec.dtype) == (tuple(tensor.shape), tensor.dtype)
            matrix = tensor.reshape(tensor.shape[0], -1)
            first = len(matrix) // 3
            assert torch.equal(reader.read(name, first, len(matrix) - first), matrix[first:])


def test_a_file_that_is_shorter_or_longer_than_it_says(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:40], whole[:-1], b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="x.safetensors: not a readable safetensors file"):
            ShardReader(path)
    save_file({"a": torch.zeros(3, dtype=torch.int32)}, path)
    with pytest.raises(CheckpointError, match="a is I32, known are F64, F32, F16, BF16"):
        ShardReader(path)


def test_a_file_cut_off_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    reader = ShardReader(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends inside of a"):
        reader.read("a", 0, 100)


def test_shards_hold_at_most_the_limit_in_the_order_of_names():
    specs = [TensorSpec(n, torch.bfloat16, s) for n, s in expected_tensors(STEP3_VL_10B).items()]
    shards = plan_shards(specs, 5_000_000_000)
    assert [shard.file for shard in shards] == [f"model-{n:05d}.safetensors" for n in range(1, 6)]
    assert [name for shard in shards for name in shard.names] == sorted(expected_tensors(STEP3_VL_10B))
    sizes = {spec.name: spec.nbytes for spec in specs}
    assert all(sum(sizes[name] for name in shard.names) <= 5_000_000_000 for shard in shards)


def test_a_tensor_above_the_limit_has_a_file_of_its_own(tmp_path):
    tensors = {"a": torch.randn(4), "b": torch.randn(500), "c": torch.randn(4), "d": torch.randn(4)}
    shards = plan_shards(specs_of(tensors), 600)
    assert [shard.names for shard in shards] == [("a",), ("b",), ("c", "d")]
    write_shards(tmp_path, weights_of(tensors), shards, 2, lambda n: None, lambda s, d: None)
    assert all((tmp_path / s.file).stat().st_size <= 600 for s in shards if s.names != ("b",))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == {name: shard.file for shard in shards for name in shard.names}
    for shard in shards:
        for name, tensor in load_file(tmp_path / shard.file).items():
            assert torch.equal(tensor, tensors[name])


def test_a_worker_that_fails_ends_the_writing_with_its_error(tmp_path):
    def broken(first, count):
        raise CheckpointError("unreadable")

    weights = weights_of({f"t{n}": torch.randn(8) for n in range(20)})
    weights["t7"] = Weight(weights["t7"].spec, broken)
    shards = plan_shards([w.spec for w in weights.values()], 10**6)
    with pytest.raises(CheckpointError, match="unreadable"):
        write_shards(tmp_path, weights, shards, 3, lambda n: None, lambda s, d: None)
    assert not (tmp_path / INDEX).exists()


def test_values_that_are_not_those_of_their_stored_digest(tmp_path):
    weights = weights_of({"a": torch.randn(8), "b": torch.randn(8)})
    known = {name: digest(weight).sha256 for name, weight in weights.items()}
    shards = plan_shards([w.spec for w in weights.values()], 10**6)
    other = weights_of({"b": torch.randn(8)})
    with pytest.raises(CheckpointError, match="^b: its values are not those of the digest"):
        write_shards(tmp_path, weights | other, shards, 2, lambda n: None, lambda s, d: None, known)


def test_digests_do_not_depend_on_the_order_of_blocks_and_see_every_value(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "BLOCK_BYTES", 256)
    tensor = torch.randn(50, 8)
    weight = weights_of({"a": tensor})["a"]
    blocks = weight.blocks()
    assert blocks == row_blocks(weight.spec) and len(blocks) == 7
    digests = Digests()
    for first, count in reversed(blocks):
        digests.add(weight.spec, first, weight.rows(first, count))
    assert digests.of("a") == digest(weight).sha256
    for row in (0, 8, 49):
        changed = tensor.clone()
        changed[row, 3] += 1
        assert digest(weights_of({"a": changed})["a"]).sha256 != digests.of("a")
    write_digests(tmp_path / "d.json", digests.collected())
    assert read_digests(tmp_path / "d.json") == digests.collected()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "x", "tensors": {}}', '{"format": 3}'])
def test_what_is_not_a_digest_file(tmp_path, content):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(CheckpointError, match="d.json: not a digest file"):
        read_digests(tmp_path / "d.json")


def test_the_gate_bounds_what_threads_hold_and_lets_one_in_always():
    gate, held, most = Gate(10), [0], [0]
    lock = threading.Lock()

    def work(size):
        with gate.holding(size):
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            threading.Event().wait(0.005)
            with lock:
                held[0] -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in (4, 5, 6, 3, 2, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most[0] == 50 and held[0] == 0  # 50 alone, everything else at most 10
    sizes = [4, 5, 6, 3, 2]
    most[0] = 0
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert 6 <= most[0] <= 10


def test_what_can_only_be_made_whole_is_made_once_and_dropped():
    made = []

    def make():
        made.append(1)
        return torch.arange(12.0).reshape(4, 3)

    rows = Whole(make)
    assert torch.equal(rows(2, 2), torch.arange(6.0, 12).reshape(2, 3)) and rows._matrix is not None
    assert torch.equal(rows(0, 2), torch.arange(6.0).reshape(2, 3))
    assert len(made) == 1 and rows._matrix is None
    assert rows(0, 4).shape == (4, 3) and len(made) == 2


def test_random_weights_are_finite_spread_and_a_function_of_seed_and_name():
    from tests.fixtures.small import SMALL

    for dtype in (torch.bfloat16, torch.float32):
        weights = random_weights(SMALL, dtype, 1)
        again, other = random_weights(SMALL, dtype, 1), random_weights(SMALL, dtype, 2)
        name = "model.embed_tokens.weight"
        values = weights[name].read()
        assert values.dtype == dtype and torch.equal(values, again[name].read())
        assert not torch.equal(values, other[name].read())
        assert not torch.equal(values, weights["lm_head.weight"].read())
        size = values.double().abs()
        assert size.min() >= 2**-7 and size.max() < 2**-3
        assert 0.4 < (values > 0).double().mean() < 0.6 and values.unique().numel() > 900


def test_an_hf_folder_is_read_through_its_index():
    source = HFWeights(TINY_A)
    expected = {}
    for path in TINY_A.glob("model-*.safetensors"):
        expected |= load_file(path)
    assert {name: weight.spec.shape for name, weight in source.weights.items()} == expected_tensors(
        source.model
    )
    assert all(torch.equal(source.weights[name].read(), tensor) for name, tensor in expected.items())
