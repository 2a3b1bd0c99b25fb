"""Losses, metrics and every gradient of actor and critic are those of one rank with one trajectory per row."""

import pytest
import torch

from megatron_vl.config.rl import PpoConfig
from megatron_vl.parity.compare import Assembled, relative
from tests.fixtures.small import SMALL
from tests.rl.faults import FaultyWorld
from tests.rl.made import make_trajectories, run_of
from tests.rl.on_ranks import ACTOR, CRITIC, gradients_on_rank, plain_on_rank, scores_on_rank

TRAJECTORIES = make_trajectories()
PPO = PpoConfig(kl_coef=0.1, entropy_coef=0.01, dual_clip=3.0, tis_clip=2.0, value_clip=0.3)
LAYOUTS = (
    "1",
    "tp2",
    "tp2sp",
    "cp2",
    "pp2",
    "dp2",
    "tp2pp2cp2sp",
    "dp2cp2tp2sp",
    "dp2tp2pp2",
    "pp2vpp2",
    "tp2pp2/all",
)
ALWAYS = ("dp2", "tp2pp2cp2sp", "tp2pp2/all")  # the others take minutes together


def some_slow(cases, quick):
    """Parameters, those that are not ``quick`` marked slow."""
    return [case if quick(case) else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def gradients(world, layout, kind, packed=True, rows=1, ppo=PPO):
    """(metrics, gradients under released names)."""
    config, place = run_of(layout, packed, ppo, rows)
    answers = world.run(place.world_size, gradients_on_rank, config, TRAJECTORIES, kind)
    assert all(answer.metrics == answers[0].metrics for answer in answers), "metrics are equal on every rank"
    assert len({answer.micro_batches for answer in answers}) == 1
    assembled = Assembled([answer.seen for answer in answers], place, None, [], SMALL)
    return answers[0].metrics, assembled.gradients()


@pytest.fixture(scope="module")
def alone(world):
    """By kind: one rank, dense rows, one trajectory each."""
    return {kind: gradients(world, "1", kind, packed=False) for kind in (ACTOR, CRITIC)}


def differences(found, expected):
    """What is not equal: metrics, then gradients."""
    metrics, gradients = found
    assert gradients.keys() == expected[1].keys() and metrics.keys() == expected[0].keys()
    far = {
        name: (value, expected[0][name])
        for name, value in metrics.items()
        if value != pytest.approx(expected[0][name], rel=2e-5, abs=2e-6, nan_ok=True)
    }
    distance = {name: relative(gradient, expected[1][name]) for name, gradient in gradients.items()}
    return far | {name: value for name, value in distance.items() if not value < 5e-5}


@pytest.mark.parametrize(
    ("layout", "kind"),
    some_slow([(name, kind) for name in LAYOUTS for kind in (ACTOR, CRITIC)], lambda case: case[0] in ALWAYS),
)
def test_packed_rows_in_every_layout(world, alone, layout, kind):
    found = gradients(world, layout, kind)
    assert differences(found, alone[kind]) == {}
    if kind == ACTOR:
        metrics = found[0]
        acting = ("clip_fraction_low", "clip_fraction_high", "tis_clip_fraction", "kl_loss", "mismatch_max")
        assert min(metrics[name] for name in acting) > 0, "what does not act is not tested"
        assert "lm_head.weight" in found[1] and "value_head.weight" not in found[1]
    else:
        assert 0 < found[0]["clip_fraction"] < 1
        assert "lm_head.weight" not in found[1] and found[1]["value_head.weight"].norm() > 0
    assert not [name for name in found[1] if "vision" in name or "projector" in name], "frozen is frozen"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ACTOR, CRITIC])
@pytest.mark.parametrize("layout", ["1", "tp2sp", "cp2", "dp2"])
def test_two_padded_rows_per_micro_batch(world, alone, layout, kind):
    assert differences(gradients(world, layout, kind, packed=False, rows=2), alone[kind]) == {}


def test_losses_and_gradients_are_those_of_formulas_and_plain_autograd(world, alone):
    """Whole logits, log_softmax, and the losses of `plain.py` token by token, one trajectory at a time."""
    config, _ = run_of("1", packed=False, ppo=PPO)
    for kind in (ACTOR, CRITIC):
        loss, gradients = world.run(1, plain_on_rank, config, TRAJECTORIES, kind)[0]
        metrics, expected = alone[kind]
        assert loss == pytest.approx(metrics["loss"], rel=1e-5)
        assert gradients.keys() <= expected.keys() and len(gradients) > 20
        far = {name: relative(gradient, expected[name]) for name, gradient in gradients.items()}
        assert {name: value for name, value in far.items() if not value < 5e-5} == {}


def scores(world, layout, packed=True):
    config, place = run_of(layout, packed)
    found = {}
    for answer in world.run(place.world_size, scores_on_rank, config, TRAJECTORIES):
        for name in ("logprobs", "values", "behind"):
            for number, values in getattr(answer, name).items():
                if (name, number) in found:
                    assert torch.equal(found[name, number], values), "ranks of a replica agree"
                found[name, number] = values
    return found


@pytest.mark.parametrize(
    "layout",
    ["cp2", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "cp2")],
)
def test_scores_come_back_in_the_order_of_the_response(world, layout):
    expected, found = scores(world, "1", packed=False), scores(world, layout)
    assert len(found) == 3 * len(TRAJECTORIES) and found.keys() == expected.keys()
    far = {key: (found[key] - expected[key]).abs().max().item() for key in found}
    assert {key: value for key, value in far.items() if not value < 1e-5} == {}


@pytest.mark.parametrize(
    ("fault", "layout", "kind"),
    some_slow(
        [
            ("mean_per_micro_batch", "1", ACTOR),
            ("value_mean_per_micro_batch", "dp2", CRITIC),
            ("arrays_are_not_cut", "cp2", ACTOR),
            ("arrays_are_not_cut", "cp2", CRITIC),
            ("masked_tokens_count", "1", CRITIC),
            ("head_is_not_summed", "tp2sp", CRITIC),
        ],
        lambda case: case[0] in ("mean_per_micro_batch", "masked_tokens_count"),
    ),
)
def test_planted_faults_are_found(world, alone, fault, layout, kind):
    assert differences(gradients(FaultyWorld(world, fault), layout, kind), alone[kind]) != {}


@pytest.mark.slow
def test_scores_in_the_order_of_ranks_are_found(world):
    faulty = scores(FaultyWorld(world, "scores_are_not_reordered"), "cp2")
    expected = scores(world, "1", packed=False)
    assert max((faulty[key] - expected[key]).abs().max().item() for key in faulty) > 1e-2
