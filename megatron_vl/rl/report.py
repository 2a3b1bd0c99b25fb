"""What an iteration is told as: metrics.jsonl (docs/rl.md), a line, every rollout as JSON, a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from PIL import Image

from megatron_vl.data.decode import DecodeRule, load_rgb
from megatron_vl.errors import ImageRefused
from megatron_vl.generate.features import PromptImage
from megatron_vl.rl.acceptance import by_prompt, class_counts
from megatron_vl.rl.collect import Collected, Scored
from megatron_vl.rl.journal import iteration_name
from megatron_vl.rl.learn import Learnt
from megatron_vl.rl.page import ShownPrompt, ShownResponse, rollout_page
from megatron_vl.rl.rewards.extract import END_THINK
from megatron_vl.rl.update import Update
from megatron_vl.train.console import clock

FIRST_STEP = ("mismatch", "tis_", "ess")  # of the policy that was sampled from: only the first step sees that


def reward_metrics(scored: Sequence[Scored], accept_at: float) -> dict[str, float]:
    """Rewards, lengths and classes of an iteration's responses. Masked ones are counted and in nothing else."""
    known = [s for s in scored if not s.reward.masked]
    rewards = [s.reward.total for s in known]
    right = [s.reward.score >= accept_at for s in known]
    formed = [s for s in known if s.reward.outcome == "ok"]
    found: dict[str, float] = {
        "reward/mean": mean(rewards),
        "reward/min": min(rewards, default=float("nan")),
        "reward/max": max(rewards, default=float("nan")),
        "reward/accuracy": mean(right),
        "reward/accuracy_well_formed": mean([s.reward.score >= accept_at for s in formed]),
        "reward/score_well_formed": mean([s.reward.score for s in formed]),
        "reward/malformed_rate": 1.0 - len(formed) / len(known) if known else float("nan"),
        "reward/masked": float(len(scored) - len(known)),
    }
    for source in sorted({s.prompt.source for s in known}):
        found[f"reward/source/{source}"] = mean([s.reward.total for s in known if s.prompt.source == source])
    for name in sorted({name for s in known for name in s.reward.penalties}):
        found[f"reward/penalty/{name}"] = mean([s.reward.penalties.get(name, 0.0) for s in known])
    for reason in sorted({s.reward.reason for s in scored if s.reward.reason}):
        found[f"reward/reason/{reason}"] = float(sum(s.reward.reason == reason for s in scored))
    results = [(s.response.prompt_id, s.reward.score, s.reward.masked) for s in scored]
    counts = class_counts(by_prompt(results, accept_at))
    total = sum(counts.values())
    found |= {f"prompts/{kind}": count / total for kind, count in counts.items()}
    return found | length_metrics(scored, accept_at)


def length_metrics(scored: Sequence[Scored], accept_at: float) -> dict[str, float]:
    """Tokens of responses, all and by outcome; of prompts; of images."""
    lengths = [len(s.response.tokens) for s in scored]
    right = [len(s.response.tokens) for s in scored if not s.reward.masked and s.reward.score >= accept_at]
    wrong = [len(s.response.tokens) for s in scored if not s.reward.masked and s.reward.score < accept_at]
    thinking = [s.text.rpartition(END_THINK)[0] for s in scored]
    return {
        "length/mean": mean(lengths),
        "length/max": float(max(lengths, default=0)),
        "length/correct": mean(right),
        "length/incorrect": mean(wrong),
        "length/truncated_rate": mean([s.response.finish_reason == "length" for s in scored]),
        "length/thinking_characters": mean([len(text) for text in thinking]),
        "length/answer_characters": mean([len(s.text) - len(t) for s, t in zip(scored, thinking)]),
        "length/prompt": mean([len(s.prompt.prompt.ids) for s in scored]),
        "length/views": mean([len(s.prompt.prompt.view_kinds) for s in scored]),
        "length/repeated_4grams": mean([repeated_share(s.response.tokens) for s in scored]),
    }


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a response that it has had before; 0 for one shorter than n."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def learning_metrics(learnt: Learnt) -> dict[str, float]:
    """Of the iteration's optimizer steps: means, extremes of ``_max`` and ``_min``, sums of what is counted."""
    found = {f"samples/{name}": float(count) for name, count in learnt.counts.items()}
    for name, updates in (("policy", learnt.actor), ("critic", learnt.critic)):
        found |= {f"{name}/{key}": value for key, value in over_updates(updates).items()}
    return found | {"policy/alarms": float(len(learnt.alarms))}


def over_updates(updates: Sequence[Update]) -> dict[str, float]:
    """One set of metrics of several optimizer steps; empty without any."""
    if not updates:
        return {}
    found: dict[str, float] = {}
    for name in updates[0].metrics:
        values = [update.metrics[name] for update in updates]
        if name.startswith(FIRST_STEP) or name == "explained_variance":
            found[name] = values[0]
        elif name == "tokens":
            found[name] = sum(values)
        else:
            found[name] = (
                max(values)
                if name.endswith("_max")
                else min(values)
                if name.endswith("_min")
                else mean(values)
            )
    found |= {
        "grad_norm": mean([update.grad_norm for update in updates]),
        "lr": updates[-1].lr,
        "updates": float(len(updates)),
        "skipped": float(sum(update.skipped for update in updates)),
    }
    return found


def iteration_line(metrics: Mapping[str, float], iterations: int, eta: float) -> str:
    """One line on the console."""
    m = metrics
    policy = (
        f"kl {m['policy/approx_kl_k3']:.1e} | clip {100 * m['policy/clip_fraction']:.1f}% | entropy "
        f"{m['policy/entropy']:.3f} | mismatch {m['policy/mismatch_mean']:.1e}"
        if "policy/entropy" in m
        else "critic warm-up"
    )
    masked = f" | masked {m['reward/masked']:.0f}" if m["reward/masked"] else ""
    phases = ", ".join(f"{name} {m[f'seconds/{name}']:.1f}" for name in ("generate", "verify", "learn"))
    return (
        f"iteration {m['step']:.0f}/{iterations} | reward {m['reward/mean']:.4f} | accuracy "
        f"{100 * m['reward/accuracy']:.1f}% | length {m['length/mean']:.1f} | {policy} | value loss "
        f"{m['critic/loss']:.2e} | explained {m['critic/explained_variance']:.2f}{masked} | "
        f"{m['tokens_per_second_per_gpu']:.0f} tok/s/rank | {m['seconds/iteration']:.1f} s "
        f"({phases}) | eta {clock(eta)}"
    )


def write_rollouts(
    folder: Path, iteration: int, collected: Collected, advantages: Mapping[str, float]
) -> None:
    """``rollouts/iteration_000012.jsonl``: one object per response, also of masked ones. advantages: mean by name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{iteration_name(iteration)}.jsonl"
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        for s in collected.scored:
            file.write(json.dumps(rollout_record(s, advantages), ensure_ascii=False) + "\n")
    aside.replace(path)


def rollout_record(s: Scored, advantages: Mapping[str, float]) -> dict:
    """What is kept of a response for good; tokens and log-probabilities stay in the journal."""
    response, reward = s.response, s.reward
    return {
        "prompt_id": response.prompt_id,
        "sample": response.sample_index,
        "seed": response.seed,
        "weight_version": response.weight_version,
        "source": s.prompt.source,
        "text": s.text,
        "tokens": len(response.tokens),
        "finish_reason": response.finish_reason,
        "reward": reward.total,
        "score": reward.score,
        "outcome": reward.outcome,
        "reason": reward.reason,
        "parts": dict(reward.parts),
        "penalties": dict(reward.penalties),
        "masked": reward.masked,
        "verifier": reward.verifier,
        "verifier_version": reward.version,
        "task": reward.task,
        "advantage": advantages.get(s.trajectory.name),
    }


def write_page(
    folder: Path,
    iteration: int,
    collected: Collected,
    advantages: Mapping[str, float],
    prompts: int,
    rule: DecodeRule,
) -> None:
    """``rollouts/iteration_000012.html``: the first ``prompts`` prompts with all their responses."""
    shown: dict[str, list[Scored]] = {}
    for s in collected.scored:
        if s.response.prompt_id in shown or len(shown) < prompts:
            shown.setdefault(s.response.prompt_id, []).append(s)
    pages = [_shown(responses, advantages, rule) for responses in shown.values()]
    text = rollout_page(f"Rollouts of iteration {iteration}", pages)
    (folder / f"{iteration_name(iteration)}.html").write_text(text, encoding="utf-8")


def _shown(responses: Sequence[Scored], advantages: Mapping[str, float], rule: DecodeRule) -> ShownPrompt:
    prompt = responses[0].prompt
    images = [image for source in prompt.images if (image := _picture(source, rule)) is not None]
    lines = [
        ShownResponse(
            s.text, len(s.response.tokens), s.response.finish_reason, s.reward.total, s.reward.masked,
            advantages.get(s.trajectory.name), s.reward.parts, s.reward.reason,
        )
        for s in responses
    ]  # fmt: skip
    answer = "" if prompt.task.answer is None else str(prompt.task.answer)
    return ShownPrompt(prompt.prompt.prompt_id, prompt.source, prompt.text, answer, images, lines)


def _picture(image: PromptImage, rule: DecodeRule) -> Image.Image | None:
    """None for a file that has become unreadable since: the page is not worth ending a run."""
    try:
        return load_rgb(image.source, rule)
    except ImageRefused:
        return None


def mean(values: Sequence[float]) -> float:
    """nan without any."""
    return fmean(values) if values else float("nan")
