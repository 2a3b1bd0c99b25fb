"""Rectangles of released matrices: every cut of every shard, put together, is the released tensor, each value once."""

import random
from dataclasses import replace

import pytest
import torch

from megatron_vl.checkpoint.fragments import fragments, local_shape, replica_writers
from megatron_vl.checkpoint.hf_names import DECODER, all_rules, shard, to_ours
from megatron_vl.checkpoint.torch_dist import matrix_shape
from tests.fixtures.small import SMALL

ODD_VOCABULARY = replace(SMALL, text=replace(SMALL.text, vocab_size=61))


def numbered(model) -> dict[str, torch.Tensor]:
    """Released tensors whose every value is another whole number."""
    tensors, count = {}, 0
    for rule in all_rules(model):
        for name, shape in rule.hf:
            size = torch.Size(shape).numel()
            tensors[name] = torch.arange(count, count + size, dtype=torch.float64).reshape(shape)
            count += size
    return tensors


def cuts(length: int, seed: int) -> list[tuple[int, int]]:
    """The range [0, length) in up to four pieces, cut anywhere."""
    marks = sorted(random.Random(seed).sample(range(1, length), min(3, length - 1)))
    return list(zip([0, *marks], [*marks, length]))


@pytest.mark.parametrize("model", [SMALL, ODD_VOCABULARY], ids=["small", "odd vocabulary"])
@pytest.mark.parametrize("tp", [1, 2, 4])  # 4: more ranks than groups
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_the_pieces_of_all_ranks_are_the_released_tensors(model, tp, cut):
    tensors = numbered(model)
    rebuilt = {n: torch.full(matrix_shape(t.shape), -1.0, dtype=torch.float64) for n, t in tensors.items()}
    for number, rule in enumerate(all_rules(model)):
        whole = to_ours(rule, [tensors[name] for name, _ in rule.hf], model)
        for rank in range(tp if rule.axis is not None else 1):
            local = shard(rule, whole, tp, rank)
            rows, columns = local_shape(rule, model, tp)
            assert local.numel() == rows * columns, rule.ours
            flat = local.reshape(-1)
            for start, stop in cuts(len(flat), number) if cut else [(0, len(flat))]:
                for part in fragments(rule, model, (tp, rank), start, stop):
                    assert part.shape == matrix_shape(tensors[part.name].shape)
                    (row, column), (count, width) = part.offset, part.size
                    target = rebuilt[part.name][row : row + count, column : column + width]
                    assert (target == -1).all(), f"{part.name}: a value belongs to two pieces"
                    target.copy_(part.gather(flat[start:stop]))
    for name, tensor in tensors.items():
        assert torch.equal(rebuilt[name], tensor.reshape(rebuilt[name].shape)), name


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_scatter_is_the_inverse_of_gather(tp):
    tensors = numbered(SMALL)
    for number, rule in enumerate(all_rules(SMALL)):
        local = shard(rule, to_ours(rule, [tensors[n] for n, _ in rule.hf], SMALL), tp, tp - 1).reshape(-1)
        for start, stop in cuts(len(local), number):
            piece = torch.full((stop - start,), -1.0, dtype=torch.float64)
            for part in fragments(rule, SMALL, (tp, tp - 1), start, stop):
                (row, column), (count, width) = part.offset, part.size
                stored = tensors[part.name].reshape(part.shape)
                part.scatter(stored[row : row + count, column : column + width], piece)
            assert torch.equal(piece, local[start:stop]), rule.ours


def test_a_whole_shard_is_one_rectangle_per_released_tensor():
    """Interleaved groups do not become many small ones."""
    for rule in all_rules(SMALL):
        expected = 3 if rule.kind == "stacked_qkv" else len(rule.hf)
        assert len(fragments(rule, SMALL, (2, 1))) == expected or rule.kind == "stacked_qkv", rule.ours
        assert len(fragments(rule, SMALL)) == len(rule.hf), rule.ours


def test_padded_rows_of_a_vocabulary_are_in_no_rectangle():
    rule = next(r for r in all_rules(ODD_VOCABULARY) if r.padded)
    sizes = [[part.size for part in fragments(rule, ODD_VOCABULARY, (4, rank))] for rank in range(4)]
    width = ODD_VOCABULARY.text.hidden_size
    assert sizes == [[(16, width)], [(16, width)], [(16, width)], [(13, width)]]


def test_writers_share_the_work_and_shards_are_written_by_their_ranks():
    rules = [r for r in all_rules(SMALL) if r.part == DECODER]
    sizes = [(torch.Size(local_shape(r, SMALL, 2)).numel(), r.axis is not None) for r in rules]
    chosen = replica_writers(sizes, tp=2, copies=3)
    loads = torch.zeros(2, 3)
    for (values, sharded), (rank, copy) in zip(sizes, chosen):
        assert (rank == -1) == sharded
        for t in range(2) if sharded else [rank]:
            loads[t, copy] += values
    assert loads.max() <= loads.mean() + max(values for values, _ in sizes)
