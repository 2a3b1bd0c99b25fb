"""Rules between the keys of `rl`, and what a run must be for reinforcement learning at all."""

from __future__ import annotations

from megatron_vl.config.rl import RlConfig
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import Problem


def check_rl(rl: RlConfig) -> list[Problem]:
    """Keys that contradict each other, whatever the model and layout."""
    ppo, updates = rl.ppo, rl.critic.updates
    problems = _strict(rl) if ppo.strict_on_policy else []
    most, least = max(ppo.mini_batches, updates), min(ppo.mini_batches, updates)
    if most % least:
        problems.append(
            Problem(
                "rl.critic.updates",
                updates,
                f"must be a multiple or a divisor of rl.ppo.mini_batches = {ppo.mini_batches}: both cut the same rows",
                f"choose {ppo.mini_batches}, or a multiple of it",
            )
        )
    if most > rl.rollout.samples:
        path, value = (
            ("rl.critic.updates", updates) if updates == most else ("rl.ppo.mini_batches", ppo.mini_batches)
        )
        problems.append(
            Problem(
                path,
                value,
                f"more steps than the {rl.rollout.samples} responses of an iteration (rl.rollout)",
                "make it smaller, or sample more",
            )
        )
    if ppo.dual_clip is not None and ppo.dual_clip <= 1 + ppo.clip_high:
        problems.append(
            Problem(
                "rl.ppo.dual_clip",
                ppo.dual_clip,
                f"must be above 1 + rl.ppo.clip_high = {1 + ppo.clip_high:g}: it bounds what the ratio clip leaves",
                "choose e.g. 3, or none",
            )
        )
    return problems


def _strict(rl: RlConfig) -> list[Problem]:
    """Strict on-policy means one update with a ratio of exactly 1, so nothing that acts on other ratios is set."""
    ppo = rl.ppo
    wanted = (
        ("mini_batches", ppo.mini_batches, ppo.mini_batches == 1, "takes one step per iteration", "set it 1"),
        (
            "ratio_mode",
            ppo.ratio_mode,
            ppo.ratio_mode == "detached",
            "compares the policy with itself",
            "set it detached",
        ),
        ("dual_clip", ppo.dual_clip, ppo.dual_clip is None, "never clips a ratio", "set it none"),
    )
    return [
        Problem(f"rl.ppo.{name}", value, f"rl.ppo.strict_on_policy {rule}", remedy)
        for name, value, right, rule, remedy in wanted
        if not right
    ]


def check_ready_for_rl(config: RunConfig) -> list[Problem]:
    """What reinforcement learning needs of the model: a frozen vision part and a decoder that learns.

    Sampler, actor and critic take the same stored features, so nothing that makes features may change.
    """
    model = config.model
    problems = [
        Problem(f"model.freeze_{part}", False, "features of images are made once and kept", "set it true")
        for part, frozen in (("vision", model.freeze_vision), ("projector", model.freeze_projector))
        if not frozen
    ]
    if model.freeze_decoder:
        problems.append(
            Problem("model.freeze_decoder", True, "there would be nothing to train", "set it false")
        )
    return problems


def check_rl_inputs(config: RunConfig) -> list[Problem]:
    """What a run of reinforcement learning needs to begin: prompts, a tokenizer, weights."""
    needed = (
        ("rl.prompts", config.rl.prompts, "there are no prompts", "list at least one JSONL file"),
        (
            "data.tokenizer",
            config.data.tokenizer,
            "no tokenizer",
            "give a tokenizer.json or a SentencePiece .model",
        ),
        (
            "train.init_from",
            config.train.init_from or config.train.init_from_hf,
            "there are no weights to begin with",
            "name the checkpoint of a finished run, or train.init_from_hf",
        ),
    )
    problems = [Problem(path, value, rule, remedy) for path, value, rule, remedy in needed if not value]
    if config.rl.eval_interval and not config.rl.eval_prompts:
        problems.append(
            Problem(
                "rl.eval_prompts",
                [],
                f"no held-out prompts, but rl.eval_interval = {config.rl.eval_interval}",
                "list a JSONL file, or set rl.eval_interval 0",
            )
        )
    return problems
