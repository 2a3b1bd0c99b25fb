"""A job leaves no process group behind: whatever still refers to one keeps threads that wake up 100 times a second."""

import pytest

from tests.fixtures.small import SMALL, make_documents
from tests.model.on_ranks import run_of, steps_on_rank
from tests.parallel.on_ranks import forget_groups, keep_groups, say

DOCS = make_documents(SMALL, [([(1, 2), (0, 0)], 6), ([], 9)])
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}


@pytest.mark.parametrize("keys", [{}, OVERLAP])
def test_steps_leave_no_threads(world, keys):
    config, batches, _ = run_of(SMALL, "dp2", "data", DOCS, **keys)
    world.run(2, steps_on_rank, config, batches, 1)
    before = world.threads()[:2]
    for _ in range(2):
        world.run(2, steps_on_rank, config, batches, 1)
    assert world.threads()[:2] == before


def test_a_group_that_is_kept_is_seen(world):
    world.run(2, say, "rank")
    before = world.threads()[:2]
    world.run(2, keep_groups, 1)
    kept = world.threads()[:2]
    world.run(2, forget_groups)
    assert all(more > fewer for more, fewer in zip(kept, before))
    assert world.threads()[:2] == before


def test_a_job_that_leaves_many_is_refused(world):
    with pytest.raises(AssertionError, match="keep_groups has left process groups behind"):
        world.run(2, keep_groups, 10)
    world.run(2, forget_groups)
