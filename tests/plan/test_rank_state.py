"""Which ranks are looked at, and that nothing that differs goes unnamed."""

from dataclasses import fields, replace

import pytest

from megatron_vl.errors import ConfigError
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.rank_state import RankState, chosen_ranks, differences, dry_microbatches
from megatron_vl.plan.tensors import Weight

STATE = RankState(
    weights=((Weight("a", 3, "vision"),),), buffers=0, weight_bytes=6, gradient_bytes=12, optimizer_bytes=40,
    results=((8, 1, 4),), received=(((8, 1, 4), 2, 2),), sent=(((8, 1, 4), 2, 2),),
)  # fmt: skip
OTHERS = {
    "weights": ((Weight("a", 4, "vision"),),),
    "buffers": 1,
    "weight_bytes": 7,
    "gradient_bytes": 13,
    "optimizer_bytes": 41,
    "results": ((4, 1, 4),),
    "received": (),
    "sent": (((8, 1, 4), 4, 2),),
}


def test_equal_states():
    assert list(differences(STATE, replace(STATE))) == []


@pytest.mark.parametrize("name", [field.name for field in fields(RankState)])
def test_every_field_is_compared(name):
    found = list(differences(STATE, replace(STATE, **{name: OTHERS[name]})))
    assert found and all("planned" in line and "built" in line for line in found)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ((), "chunks: planned 1, built 0"),
        (((Weight("b", 3, "vision"),),), "chunk 0: planned a of 3 elements, built b of 3 there"),
        (((*STATE.weights[0], Weight("b", 1, "decoder")),), "chunk 0: planned 1 weights, built 2"),
    ],
)
def test_weights_that_differ(weights, told):
    assert told in list(differences(STATE, replace(STATE, weights=weights)))


def test_chosen_ranks():
    assert chosen_ranks("17", 1024) == [17] and chosen_ranks("0,511,1023", 1024) == [0, 511, 1023]
    assert chosen_ranks("sample:1", 8) == [0] and chosen_ranks("sample:99", 4) == [0, 1, 2, 3]


def test_a_sample_has_first_last_and_every_stage():
    for pp in (1, 2, 4, 8, 16):
        layout = Layout(tp=2, cp=4, dp=64 // pp, pp=pp)
        for count in (2, 3, 16, 22):
            ranks = chosen_ranks(f"sample:{count}", 512)
            assert len(set(ranks)) == count and ranks[0] == 0 and ranks[-1] == 511
            assert count < pp or {layout.coords(rank).pp for rank in ranks} == set(range(pp))


@pytest.mark.parametrize("text", ["8", "1,8", "", "1,", "-1", "sample", "sample:0", "one"])
def test_no_such_rank(text):
    with pytest.raises(ConfigError, match="--rank"):
        chosen_ranks(text, 8)


def test_the_dry_step_fills_the_pipeline():
    assert dry_microbatches(Layout(), 32) == 1 and dry_microbatches(Layout(pp=4), 3) == 3
    assert dry_microbatches(Layout(pp=4), 32) == 4 and dry_microbatches(Layout(pp=4, vpp=2), 32) == 8
