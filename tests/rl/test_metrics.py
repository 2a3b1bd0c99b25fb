"""Metrics from sums: equal to those over all tokens at once, whatever the cut; alarms."""

import math

import numpy as np
import pytest
import torch

from megatron_vl.config.rl import PpoConfig, RolloutConfig
from megatron_vl.rl.metrics import (
    POLICY,
    VALUE,
    mismatch_alarms,
    policy_metrics,
    policy_report,
    value_metrics,
    value_report,
)
from megatron_vl.rl.ppo_loss import PolicyTokens, policy_terms, value_terms


def drawn(count, seed=0):
    rng = np.random.default_rng(seed)
    logprobs, advantages = rng.normal(-1.5, 0.5, count), rng.normal(0.3, 1.2, count)
    old, sampler = logprobs + rng.normal(0, 0.2, count), logprobs + rng.normal(0, 0.1, count)
    return [torch.tensor(x, dtype=torch.float32) for x in (logprobs, advantages, sampler, old)]


def reduced(reports, fields):
    stacked = torch.stack(reports)
    return torch.cat([stacked[:, : fields.summed].sum(0), stacked[:, fields.summed :].amax(0)])


def policy(parts, config):
    reports = []
    for part in parts:
        tokens = PolicyTokens(*part, entropy=torch.ones_like(part[0]))
        reports.append(policy_report(tokens, policy_terms(tokens, config)))
    return policy_metrics(reduced(reports, POLICY))


def test_policy_metrics_are_those_of_all_tokens():
    whole = drawn(301)
    pieces = [[x[a:b] for x in whole] for a, b in ((0, 5), (5, 5), (5, 150), (150, 301))]
    config = PpoConfig(tis_clip=1.1)
    found, cut = policy([whole], config), policy(pieces, config)
    assert cut == pytest.approx(found, rel=1e-9, abs=1e-12)
    logprobs, advantages, sampler, old = (x.double().numpy() for x in whole)
    ratio, weight = np.exp(logprobs - old), np.exp(old - sampler)
    expected = {
        "tokens": 301,
        "approx_kl_k1": (old - logprobs).mean(),
        "approx_kl_k3": (ratio - 1 - np.log(ratio)).mean(),
        "clip_fraction_low": ((ratio < 0.8) & (advantages < 0)).mean(),
        "clip_fraction_high": ((ratio > 1.2) & (advantages > 0)).mean(),
        "ratio_max": ratio.max(),
        "ratio_min": ratio.min(),
        "advantage_mean": advantages.mean(),
        "advantage_std": advantages.std(),
        "tis_weight": np.minimum(weight, 1.1).mean(),
        "tis_clip_fraction": (weight > 1.1).mean(),
        "ess": weight.sum() ** 2 / (301 * (weight**2).sum()),
        "mismatch_mean": np.abs(old - sampler).mean(),
        "mismatch_max": np.abs(old - sampler).max(),
        "mismatch_k1": (sampler - old).mean(),
        "mismatch_k3": (weight - 1 - np.log(weight)).mean(),
        "mismatch_k3_reverse": (weight * np.log(weight) - weight + 1).mean(),
        "entropy": 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for share, name in ((0.01, "ratio_p01"), (0.5, "ratio_p50"), (0.99, "ratio_p99")):
        assert found[name] == pytest.approx(np.quantile(ratio, share, method="inverted_cdf"), rel=0.006)


def test_value_metrics_are_those_of_all_tokens():
    rng = np.random.default_rng(5)
    returns, old = rng.random(200), rng.normal(0.5, 0.2, 200)
    values = old + rng.normal(0, 0.3, 200)
    whole = [torch.tensor(x, dtype=torch.float32) for x in (values, old, returns)]
    reports = []
    for part in ([x[:20] for x in whole], [x[20:] for x in whole]):
        reports.append(value_report(*part, value_terms(*part, 0.2)))
    found = value_metrics(reduced(reports, VALUE))
    assert found["explained_variance"] == pytest.approx(1 - (returns - old).var() / returns.var(), rel=1e-5)
    assert found["value_mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert found["error_max"] == pytest.approx(np.abs(returns - old).max(), rel=1e-5)


def test_equal_returns_explain_nothing():
    same = [torch.full((5,), 0.5)] * 3
    found = value_metrics(value_report(*same, value_terms(*same, None)))
    assert math.isnan(found["explained_variance"]) and found["loss"] == 0


def test_no_token_at_all():
    nothing = [torch.zeros(0)] * 4
    found = policy([nothing], PpoConfig())
    assert found["tokens"] == 0 and found["loss"] == 0 and math.isnan(found["ratio_p50"])


def test_alarms_name_value_limit_and_key():
    rollout = RolloutConfig(alarm_mean=0.02, alarm_max=0.5, alarm_kl=1e-3)
    quiet = {"mismatch_mean": 0.01, "mismatch_max": 0.2, "mismatch_k3": 1e-4}
    assert mismatch_alarms(quiet, rollout) == []
    (alarm,) = mismatch_alarms(quiet | {"mismatch_max": 0.75}, rollout)
    assert alarm.startswith("mismatch_max = 0.75 is above rl.rollout.alarm_max = 0.5: sampler and trainer")
    assert len(mismatch_alarms(dict.fromkeys(quiet, float("nan")), rollout)) == 3
    assert mismatch_alarms(quiet | {"mismatch_max": 9.0}, RolloutConfig()) == []
