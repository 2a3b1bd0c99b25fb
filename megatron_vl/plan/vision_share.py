"""Which rank encodes which view (placement `data`), and how features return to stream order."""

from __future__ import annotations

from collections.abc import Sequence

CROP = 0
GLOBAL = 1


def share_views(kinds: Sequence[int], size: int) -> list[list[int]]:
    """Shares the views of one micro-batch out over `size` ranks.

    kinds: CROP or GLOBAL per view, in token-stream order. Returns for each rank the indices of its views: its
    crops first, then its globals, both ascending.

    Crops and globals are each cut into contiguous blocks that differ by at most one view. The globals'
    remainder goes to the first ranks and the crops' remainder to the ranks after those, so that the total per
    rank differs by at most one as well, and no rank gets both a spare global and a spare crop while another
    gets neither.
    """
    if size < 1:
        raise ValueError(f"size = {size}: views are shared over at least one rank")
    crops = [index for index, kind in enumerate(kinds) if kind == CROP]
    globals_ = [index for index, kind in enumerate(kinds) if kind == GLOBAL]
    if len(crops) + len(globals_) != len(kinds):
        raise ValueError(f"kinds = {list(kinds)}: every view is CROP ({CROP}) or GLOBAL ({GLOBAL})")
    crop_blocks = _blocks(crops, size, first=len(globals_) % size)
    global_blocks = _blocks(globals_, size, first=0)
    return [mine + whole for mine, whole in zip(crop_blocks, global_blocks)]


def gathered_order(kinds: Sequence[int], size: int, tokens: tuple[int, int]) -> list[int]:
    """Where each feature row of the token stream lies in the concatenation of all ranks' features.

    tokens: feature rows of one crop and of one global view. The concatenation holds the ranks in order, and
    of each rank the views in the order of `share_views`. Returns `order` with `stream[i] =
    concatenation[order[i]]`.
    """
    start_of_view: dict[int, int] = {}
    row = 0
    for view in (index for rank_views in share_views(kinds, size) for index in rank_views):
        start_of_view[view] = row
        row += tokens[kinds[view]]
    return [start_of_view[view] + offset for view, kind in enumerate(kinds) for offset in range(tokens[kind])]


def _blocks(indices: list[int], size: int, first: int) -> list[list[int]]:
    """Cuts `indices` into `size` contiguous blocks; those from `first` on, cyclically, get one more."""
    base, spare = divmod(len(indices), size)
    larger = {(first + extra) % size for extra in range(spare)}
    blocks, start = [], 0
    for rank in range(size):
        end = start + base + (rank in larger)
        blocks.append(indices[start:end])
        start = end
    return blocks
