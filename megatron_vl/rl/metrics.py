"""Metrics of an update as sums, maxima and counts that add up over micro-batches and ranks; formulas in docs/rl.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_vl.config.rl import RolloutConfig
from megatron_vl.rl.ppo_loss import PolicyTerms, PolicyTokens, ValueTerms, kl_estimate

EDGES = torch.linspace(-1.0, 1.0, 401, dtype=torch.float64)  # of the log-ratio's histogram: 0.5% per bin
QUANTILES = (0.01, 0.5, 0.99)


@dataclass(frozen=True)
class Fields:
    """What a report holds, in this order: sums, then bins of a histogram (counts), then maxima."""

    sums: tuple[str, ...]
    maxima: tuple[str, ...]
    bins: int = 0

    @property
    def summed(self) -> int:
        """Entries that are added up; those behind them are maxima."""
        return len(self.sums) + self.bins

    @property
    def size(self) -> int:
        return self.summed + len(self.maxima)

    def pack(
        self,
        sums: Mapping[str, torch.Tensor],
        maxima: Mapping[str, torch.Tensor],
        histogram: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """fp64 ``[size]`` from tensors per token; the maximum over no token is -inf."""
        assert set(sums) == set(self.sums) and set(maxima) == set(self.maxima)
        added = [sums[name].detach().double().sum() for name in self.sums]
        largest = [
            maxima[name].detach().double().max()
            if maxima[name].numel()
            else added[0].new_full((), -torch.inf)
            for name in self.maxima
        ]
        counts = [] if histogram is None else [histogram.double()]
        return torch.cat([torch.stack(added), *counts, torch.stack(largest)])


POLICY = Fields(
    sums=(
        "tokens", "loss", "surrogate", "entropy", "kl_loss", "k1", "k3", "clip_low", "clip_high", "dual_clip",
        "advantage", "advantage_squared", "tis_clipped", "weight", "untruncated", "untruncated_squared",
        "mismatch", "mismatch_k1", "mismatch_k3", "mismatch_reverse", "reference_k1", "reference_k3",
    ),
    maxima=("mismatch", "ratio", "minus_ratio", "advantage", "minus_advantage"),
    bins=len(EDGES) + 1,
)  # fmt: skip
VALUE = Fields(
    sums=("tokens", "loss", "value", "return", "return_squared", "error", "error_squared", "clipped"),
    maxima=("error",),
)


def policy_report(tokens: PolicyTokens, terms: PolicyTerms) -> torch.Tensor:
    """What one micro-batch adds to ``POLICY``."""
    nothing = torch.zeros_like(tokens.advantages)
    before, ratio = tokens.before.detach(), terms.ratio.detach()
    engine = before - tokens.sampler_logprobs
    reference = tokens.reference_logprobs
    apart = nothing if reference is None else tokens.logprobs.detach() - reference
    log_ratio = tokens.logprobs.detach() - before
    other = terms.untruncated
    sums = {
        "tokens": torch.ones_like(nothing),
        "loss": terms.loss,
        "surrogate": terms.surrogate,
        "entropy": nothing if tokens.entropy is None else tokens.entropy,
        "kl_loss": nothing if terms.kl is None else terms.kl,
        "k1": -log_ratio,
        "k3": kl_estimate(before, tokens.logprobs.detach(), "k3"),
        "clip_low": terms.clipped_low,
        "clip_high": terms.clipped_high,
        "dual_clip": terms.dual,
        "advantage": tokens.advantages,
        "advantage_squared": tokens.advantages.double().square(),
        "tis_clipped": terms.weight < other,
        "weight": terms.weight,
        "untruncated": other,
        "untruncated_squared": other.double().square(),
        "mismatch": engine.abs(),
        "mismatch_k1": -engine,
        "mismatch_k3": kl_estimate(tokens.sampler_logprobs, before, "k3"),
        "mismatch_reverse": other.double() * other.double().log() - (other.double() - 1.0),
        "reference_k1": apart,
        "reference_k3": kl_estimate(apart, nothing, "k3"),
    }
    maxima = {
        "mismatch": engine.abs(),
        "ratio": ratio,
        "minus_ratio": -ratio,
        "advantage": tokens.advantages,
        "minus_advantage": -tokens.advantages,
    }
    place = torch.bucketize(log_ratio.double(), EDGES.to(log_ratio.device))
    return POLICY.pack(sums, maxima, torch.bincount(place, minlength=POLICY.bins))


def value_report(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, terms: ValueTerms
) -> torch.Tensor:
    """What one micro-batch adds to ``VALUE``. The explained variance is that of the values before the update."""
    error = (returns - old_values).double()
    sums = {
        "tokens": torch.ones_like(returns),
        "loss": terms.loss,
        "value": values,
        "return": returns,
        "return_squared": returns.double().square(),
        "error": error,
        "error_squared": error.square(),
        "clipped": terms.clipped,
    }
    return VALUE.pack(sums, {"error": error.abs()})


def policy_metrics(report: torch.Tensor) -> dict[str, float]:
    """Metrics from the report over all micro-batches and ranks."""
    s = dict(zip(POLICY.sums, report.tolist()))
    top = dict(zip(POLICY.maxima, report[POLICY.summed :].tolist()))
    count = max(s["tokens"], 1.0)
    mean = {name: value / count for name, value in s.items()}
    histogram = report[len(POLICY.sums) : POLICY.summed]
    found = {
        "tokens": s["tokens"],
        "loss": mean["loss"],
        "pg_loss": mean["surrogate"],
        "entropy": mean["entropy"],
        "kl_loss": mean["kl_loss"],
        "approx_kl_k1": mean["k1"],
        "approx_kl_k3": mean["k3"],
        "clip_fraction": mean["clip_low"] + mean["clip_high"],
        "clip_fraction_low": mean["clip_low"],
        "clip_fraction_high": mean["clip_high"],
        "dual_clip_fraction": mean["dual_clip"],
        "ratio_max": top["ratio"],
        "ratio_min": -top["minus_ratio"],
        "advantage_mean": mean["advantage"],
        "advantage_std": max(mean["advantage_squared"] - mean["advantage"] ** 2, 0.0) ** 0.5,
        "advantage_max": top["advantage"],
        "advantage_min": -top["minus_advantage"],
        "tis_weight": mean["weight"],
        "tis_clip_fraction": mean["tis_clipped"],
        "ess": s["untruncated"] ** 2 / max(count * s["untruncated_squared"], 1e-300),
        "mismatch_mean": mean["mismatch"],
        "mismatch_max": top["mismatch"],
        "mismatch_k1": mean["mismatch_k1"],
        "mismatch_k3": mean["mismatch_k3"],
        "mismatch_k3_reverse": mean["mismatch_reverse"],
        "reference_kl_k1": mean["reference_k1"],
        "reference_kl_k3": mean["reference_k3"],
    }
    for share in QUANTILES:
        found[f"ratio_p{round(100 * share):02d}"] = ratio_quantile(histogram, share)
    return found


def ratio_quantile(histogram: torch.Tensor, share: float) -> float:
    """Upper end of the bin with the quantile: right to 0.5% for ratios of e^-1 to e; nan without tokens."""
    total = histogram.sum()
    if not total:
        return float("nan")
    place = int((histogram.cumsum(0) < share * total).sum())
    return float(EDGES[min(place, len(EDGES) - 1)].exp())


def value_metrics(report: torch.Tensor) -> dict[str, float]:
    """Metrics from the report over all micro-batches and ranks."""
    s = dict(zip(VALUE.sums, report.tolist()))
    count = max(s["tokens"], 1.0)
    mean = {name: value / count for name, value in s.items()}
    spread = mean["return_squared"] - mean["return"] ** 2
    unexplained = mean["error_squared"] - mean["error"] ** 2
    return {
        "tokens": s["tokens"],
        "loss": mean["loss"],
        "value_mean": mean["value"],
        "return_mean": mean["return"],
        "explained_variance": 1.0 - unexplained / spread if spread > 1e-12 else float("nan"),
        "clip_fraction": mean["clipped"],
        "error_max": float(report[VALUE.summed]),
    }


def mismatch_alarms(metrics: Mapping[str, float], rollout: RolloutConfig) -> list[str]:
    """Sentences for those differences between trainer and sampler that are above their limits, or no numbers."""
    limits: Sequence[tuple[str, str, float | None]] = (
        ("mismatch_mean", "alarm_mean", rollout.alarm_mean),
        ("mismatch_max", "alarm_max", rollout.alarm_max),
        ("mismatch_k3", "alarm_kl", rollout.alarm_kl),
    )
    return [
        f"{name} = {metrics[name]:.3g} is above rl.rollout.{key} = {limit:g}: sampler and trainer do not compute the "
        "same; look at the weight version, the number formats and the sampler's kernels"
        for name, key, limit in limits
        if limit is not None and not metrics[name] <= limit
    ]
