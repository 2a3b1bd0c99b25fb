"""What else `filter` may ask of a prompt: that its image matters, and that its answer can be checked.

The rules themselves: `rewards/filters.py`. A prompt for which a rule decides nothing is not kept, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from megatron_vl.data.sample import Message, Sample, TextPart
from megatron_vl.generate.prompts import PromptBuilder
from megatron_vl.rl.acceptance import Acceptance, by_prompt
from megatron_vl.rl.collect import Collected, collect
from megatron_vl.rl.prompt_set import RlPrompt
from megatron_vl.rl.rewards.filters import Decision, checkable, needs_image
from megatron_vl.rl.run import RlRun

BLIND = 500_000_000  # responses without an image have seeds of their own
NO_IMAGE = Decision(True, "no_image")


def without_images(builder: PromptBuilder, prompts: Sequence[RlPrompt]) -> list[RlPrompt]:
    """The prompts that show images, without them; others are left out. A turn of images alone says nothing then."""
    found = []
    for prompt in prompts:
        if prompt.images:
            made, _ = builder.build(_blind(prompt.line.parse()))
            found.append(replace(prompt, prompt=made, images=()))
    return found


def _blind(sample: Sample) -> Sample:
    turns = []
    for turn in sample.messages:
        parts = tuple(part for part in turn.parts if isinstance(part, TextPart))
        if parts:
            turns.append(Message(turn.role, parts))
    return replace(sample, messages=tuple(turns))


def acceptance_of(collected: Collected, accept_at: float) -> dict[str, Acceptance]:
    """Scores of the responses by prompt id."""
    results = [(s.response.prompt_id, s.reward.score, s.reward.masked) for s in collected.scored]
    return by_prompt(results, accept_at)


def image_decisions(
    seen: Mapping[str, Acceptance], blind: Mapping[str, Acceptance], margin: float
) -> dict[str, Decision]:
    """By prompt id. seen, blind: scores with and without images; a prompt that is not in ``blind`` has none."""
    return {
        name: needs_image(one.rewards, blind[name].rewards, margin) if name in blind else NO_IMAGE
        for name, one in seen.items()
    }


def ask_blind(
    run: RlRun, prompts: Sequence[RlPrompt], samples: int, group: int, folder: Path
) -> dict[str, Acceptance] | None:
    """Scores without images of the prompts that have some; None when the ranks have agreed to stop."""
    blind = without_images(run.prompts.builder, prompts)
    if not blind:
        return {}
    number = BLIND + group
    collected = collect(run, blind, samples, number, folder / "journal_blind", run.config.train.seed)
    return None if collected is None else acceptance_of(collected, run.config.rl.rewards.accept_at)


def _reference(prompt: RlPrompt) -> str:
    """The answer as the file has it."""
    answer = json.loads(prompt.line.data)["task"].get("answer")
    return answer if isinstance(answer, str) else json.dumps(answer)


def check_decisions(run: RlRun, prompts: Sequence[RlPrompt]) -> dict[str, Decision]:
    """By prompt id: whether the judge finds the answer checkable. On rank 0, which has the judge."""
    judge = run.services.judge
    assert judge is not None, "filtration.check has refused"

    def one(prompt: RlPrompt) -> Decision:
        return checkable(judge, prompt.text, _reference(prompt))

    with ThreadPoolExecutor(run.config.rl.rewards.judge.concurrency, thread_name_prefix="checkable") as pool:
        decisions = list(pool.map(one, prompts))
    return {prompt.prompt.prompt_id: told for prompt, told in zip(prompts, decisions, strict=True)}
