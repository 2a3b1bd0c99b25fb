"""How the special tokens are spelled in the released tokenizer, and what a spelling inside a text means."""

from __future__ import annotations

import re

from megatron_vl.data.bad_samples import SampleRefused

# Keys are the fields of `config.model.SpecialTokens`. Note that <|im_start|> (ChatML) is not <im_start>
# (image).
LITERALS = {
    "endoftext": "<|endoftext|>",
    "chat_start": "<|im_start|>",
    "chat_end": "<|im_end|>",
    "think_start": "<think>",
    "think_end": "</think>",
    "im_patch": "<im_patch>",
    "im_start": "<im_start>",
    "im_end": "<im_end>",
    "patch_start": "<patch_start>",
    "patch_end": "<patch_end>",
    "patch_newline": "<patch_newline>",
}

# Tokens around and inside images: never scored, whatever the loss is asked on.
IMAGE_TOKENS = ("im_patch", "im_start", "im_end", "patch_start", "patch_end", "patch_newline")

# The two that a text may contain: the released tokenizer turns them into their tokens wherever they stand.
TEXT_TOKENS = ("think_start", "think_end")

_RESERVED = re.compile(
    "|".join(re.escape(text) for name, text in LITERALS.items() if name not in TEXT_TOKENS)
)


def refuse_literals(text: str, where: str) -> None:
    """Raises SampleRefused (placeholder_in_text) when a text spells a token that only the template may write.

    Such a text is almost always a prompt that some other program rendered; trained on as plain text it would
    teach the model to write the spelling. One public report found such placeholders in 2.5% of a 100k
    instruction blend.
    """
    found = _RESERVED.search(text)
    if found:
        raise SampleRefused(
            "placeholder_in_text", f"{where} contains the special token {found.group()} as text"
        )
