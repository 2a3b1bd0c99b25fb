"""Which rectangles of the released matrices a rank's piece of a parameter is: a pure function of rule and layout.

This is what makes a checkpoint independent of the layout. A parameter of ours is, tensor-parallel shard by shard, a
stack of row blocks of released matrices (query, key and value rows interleaved by group; gate above up); the
distributed optimizer then cuts the flattened shard at arbitrary points. Any such cut is a few rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_vl.checkpoint.hf_names import Rule
from megatron_vl.checkpoint.torch_dist import Pair, matrix_shape
from megatron_vl.config.model import ModelConfig


@dataclass(frozen=True)
class Fragment:
    """A rectangle of the released matrix ``name`` and where its values lie in the flattened local tensor.

    shape: of the whole matrix. runs: (start, count) in the local piece, counted from its own start; together they
    are the rectangle row by row.
    """

    name: str
    shape: Pair
    offset: Pair
    size: Pair
    runs: tuple[Pair, ...]

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The rectangle's values from the flat local piece; a view where they are contiguous."""
        parts = [values[start : start + count] for start, count in self.runs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.size)

    def scatter(self, rectangle: torch.Tensor, values: torch.Tensor) -> None:
        """Copy the rectangle's values into the flat local piece, converting to its dtype."""
        flat, done = rectangle.reshape(-1), 0
        for start, count in self.runs:
            values[start : start + count].copy_(flat[done : done + count])
            done += count


@dataclass(frozen=True)
class _Block:
    """``rows`` whole local rows from ``local`` on, which are rows of a released matrix from (row, column) on."""

    local: int
    rows: int
    name: str
    shape: Pair
    row: int
    column: int


def local_shape(rule: Rule, model: ModelConfig, size: int) -> Pair:
    """The matrix shape of a tensor-parallel shard, padded rows of a vocabulary included."""
    rows = sum(matrix_shape(shape)[0] for _, shape in rule.hf)
    columns = matrix_shape(rule.hf[0][1])[1]
    if rule.axis is None or size == 1:
        return rows, columns
    if rule.axis == 0:
        return (-(-rows // size) if rule.padded else rows // size), columns
    return rows, columns // size


def fragments(
    rule: Rule, model: ModelConfig, tp: Pair = (1, 0), start: int = 0, stop: int | None = None
) -> list[Fragment]:
    """Rectangles of the values ``[start, stop)`` of the flattened shard of tensor-parallel rank ``tp[1]`` of
    ``tp[0]``. Padded rows of a vocabulary belong to none.
    """
    size, rank = tp if rule.axis is not None else (1, 0)
    rows, columns = local_shape(rule, model, size)
    stop = rows * columns if stop is None else stop
    pieces: dict[tuple, list] = {}
    for block in _blocks(rule, model, size, rank):
        for row, column, count, width, at in _rectangles(block, columns, start, stop):
            # one after the other in the released matrix: one rectangle, though apart in ours
            key = (block.name, column, width)
            last = pieces.get(key, [None])[-1]
            if last is not None and last[0] + last[1] == row:
                last[1] += count
                last[2].append((at, count * width))
            else:
                pieces.setdefault(key, []).append([row, count, [(at, count * width)], block.shape])
    return [
        Fragment(name, shape, (row, column), (count, width), _merged(runs))
        for (name, column, width), found in pieces.items()
        for row, count, runs, shape in found
    ]


def _merged(runs: Sequence[Pair]) -> tuple[Pair, ...]:
    merged: list[Pair] = []
    for start, count in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((start, count))
    return tuple(merged)


def _blocks(rule: Rule, model: ModelConfig, size: int, rank: int) -> Iterator[_Block]:
    """The row blocks of a shard, released matrix by released matrix."""
    matrices = [(name, matrix_shape(shape)) for name, shape in rule.hf]
    if rule.kind in ("qkv", "stacked_qkv"):
        yield from _qkv_blocks(rule, model, matrices, size, rank)
        return
    at = 0
    for name, (rows, columns) in matrices:
        if rule.axis == 1:
            yield _Block(at, rows, name, (rows, columns), 0, rank * (columns // size))
            at += rows
            continue
        share = -(-rows // size) if rule.padded else rows // size
        first = min(rank * share, rows)
        yield _Block(at, min(share, rows - first), name, (rows, columns), first, 0)
        at += share


def _qkv_blocks(
    rule: Rule, model: ModelConfig, matrices: Sequence[tuple[str, Pair]], size: int, rank: int
) -> Iterator[_Block]:
    """Ours: per group its query rows, key rows, value rows. Released: q, k and v apart, or one above the other.

    With more ranks than groups a shard is a part of a group.
    """
    if rule.kind == "stacked_qkv":
        groups = model.vision.num_attention_heads
        (name, shape) = matrices[0]
        third = shape[0] // 3
        parts = [(name, shape, n * third, third // groups) for n in range(3)]
    else:
        groups = model.text.num_query_groups
        parts = [(name, shape, 0, shape[0] // groups) for name, shape in matrices]
    per_group = sum(rows for *_, rows in parts)
    share = groups * per_group // size
    before = 0
    for name, shape, first, rows in parts:
        for group in range(groups):
            start = group * per_group + before
            low, high = max(start, rank * share), min(start + rows, (rank + 1) * share)
            if low < high:
                row = first + group * rows + low - start
                yield _Block(low - rank * share, high - low, name, shape, row, 0)
        before += rows


def _rectangles(
    block: _Block, columns: int, start: int, stop: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """(released row, column, rows, columns, position in the piece) of the part of a block within [start, stop)."""
    low = max(start, block.local * columns)
    high = min(stop, (block.local + block.rows) * columns)
    while low < high:
        row, column = divmod(low, columns)
        if column or high - low < columns:  # the rest of a row that was cut, or the beginning of one
            count, width = 1, min(columns - column, high - low)
        else:
            count, width = (high - low) // columns, columns
        yield block.row + row - block.local, block.column + column, count, width, low - start
        low += count * width


def replica_writers(sizes: Sequence[tuple[int, bool]], tp: int, copies: int) -> list[Pair]:
    """Who writes each parameter of a pipeline rank: (tensor-parallel rank, or -1 for each its shard; copy).

    sizes: (values, is it sharded over TP) per parameter. copies: ranks over DP x CP that hold the same. The
    least loaded rank takes the next one, so that all write about the same.
    """
    loads = [[0] * copies for _ in range(tp)]
    chosen = []
    for values, sharded in sizes:
        if sharded:
            copy = min(range(copies), key=lambda c: sum(loads[t][c] for t in range(tp)))
            for t in range(tp):
                loads[t][copy] += values
            chosen.append((-1, copy))
        else:
            t, copy = min(((t, c) for c in range(copies) for t in range(tp)), key=lambda p: loads[p[0]][p[1]])
            loads[t][copy] += values
            chosen.append((t, copy))
    return chosen
