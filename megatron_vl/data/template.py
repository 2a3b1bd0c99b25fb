"""A sample as token ids: ChatML with the released special tokens, images put in, and which ids are scored.

    <|im_start|>user\\n IMAGE text <|im_end|>\\n <|im_start|>assistant\\n text <|im_end|>\\n

No system turn is added. A document is its text and images followed by <|endoftext|>. This is the only place
where an image becomes its string of ids (crops first, then the global view); nothing downstream expands
again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_vl.config.model import SpecialTokens, VisionConfig
from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.crops import CropPlan, image_token_ids
from megatron_vl.data.sample import Message, Part, Sample, TextPart
from megatron_vl.data.special_tokens import LITERALS, TEXT_TOKENS, refuse_literals
from megatron_vl.data.tokenizer import TextTokenizer

NOT_SCORED = -100
LOSS_ON = ("assistant", "assistant_last", "all_text")

_THINK = re.compile("(" + "|".join(re.escape(LITERALS[name]) for name in TEXT_TOKENS) + ")")


@dataclass(frozen=True)
class Template:
    """What turns samples into ids. loss_on, for conversations (documents score all of their text):

    assistant: what assistant turns contain and the <|im_end|> after it, in every assistant turn.
    assistant_last: the same in the last assistant turn only.
    all_text: every id that does not belong to an image, also roles, <|im_start|> and line breaks.
    """

    tokenizer: TextTokenizer
    tokens: SpecialTokens
    vision: VisionConfig
    loss_on: str = "assistant"

    def __post_init__(self) -> None:
        assert self.loss_on in LOSS_ON, self.loss_on

    def render(self, sample: Sample, plans: Sequence[CropPlan]) -> tuple[np.ndarray, np.ndarray]:
        """ids and labels, both int64 [n]. labels: the id where scored, NOT_SCORED elsewhere, not shifted.

        plans: one per image, in order. Raises SampleRefused (placeholder_in_text, no_loss_tokens).
        """
        assert len(plans) == len(sample.images), (
            f"{sample.id}: {len(sample.images)} images, {len(plans)} plans"
        )
        writer = _Writer(self, list(plans))
        if sample.messages:
            self._conversation(sample, writer)
        else:
            writer.parts(sample.document, scored=True, where="the document")
            writer.special(self.tokens.endoftext, scored=True)
        ids, labels = writer.arrays()
        # The first id of a row is not predicted by anything, so a label there does not count.
        if not np.any(labels[1:] != NOT_SCORED):
            raise SampleRefused(
                "no_loss_tokens", f"no token to learn from with data.loss_on = {self.loss_on}"
            )
        return ids, labels

    def render_prompt(
        self, sample: Sample, plans: Sequence[CropPlan], open_thinking: bool = False
    ) -> np.ndarray:
        """ids int64 [n] of a conversation up to where an answer begins: ``...<|im_start|>assistant\\n``.

        They are the first ids of what `render` makes of the same turns with an answer. A last turn that is the
        assistant's is the answer that is asked for: it is left out. open_thinking: go on with ``<think>\\n``, as the
        released chat template does. plans: one per image, in order. Raises SampleRefused (no_prompt,
        placeholder_in_text).
        """
        asked = sample.messages
        if asked and asked[-1].role == "assistant":
            asked = asked[:-1]
        if not asked:
            raise SampleRefused("no_prompt", "there is no turn to answer; a prompt is a conversation")
        writer = _Writer(self, list(plans))
        for number, message in enumerate(asked):
            self._turn(writer, message, number, everything=False, scored=False)
        self._open_turn(writer, "assistant", scored=False)
        if open_thinking:
            writer.special(self.tokens.think_start, scored=False)
            writer.text("\n", scored=False)
        return writer.arrays()[0]

    def turn_tokens(self, sample: Sample, plans: Sequence[CropPlan]) -> np.ndarray:
        """int64 [messages]: tokens of each turn of a conversation; their sum is what `render` gives.

        Raises SampleRefused (placeholder_in_text).
        """
        writer = _Writer(self, list(plans))
        return np.diff(self._conversation(sample, writer), prepend=0)

    def _conversation(self, sample: Sample, writer: _Writer) -> list[int]:
        """Writes the turns; where each of them ends."""
        answers = [number for number, message in enumerate(sample.messages) if message.role == "assistant"]
        scored_answers = {"assistant": answers, "assistant_last": answers[-1:], "all_text": answers}[
            self.loss_on
        ]
        everything = self.loss_on == "all_text"
        ends = []
        for number, message in enumerate(sample.messages):
            self._turn(writer, message, number, everything, everything or number in scored_answers)
            writer.flush()  # a special token follows, so nothing would be merged with it
            ends.append(len(writer.ids))
        return ends

    def _turn(self, writer: _Writer, message: Message, number: int, everything: bool, scored: bool) -> None:
        self._open_turn(writer, message.role, everything)
        writer.parts(message.parts, scored, where=f"messages[{number}]")
        writer.special(self.tokens.chat_end, scored)
        writer.text("\n", scored=everything)

    def _open_turn(self, writer: _Writer, role: str, scored: bool) -> None:
        writer.special(self.tokens.chat_start, scored)
        writer.text(f"{role}\n", scored)
        if role == "assistant":
            # Generation starts after the line break, so what follows is never merged with it into one token.
            writer.flush()


@dataclass
class _Writer:
    """Collects ids and labels. Neighbouring texts are encoded as one, as when a prompt is served."""

    template: Template
    plans: list[CropPlan]
    ids: list[int] = field(default_factory=list)
    scored: list[bool] = field(default_factory=list)
    _text: str = ""
    _text_scored: bool = False
    _images: int = 0

    def parts(self, parts: Sequence[Part], scored: bool, where: str) -> None:
        texts = "".join(part.text if isinstance(part, TextPart) else "\n" for part in parts)
        refuse_literals(texts, where)
        for part in parts:
            if isinstance(part, TextPart):
                self._with_think_tokens(part.text, scored)
            else:
                self._image()

    def text(self, text: str, scored: bool) -> None:
        if scored != self._text_scored:
            self.flush()
        self._text += text
        self._text_scored = scored

    def special(self, token_id: int, scored: bool) -> None:
        self._extend([token_id], scored)

    def flush(self) -> None:
        """Encodes the text that waits."""
        text, self._text = self._text, ""
        if text:
            self._extend(self.template.tokenizer.encode(text), self._text_scored)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        self.flush()
        ids = np.array(self.ids, dtype=np.int64)
        return ids, np.where(np.array(self.scored, dtype=bool), ids, NOT_SCORED)

    def _with_think_tokens(self, text: str, scored: bool) -> None:
        tokens = self.template.tokens
        for piece in _THINK.split(text):
            if piece == LITERALS["think_start"]:
                self.special(tokens.think_start, scored)
            elif piece == LITERALS["think_end"]:
                self.special(tokens.think_end, scored)
            elif piece:
                self.text(piece, scored)

    def _image(self) -> None:
        template = self.template
        plan = self.plans[self._images]
        self._images += 1
        vision = template.vision
        self._extend(
            image_token_ids(plan, template.tokens, vision.global_tokens, vision.crop_tokens), scored=False
        )

    def _extend(self, ids: Sequence[int], scored: bool) -> None:
        if self._text:
            self.flush()
        self.ids.extend(ids)
        self.scored.extend([scored] * len(ids))


def shift_labels(labels: np.ndarray) -> np.ndarray:
    """targets[t] = labels[t + 1]: what position t must predict. [n] to [n]; the last predicts nothing.

    To be applied per document: across a boundary the last token of one would predict the first of the next.
    """
    targets = np.full_like(labels, NOT_SCORED)
    targets[:-1] = labels[1:]
    return targets
