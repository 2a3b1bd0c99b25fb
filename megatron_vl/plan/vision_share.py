"""Which rank encodes which view: shares of equal cost, of one micro-batch or of a whole step."""

from __future__ import annotations

from collections.abc import Sequence

CROP = 0
GLOBAL = 1


def share_views(kinds: Sequence[int], size: int, costs: tuple[int, int]) -> list[list[int]]:
    """Shares the views of one micro-batch, of all its rows, out over `size` ranks by cost.

    kinds: CROP or GLOBAL per view, in token-stream order. costs: of one crop and of one global view
    (`plan.cost.view_costs`); whole numbers, so that loaders and models on any machine agree. Returns for each rank
    the indices of its views: its crops first, then its globals, both ascending and contiguous among their kind.

    Longest processing time first (Graham 1969): the dearer kind is dealt out evenly, then each view of the other
    goes to the rank that has least. No share costs more than the mean plus one view, nor more than
    4/3 - 1 / (3 size) times the best possible; equal costs give shares that differ by at most one view.
    """
    if size < 1:
        raise ValueError(f"size = {size}: views are shared over at least one rank")
    if min(costs) < 1:
        raise ValueError(f"costs = {costs}: every view costs something")
    views = [[index for index, kind in enumerate(kinds) if kind == wanted] for wanted in (CROP, GLOBAL)]
    if sum(map(len, views)) != len(kinds):
        raise ValueError(f"kinds = {list(kinds)}: every view is CROP ({CROP}) or GLOBAL ({GLOBAL})")
    counts = share_counts(len(views[CROP]), len(views[GLOBAL]), size, costs)
    crops, globals_ = [crops for crops, _ in counts], [globals_ for _, globals_ in counts]
    return [
        mine + whole for mine, whole in zip(_blocks(views[CROP], crops), _blocks(views[GLOBAL], globals_))
    ]


def share_counts(
    num_crops: int, num_globals: int, size: int, costs: tuple[int, int]
) -> list[tuple[int, int]]:
    """(crops, global views) of each share of `share_views`: their order decides which a rank gets, not how many."""
    dear_is_global = costs[GLOBAL] >= costs[CROP]
    dear, cheap = (num_globals, num_crops) if dear_is_global else (num_crops, num_globals)
    ratio = max(costs) // min(costs)
    even, filling = _deal(dear, cheap, size, ratio)
    return list(zip(filling, even) if dear_is_global else zip(even, filling))


def share_step(
    kinds: Sequence[Sequence[int]], size: int, costs: tuple[int, int], together: bool
) -> list[list[list[int]]]:
    """The shares of every micro-batch of a step, ``[micro-batch][rank]``: indices within the micro-batch, as above.

    kinds: of the views of each micro-batch. together (placement `all`): the views of all micro-batches are shared out
    at once, so that a rank's sum over the step is the mean plus one view at most, and its share of a single
    micro-batch may be all of it or nothing. Otherwise each micro-batch is shared out by itself.
    """
    if not together:
        return [share_views(views, size, costs) for views in kinds]
    whole = share_views([kind for views in kinds for kind in views], size, costs)
    shares: list[list[list[int]]] = []
    first = 0
    for views in kinds:
        behind = first + len(views)
        shares.append([[view - first for view in mine if first <= view < behind] for mine in whole])
        first = behind
    return shares


def _deal(num_dear: int, num_cheap: int, size: int, ratio: int) -> tuple[list[int], list[int]]:
    """Views of the dearer and of the cheaper kind per rank; a dear one costs `ratio` cheap ones or a part more.

    The first `ahead` ranks have one dear view more. The others take ratio + 1 cheap views before one of the first is
    the cheapest again; from then on rank after rank takes one, those first ones first.
    """
    base, ahead = divmod(num_dear, size)
    dear = [base + (rank < ahead) for rank in range(size)]
    behind = size - ahead
    catching_up = min(num_cheap, (ratio + 1) * behind if ahead else 0)
    each, spare = divmod(catching_up, behind)
    rounds, left = divmod(num_cheap - catching_up, size)
    cheap = [rounds + (rank < left) for rank in range(size)]
    for rank in range(behind):
        cheap[ahead + rank] += each + (rank < spare)
    return dear, cheap


def _blocks(indices: list[int], counts: Sequence[int]) -> list[list[int]]:
    """Cuts `indices` into contiguous blocks of the given lengths."""
    blocks, start = [], 0
    for count in counts:
        blocks.append(indices[start : start + count])
        start += count
    return blocks
