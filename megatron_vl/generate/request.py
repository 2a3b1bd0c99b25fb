"""What is asked of a sampler and what comes back: plain values, without torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig, SpecialTokens
from megatron_vl.errors import ConfigError, DataError, Problem, raise_if_any

STOP, LENGTH = "stop", "length"

# Ids that stand for pictures, and the one that opens a turn: what only the template writes is never sampled.
STRUCTURAL = ("im_patch", "im_start", "im_end", "patch_start", "patch_end", "patch_newline", "chat_start")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. temperature 0: the most probable one. top_p 1 and top_k 0: nothing is cut off.

    stop_ids: the stop token itself is part of the response. They are looked for among sampled tokens only, so the
    released list, which names ``<im_patch>`` among the ends, does no harm.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 1, "must be at least 1", "ask for a token or more"),
            (
                "temperature",
                0 <= self.temperature < math.inf,
                "must be a finite number of at least 0",
                "use 0 for the most probable token",
            ),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1", "use 1 to cut nothing off"),
            ("top_k", self.top_k >= 0, "must be at least 0", "use 0 to cut nothing off"),
        )
        raise_if_any(
            Problem(name, getattr(self, name), rule, remedy) for name, ok, rule, remedy in rules if not ok
        )


@dataclass(frozen=True)
class Prompt:
    """ids: images already expanded (``data/template.py``). view_kinds: CROP or GLOBAL per view in stream order.

    images: content digests, one per image in stream order: keys of the feature cache.
    """

    prompt_id: str
    ids: tuple[int, ...]
    view_kinds: tuple[int, ...] = ()
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One sample that is wanted. Equal (prompt, seed, params, weights) give an equal response."""

    prompt: Prompt
    sample_index: int
    seed: int


@dataclass(frozen=True)
class Response:
    """tokens: the sampled ids, a stop id included. logprobs: of each under the model's whole distribution at
    temperature 1, whatever top_p and top_k cut off: what a training forward pass gives. finish_reason: STOP, LENGTH.
    """

    prompt_id: str
    sample_index: int
    seed: int
    weight_version: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def sample_seed(run_seed: int, iteration: int, prompt_id: str, sample_index: int) -> int:
    """The seed of a sample, 0 to 2^63 - 1: a function of its place in the run, on any machine."""
    text = f"{run_seed}/{iteration}/{sample_index}/{prompt_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def requests_for(
    prompts: Sequence[Prompt], samples: int, run_seed: int, iteration: int = 0
) -> Iterator[Request]:
    """``samples`` requests for each prompt, prompt by prompt."""
    for prompt in prompts:
        for index in range(samples):
            yield Request(prompt, index, sample_seed(run_seed, iteration, prompt.prompt_id, index))


def forbidden_ids(model: ModelConfig) -> tuple[int, ...]:
    """Ids of the vocabulary that are never sampled, ascending."""
    return tuple(
        sorted({i for name in STRUCTURAL if (i := getattr(model.tokens, name)) < model.text.vocab_size})
    )


def end_ids(tokens: SpecialTokens) -> tuple[int, ...]:
    """What ends a response: the end of the turn, the end of the text."""
    return tokens.chat_end, tokens.endoftext


def check_requests(requests: Sequence[Request], params: SamplingParams, model: ModelConfig) -> None:
    """What makes a request impossible for the model, whatever the machine.

    Raises:
        ConfigError: every id that could be sampled is forbidden (a vocabulary of structural ids).
        DataError: a prompt is empty, has ids outside of the vocabulary, other ``<im_patch>`` ids than its views make
            features, or leaves no room for max_tokens below ``model.text.max_position_embeddings``.
    """
    vocabulary, limit = model.text.vocab_size, model.text.max_position_embeddings
    if len(forbidden_ids(model)) == vocabulary:
        raise ConfigError(f"model.text.vocab_size = {vocabulary}: no id is left that may be sampled")
    tokens = (model.vision.crop_tokens, model.vision.global_tokens)
    seen: set[int] = set()
    for prompt in (request.prompt for request in requests):
        if id(prompt) in seen:
            continue
        seen.add(id(prompt))
        if not prompt.ids:
            raise DataError(
                f"prompt {prompt.prompt_id}: no token; a prompt has at least the opening of a turn"
            )
        if min(prompt.ids) < 0 or max(prompt.ids) >= vocabulary:
            raise DataError(
                f"prompt {prompt.prompt_id}: ids from {min(prompt.ids)} to {max(prompt.ids)}, the model has 0 to "
                f"{vocabulary - 1}; use the tokenizer of this model"
            )
        slots, rows = prompt.ids.count(model.tokens.im_patch), sum(tokens[k] for k in prompt.view_kinds)
        if slots != rows:
            raise DataError(
                f"prompt {prompt.prompt_id}: {slots} <im_patch> ids, but its {len(prompt.view_kinds)} views make "
                f"{rows} features; each image must be expanded exactly once, by data/template.py"
            )
        if len(prompt.ids) + params.max_tokens > limit:
            raise DataError(
                f"prompt {prompt.prompt_id}: {len(prompt.ids)} tokens and max_tokens = {params.max_tokens} are more "
                f"than model.text.max_position_embeddings = {limit}; lower max_tokens or leave the prompt out"
            )
