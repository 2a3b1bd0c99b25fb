"""What overlaps where nothing is said, and how large a bucket is."""

import pytest

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.plan.overlap import Overlap, bucket_elements, overlap_of


@pytest.mark.parametrize(
    ("keys", "copies", "on_cpu", "expected"),
    [
        ({}, 8, False, Overlap(True, True)),
        ({}, 8, True, Overlap(False, False)),
        ({}, 1, False, Overlap(False, False)),  # nothing to sum
        ({"use_distributed_optimizer": False}, 8, False, Overlap(True, False)),
        ({"overlap_grad_reduce": False}, 8, False, Overlap(False, False)),
        ({"overlap_param_gather": False}, 8, False, Overlap(True, False)),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, 2, True, Overlap(True, True)),
        ({"overlap_grad_reduce": True}, 2, True, Overlap(True, False)),
    ],
)
def test_overlap(keys, copies, on_cpu, expected):
    assert overlap_of(ParallelConfig(**keys), copies, on_cpu) == expected


def test_buckets():
    assert bucket_elements(ParallelConfig(), 8, on_cpu=False) == 40_000_000
    assert bucket_elements(ParallelConfig(), 64, on_cpu=False) == 64_000_000
    assert bucket_elements(ParallelConfig(ddp_bucket_size=100), 64, on_cpu=False) == 100
    assert bucket_elements(ParallelConfig(ddp_bucket_size=100), 64, on_cpu=True) is None
