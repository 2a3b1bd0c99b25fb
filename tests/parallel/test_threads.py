"""A job leaves no process group behind: whatever still refers to one keeps threads that wake up 100 times a second."""

import os

import pytest

from tests.fixtures.small import SMALL, make_documents
from tests.model.on_ranks import run_of, steps_on_rank
from tests.parallel.on_ranks import forget_groups, keep_a_group, say

DOCS = make_documents(SMALL, [([(1, 2), (0, 0)], 6), ([], 9)])
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}


def threads(world) -> list[int]:
    """Of the first two ranks, between two jobs."""
    return [len(os.listdir(f"/proc/{process.pid}/task")) for process in world._world._processes[:2]]


@pytest.mark.parametrize("keys", [{}, OVERLAP])
def test_steps_leave_no_threads(world, keys):
    config, batches, _ = run_of(SMALL, "dp2", "data", DOCS, **keys)
    world.run(2, steps_on_rank, config, batches, 1)
    before = threads(world)
    for _ in range(2):
        world.run(2, steps_on_rank, config, batches, 1)
    assert threads(world) == before


def test_a_group_that_is_kept_is_seen(world):
    world.run(2, say, "rank")
    before = threads(world)
    world.run(2, keep_a_group)
    kept = threads(world)
    world.run(2, forget_groups)
    assert all(more > fewer for more, fewer in zip(kept, before))
    assert threads(world) == before
