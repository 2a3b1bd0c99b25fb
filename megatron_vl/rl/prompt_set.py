"""Prompts with their tasks, from JSONL: a conversation as for training, and what is asked of the answer.

    {"id": "q7", "messages": [...], "task": {"kind": "count", "answer": 3, "thinking": false}, "source": "counting"}

A last turn of the assistant is left out of the prompt. ``task``: see docs/rewards.md. Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.data.bad_samples import BadSample, SampleRefused
from megatron_vl.data.jsonl import JsonlSource, RawLine
from megatron_vl.data.sample import Sample, TextPart
from megatron_vl.errors import DataError
from megatron_vl.generate.features import PromptImage
from megatron_vl.generate.prompts import PromptBuilder
from megatron_vl.generate.request import Prompt
from megatron_vl.rl.iteration import prompts_of
from megatron_vl.rl.rewards.task import Task, parse_task


@dataclass(frozen=True)
class RlPrompt:
    """A prompt ready to be asked. text: what the user says, for language rules and pages. line: as on disk."""

    prompt: Prompt
    images: tuple[PromptImage, ...]
    task: Task
    source: str
    text: str
    line: RawLine


class PromptSet:
    """Prompts by number. longest: tokens that prompt and response have together at most. builder: of the run.

    Raises:
        DataError: a file that cannot be read.
    """

    def __init__(self, paths: Sequence[str], builder: PromptBuilder, longest: int, max_tokens: int) -> None:
        self.lines, self.builder = JsonlSource(paths), builder
        self.longest, self.max_tokens = longest, max_tokens

    def __len__(self) -> int:
        return len(self.lines)

    def of_iteration(self, iteration: int, count: int, seed: int) -> tuple[list[RlPrompt], list[BadSample]]:
        """As `read`, for the prompts of an iteration.

        Raises:
            DataError: there are fewer than ``count`` prompts in all.
        """
        if count > len(self):
            raise DataError(
                f"rl.prompts has {len(self)} prompts, an iteration asks for rl.rollout.prompts_per_iteration = {count}"
            )
        return self.read(prompts_of(iteration, count, len(self), seed))

    def read(self, numbers: Sequence[int]) -> tuple[list[RlPrompt], list[BadSample]]:
        """The prompts with these numbers, and those that are refused. A refused one is left out, and counted.

        Raises:
            DataError: all are refused.
        """
        found: list[RlPrompt] = []
        refused: list[BadSample] = []
        seen: set[str] = set()
        for number in numbers:
            line = self.lines[number]
            try:
                prompt = self._prompt(line)
                if prompt.prompt.prompt_id in seen:
                    raise SampleRefused("repeated_id", "another prompt has this id", prompt.prompt.prompt_id)
                seen.add(prompt.prompt.prompt_id)
                found.append(prompt)
            except SampleRefused as refusal:
                name = refusal.sample_id or line.default_id
                refused.append(BadSample(name, line.source, line.line, refusal.reason, refusal.detail))
        if not found:
            raise DataError(f"all {len(numbers)} prompts are refused, the first: {refused[0]}")
        return found, refused

    def _prompt(self, line: RawLine) -> RlPrompt:
        sample = line.parse()
        record = json.loads(line.data)  # parse() has checked that it is an object
        source = record.get("source", "")
        if not isinstance(source, str):
            raise SampleRefused("bad_source", f"source is {source!r}; it must be text", sample.id)
        try:
            task = parse_task(record.get("task"))
        except DataError as error:
            raise SampleRefused("bad_task", str(error), sample.id) from error
        prompt, images = self.builder.build(sample)
        total = len(prompt.ids) + self.max_tokens
        if total > self.longest:
            raise SampleRefused(
                "too_long",
                f"{len(prompt.ids)} tokens and max_tokens = {self.max_tokens} are more than {self.longest}",
                sample.id,
            )
        return RlPrompt(prompt, tuple(images), task, source or task.kind, question_of(sample), line)


def question_of(sample: Sample) -> str:
    """The text of the user's turns."""
    turns = [message for message in sample.messages if message.role != "assistant"]
    return "\n".join(
        "".join(part.text for part in turn.parts if isinstance(part, TextPart)).strip() for turn in turns
    )
