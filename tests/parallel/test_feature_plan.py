"""The exchange of features on paper: all ranks simulated, no process started."""

import itertools
import time

import numpy as np
import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.parallel.feature_plan import ExchangePlan, owners, plan_exchange
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.sequence import row_multiple, zigzag
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_views

TOKENS = (2, 5)
LAYOUTS = [
    Layout(tp=tp, cp=cp, sp=sp, placement=placement)
    for tp, cp in [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4), (3, 2)]
    for sp in ((False, True) if tp > 1 else (False,))
    for placement in (("data", "tensor") if tp > 1 else ("data",))
] + [
    Layout(tp=tp, cp=cp, pp=pp, sp=sp, placement="all")
    for tp, cp, pp in [(1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 2), (3, 2, 3), (2, 2, 1)]
    for sp in ((False, True) if tp > 1 else (False,))
]
C, G = CROP, GLOBAL
# documents of views, and where the images of a document begin: as a share of the document
ROWS = {
    "images everywhere": ([[C, C, G], [], [G, C, C, C, C, G], [C, G, G]], 0.3),
    "one view": ([[], [G]], 0.5),
    "all images at the end": ([[C, C, C, G, G]], 1.0),
    "all images at the begin": ([[C] * 9 + [G] * 3, []], 0.0),
}


def row_of(name: str, layout: Layout) -> tuple[list[int], np.ndarray, list[int]]:
    """Kinds, positions of the features and document boundaries of one packed row."""
    documents, where = ROWS[name]
    multiple, kinds, positions, bounds = row_multiple(layout.tp, layout.cp, layout.sp), [], [], [0]
    for views in documents:
        features = sum(TOKENS[kind] for kind in views)
        length = -(-(features + 40) // multiple) * multiple
        first = bounds[-1] + int(where * (length - features))
        positions += range(first, first + features)
        bounds.append(bounds[-1] + length)
        kinds += views
    return kinds, np.array(positions), bounds


def plans(kinds, slots, bounds, layout, tokens=TOKENS, costs=(2, 5)) -> list[ExchangePlan]:
    shares = share_views(kinds, layout.vision_size, costs)
    ranks = range(layout.vision_size if layout.tower_beside else layout.tp * layout.cp)
    return [plan_exchange(kinds, shares, tokens, slots, bounds, layout, rank) for rank in ranks]


def encoded(kinds, layout, costs=(2, 5)) -> list[list[int]]:
    """Feature rows (numbers in the stream) of every rank, in its local order."""
    first = np.cumsum([0, *(TOKENS[kind] for kind in kinds)])
    shares = share_views(kinds, layout.vision_size, costs)
    of_share = [[first[v] + i for v in views for i in range(TOKENS[kinds[v]])] for views in shares]
    if layout.tower_beside:
        return of_share
    ranks = range(layout.tp * layout.cp)
    return [of_share[rank if layout.placement == "data" else rank // layout.tp] for rank in ranks]


def exchanged(
    leaving: list[np.ndarray], sent: list[list[int]], received: list[list[int]]
) -> list[np.ndarray]:
    """What an all-to-all with these counts does."""
    ranks = range(len(leaving))
    for source, target in itertools.product(ranks, ranks):
        assert sent[source][target] == received[target][source]
    cut = [np.split(rows, np.cumsum(counts)[:-1]) for rows, counts in zip(leaving, sent)]
    return [np.concatenate([cut[source][target] for source in ranks]) for target in ranks]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_every_owner_gets_its_rows_and_every_encoder_one_gradient_of_each(name, layout):
    kinds, positions, bounds = row_of(name, layout)
    planned = plans(kinds, (np.zeros_like(positions), positions), bounds, layout)
    mine = [np.array(rows, dtype=np.int64) for rows in encoded(kinds, layout)]
    got = exchanged(
        [rows[plan.send] for rows, plan in zip(mine, planned)],
        [plan.send_counts for plan in planned],
        [plan.receive_counts for plan in planned],
    )
    held = zigzag(bounds, layout.cp)
    for rank, (rows, plan) in enumerate(zip(got, planned)):
        if rank >= layout.tp * layout.cp:  # behind the first stage: encodes, owns nothing
            assert not len(rows) and not len(plan.slot_rows) and not sum(plan.give_counts)
            continue
        cp, tp = divmod(rank, layout.tp)
        slice_ = held[cp]
        if layout.sp:
            length = len(slice_) // layout.tp
            slice_ = slice_[tp * length : (tp + 1) * length]
        wanted = {position: row for row, position in enumerate(positions) if position in set(slice_)}
        assert {slice_[local]: row for local, row in zip(plan.slot_positions, rows)} == wanted
        assert len(rows) == len(wanted)
    # copies of an owner hold equal gradients; a value per row shows that each comes back once, and to its row
    back = exchanged(
        [rows[plan.give_back] for rows, plan in zip(got, planned)],
        [plan.give_counts for plan in planned],
        [plan.get_counts for plan in planned],
    )
    for rows, grads, plan in zip(mine, back, planned):
        assert sorted(plan.returned) == list(range(len(rows)))
        assert np.array_equal(rows[plan.returned], grads)


@pytest.mark.parametrize("layout", [Layout(tp=2, cp=2, sp=sp) for sp in (False, True)], ids=str)
def test_rows_of_a_dense_micro_batch_share_their_views(layout):
    """Two rows of 32: the views of both are shared out together, and a feature goes to its own row."""
    kinds, rows = [C, G, C, C, C, G], np.repeat([0, 1], [7, 11])
    positions = np.concatenate([np.arange(3, 10), np.arange(20, 31)])
    planned = plans(kinds, (rows, positions), [0, 32], layout)
    assert all(len(plan.returned) > 0 for plan in planned)
    held = zigzag([0, 32], 2)
    seen = set()
    for rank, plan in enumerate(planned):
        offset = (rank % 2) * 8 if layout.sp else 0
        seen |= {(r, held[rank // 2][p + offset]) for r, p in zip(plan.slot_rows, plan.slot_positions)}
    assert seen == set(zip(rows, positions))


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_owners_are_those_of_the_zigzag(cp):
    bounds = [0, 24, 24, 72, 96]
    held = zigzag(bounds, cp)
    owner, local = owners(np.arange(96), bounds, Layout(cp=cp))
    assert all(held[rank][at] == position for position, (rank, at) in enumerate(zip(owner, local)))


@pytest.mark.parametrize(
    ("tp", "cp"), [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (8, 1), (2, 4), (1, 8)]
)
def test_memory_for_images_and_features_falls_with_the_ranks(tp, cp):
    """A row of 32,768 tokens, one document of 40 images with 7 views each, in the released model's sizes."""
    model, layout = ModelConfig(), Layout(tp=tp, cp=cp, sp=tp > 1)
    vision, count = model.vision, 40
    kinds = ([CROP] * 6 + [GLOBAL]) * count
    tokens = (vision.crop_tokens, vision.global_tokens)
    per_image = 6 * tokens[CROP] + tokens[GLOBAL]
    positions = np.concatenate([image * 816 + 60 + np.arange(per_image) for image in range(count)])
    slots = (np.zeros_like(positions), positions)
    costs = view_costs(model)
    shares = share_views(kinds, layout.vision_size, costs)
    planned = plans(kinds, slots, [0, 32_768], layout, tokens, costs)
    pixels = [3 * side * side for side in (vision.crop_size, vision.image_size)]
    for per_view in (pixels, tokens):  # pixels, and features before the exchange
        most = max(sum(per_view[kinds[view]] for view in share) for share in shares)
        whole = sum(per_view[kind] for kind in kinds)
        assert whole / (tp * cp) <= most <= whole / (tp * cp) + per_view[GLOBAL]
    received = [len(plan.slot_rows) for plan in planned]
    assert sum(received) == len(positions)
    assert max(received) <= len(positions) / (tp * cp) + tokens[GLOBAL]
    # what leaves is what came in: no rank sends or holds a row twice
    assert all(sum(plan.send_counts) == len(plan.returned) for plan in planned)
    # a row of documents that all begin with text leaves some ranks without images, none with more than its positions
    bounds = [image * 816 for image in range(count + 1)] + [32_768]
    packed = plans(kinds, slots, bounds, layout, tokens, costs)
    assert max(len(plan.slot_rows) for plan in packed) <= 32_768 / (tp * cp)


def test_without_sequence_parallelism_features_fall_with_the_context_parallel_ranks_alone():
    kinds, positions, bounds = row_of("images everywhere", Layout(tp=2, cp=2, sp=True))
    slots = (np.zeros_like(positions), positions)
    planned = plans(kinds, slots, bounds, Layout(tp=2, cp=2))
    received = [len(plan.slot_rows) for plan in planned]
    assert received[0] == received[1] and received[2] == received[3]
    assert received[0] + received[2] == len(positions)


def test_a_full_row_is_planned_quickly():
    model, layout = ModelConfig(), Layout(tp=8, cp=4, sp=True)
    vision = model.vision
    kinds = ([CROP] * 12 + [GLOBAL]) * 100
    tokens = (vision.crop_tokens, vision.global_tokens)
    length = 100 * (12 * tokens[CROP] + tokens[GLOBAL])
    assert length < 131_072
    positions = np.arange(500, 500 + length)
    slots, bounds = (np.zeros_like(positions), positions), [0, 131_072]
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        shares = share_views(kinds, layout.vision_size, view_costs(model))
        plan_exchange(kinds, shares, tokens, slots, bounds, layout, 5)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.05  # a few milliseconds when nothing else runs
