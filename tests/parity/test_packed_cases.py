"""Packed rows equal their documents one by one: both exchanges of K and V, recompute, and that it can fail."""

from dataclasses import replace

import pytest

from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.rope import RopeScaling
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.parity.layouts import PACKED
from megatron_vl.parity.packed_cases import CASES, PackedCheck, case_documents
from megatron_vl.plan.sequence import zigzag
from tests.fixtures.paths import TINY_A
from tests.parity.faults import FaultyWorld

SHORT = (
    ("cp8", "odd_lengths"),
    ("cp8", "images_on_one_rank"),
    ("cp8ag", "spanning"),
    ("tp2spcp4ag", "odd_lengths"),
    ("pp2cp4", "masked_rank"),
    ("tp2pp2cp2sp", "spanning"),
)


@pytest.fixture(scope="module")
def checked():
    return PackedCheck(str(TINY_A), model_from_hf(TINY_A))


@pytest.mark.parametrize(("layout", "case"), SHORT)
def test_a_packed_row_is_its_documents(world, checked, layout, case):
    row = checked.row(world, layout, case)
    assert (row.status, row.rule) == ("ok", ""), row
    loss, gradients = checked.single[case]
    assert loss > 0 and gradients["vision_model.conv1.weight"].norm() > 0, "nothing flows through the images"


@pytest.mark.parametrize(
    ("layout", "decoder"), [("cp4", "selective"), ("cp4ag", "selective"), ("cp4", "full")]
)
def test_recompute_changes_no_packed_row(world, layout, decoder):
    recomputed = PackedCheck(str(TINY_A), model_from_hf(TINY_A), RecomputeConfig(decoder=decoder))
    row = recomputed.row(world, layout, "spanning")
    assert row.status == "ok", row


def test_an_extended_rope_is_the_same_on_every_stage_and_rank(world, checked):
    yarn = RopeScaling("yarn", None, 4.0, 16, beta_fast=4.0, beta_slow=0.5)
    text = replace(checked.model.text, rope_scaling=yarn)
    extended = PackedCheck(str(TINY_A), replace(checked.model, text=text))
    assert extended.row(world, "pp2cp4", "spanning").status == "ok"
    checked.row(world, "1", "spanning")
    assert abs(extended.single["spanning"][0] / checked.single["spanning"][0] - 1) > 1e-4, (
        "nothing was extended"
    )


FAULTS = (
    ("no_ring_gradients", "cp4", "spanning"),
    ("no_context_parallel_sum", "cp4ag", "spanning"),
    ("one_document", "cp2", "odd_lengths"),
)


@pytest.mark.parametrize(("fault", "layout", "case"), FAULTS)
def test_a_planted_fault_is_caught(world, checked, fault, layout, case):
    assert (
        checked.row(world, "1", case).status == "ok"
    )  # what is compared with is kept, and without the fault
    row = checked.row(FaultyWorld(world, fault), layout, case)
    assert row.status == "failed" and row.worst_grad > 1e-3


def test_the_cases_are_what_their_names_say(checked):
    """At 8 context-parallel ranks: who holds the scored positions and the feature rows."""
    patch = checked.model.tokens.im_patch

    def holders(case, wanted) -> set[int]:
        docs = case_documents(case, checked.model)
        found = set()
        for doc in docs:
            length = -(-len(doc.ids) // 16) * 16
            held = zigzag((0, length), 8)
            at = {i for i in range(len(doc.ids)) if wanted(doc, i)}
            found |= {rank for rank in range(8) if at & set(held[rank])}
        return found

    assert holders("images_on_one_rank", lambda doc, i: doc.ids[i] == patch) == {0}
    assert holders("masked_rank", lambda doc, i: doc.targets[i] != -100) == {0}
    assert holders("masked_rank", lambda doc, i: doc.ids[i] == patch) != {0}
    assert holders("spanning", lambda doc, i: True) == set(range(8))
    assert holders("text_only", lambda doc, i: doc.ids[i] == patch) == set()
    assert all(len(doc.ids) % 2 or len(doc.ids) < 4 for doc in case_documents("odd_lengths", checked.model))


@pytest.mark.slow
@pytest.mark.parametrize("layout", PACKED)
def test_every_case_in_every_layout(world, checked, layout):
    rows = list(checked.rows(world, [layout], list(CASES)))
    assert [(row.case, row.status) for row in rows] == [(case, "ok") for case in CASES]
