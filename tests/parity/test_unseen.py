"""Models that nobody tuned the code on, against the independent float64 model, in layouts of every kind."""

import pytest

from megatron_vl.parity.check import make_cases, refusal
from megatron_vl.parity.layouts import ALL
from tests.fixtures import unseen
from tests.parity.checking import check, setting_of

MODELS = (unseen.six_heads, unseen.three_layers, unseen.no_token_table)
# What truly does not divide; every other combination must run.
REFUSED = {
    "six_heads": {
        "tp4sp": "parallel.tensor_model_parallel_size = 4: must divide model.text.num_attention_heads = 6",
    },
    "three_layers": {},
    "no_token_table": dict.fromkeys(
        ("pp4", "pp2vpp2"), "model.text.num_layers = 1: too few layers for the 4 stages"
    ),
}
CASES = {
    "six_heads": (
        ("tp2sp", "tensor", "packed"), ("pp4", "data", "dense"), ("pp2vpp2", "data", "dense"),
        ("cp4", "data", "packed"), ("dp2", "data", "dense"), ("tp2pp2cp2sp", "data", "packed"),
    ),
    "three_layers": (
        ("tp4sp", "data", "dense"), ("pp2vpp2", "tensor", "packed"), ("dp2cp2tp2sp", "tensor", "dense"),
    ),
    "no_token_table": (("dp2tp2pp2", "data", "packed"), ("cp2", "tensor", "dense")),
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return {make.__name__: setting_of(make(tmp_path_factory.mktemp(make.__name__))) for make in MODELS}


@pytest.mark.parametrize(
    ("model", "layout", "placement", "form"),
    [(model, *case) for model, cases in CASES.items() for case in cases],
)
def test_unseen_model(world, settings, model, layout, placement, form):
    row = check(world, settings[model], layout, placement, form)
    assert (row.status, row.rule) == ("ok", "")
    assert 0 < row.worst_grad < 1e-5


@pytest.mark.parametrize("model", REFUSED)
def test_only_true_rules_refuse(settings, model):
    """Placement data: 14 or more of the 16 layouts are left."""
    found = {}
    for case in make_cases("all", "data", "dense,packed", "cpu"):
        rule = refusal(case, settings[model])
        if rule:
            found.setdefault(case.named.name, rule)
    assert set(found) == set(REFUSED[model]) and len(ALL) - len(found) >= 14
    for name, rule in REFUSED[model].items():
        assert found[name].startswith(rule)


def test_a_tower_of_two_heads_refuses_tp4_in_placement_tensor_only(tmp_path):
    setting = setting_of(unseen.six_heads(tmp_path))
    rules = {
        placement: refusal(make_cases("tp4sp", placement, "dense", "cpu")[0], setting)
        for placement in ("data", "tensor")
    }
    assert "model.vision" not in rules["data"]
    assert "must divide model.vision.num_attention_heads = 2" in rules["tensor"]


@pytest.mark.slow
@pytest.mark.parametrize("model", REFUSED)
def test_unseen_model_in_all_layouts(world, settings, model):
    for case in make_cases("all", "data,tensor", "dense,packed", "cpu"):
        if refusal(case, settings[model]):
            continue
        placement = case.named.parallel.vision_placement
        row = check(world, settings[model], case.named.name, placement, "packed" if case.packed else "dense")
        assert (row.layout, row.status, row.rule) == (case.named.name, "ok", "")
