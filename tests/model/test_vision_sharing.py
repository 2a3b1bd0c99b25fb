"""Rows whose images lie unevenly over the ranks: the same loss and gradients in every layout."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_vl.parallel.feature_plan import owners
from megatron_vl.parity.compare import relative
from megatron_vl.parity.reference import Batches
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.vision_share import share_views
from tests.fixtures.small import SMALL, make_documents
from tests.model.on_ranks import gradients, gradients_on_rank, run_of

# An image near the begin of a long document: its 4 features are in the first chunk of every zigzag.
SHORT, TEXT = make_documents(SMALL, [([(0, 0)], 20), ([], 60)])
LOCAL = [replace(SHORT, ids=np.append(SHORT.ids, TEXT.ids), targets=np.append(SHORT.targets, TEXT.targets))]
TWO_ROWS = make_documents(SMALL, [([(1, 2), (0, 0)], 6), ([(2, 1)], 17)])
LAYOUTS = [("cp4", "data"), ("tp2spcp2", "data"), ("tp2spcp2", "tensor"), ("tp2cp2", "data")]


def assert_near(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and set(found[1]) == set(expected[1])
    far = {name: relative(grad, expected[1][name]) for name, grad in found[1].items()}
    assert {name: value for name, value in far.items() if not value < 5e-5} == {}


@pytest.fixture(scope="module")
def plain(world):
    return {
        name: gradients(world, SMALL, "1", "data", docs)
        for name, docs in (("local", LOCAL), ("rows", TWO_ROWS))
    }


@pytest.mark.parametrize(("layout", "placement"), LAYOUTS)
def test_all_images_in_the_slice_of_one_rank(world, plain, layout, placement):
    config, batches, place = run_of(SMALL, layout, placement, LOCAL)
    (doc,) = LOCAL
    slots = np.flatnonzero(doc.ids == SMALL.tokens.im_patch)
    cp_alone = Layout(cp=place.cp)
    assert len(slots) and len(set(owners(slots, [0, batches.seq_length], cp_alone)[0])) == 1
    shares = share_views(doc.kinds, place.vision_size, view_costs(SMALL))
    assert [] in shares, "a rank without views, too"
    assert_near(gradients(world, SMALL, layout, placement, LOCAL), plain["local"])


@pytest.mark.parametrize(("layout", "placement"), LAYOUTS)
def test_two_dense_rows_in_one_micro_batch(world, plain, layout, placement):
    """Their views are shared out together, and each feature goes to its own row."""
    config, batches, place = run_of(SMALL, layout, placement, TWO_ROWS)
    together = Batches([[[[TWO_ROWS[0]], [TWO_ROWS[1]]]]], batches.seq_length, False, batches.placed)
    config = replace(config, train=replace(config.train, micro_batch_size=2))
    seen = world.run(place.world_size, gradients_on_rank, config, together)
    expected = gradients(world, SMALL, layout, placement, TWO_ROWS)
    assert_near(expected, plain["rows"])
    assert seen[0].losses[0] == pytest.approx(expected[0], rel=1e-6)
    apart = world.run(place.world_size, gradients_on_rank, config, batches)
    for rank, other in zip(seen, apart):
        far = {name: relative(rank.gradients[name], other.gradients[name]) for name in rank.gradients}
        assert {name: value for name, value in far.items() if not value < 5e-5} == {}
