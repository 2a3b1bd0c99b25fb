"""The ids of a sample as pieces that can be read: texts decoded, the ids of a view as one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

import numpy as np

from megatron_vl.config.model import SpecialTokens
from megatron_vl.data.special_tokens import LITERALS
from megatron_vl.data.template import NOT_SCORED
from megatron_vl.data.tokenizer import TextTokenizer

TEXT, SPECIAL, CROP_VIEW, GLOBAL_VIEW, NEWLINE = "text", "special", "crop", "global", "newline"


@dataclass(frozen=True)
class Piece:
    """Ids begin ... begin + count - 1. kind: one of the above. scored: whether these ids are learnt.

    text: of a text as it decodes alone; a character that is cut by the edge of the piece shows as U+FFFD.
    """

    kind: str
    begin: int
    count: int
    scored: bool
    text: str


def token_pieces(
    ids: np.ndarray, labels: np.ndarray, tokens: SpecialTokens, tokenizer: TextTokenizer
) -> list[Piece]:
    """The pieces of a row. ids, labels: int64 [n], labels not shifted.

    A text ends where its scoring changes. The first id is never scored: nothing comes before it to predict it.
    """
    spelling = {value: LITERALS[name] for name, value in asdict(tokens).items()}
    scored = labels != NOT_SCORED
    scored[:1] = False
    views = {tokens.patch_start: (tokens.patch_end, CROP_VIEW), tokens.im_start: (tokens.im_end, GLOBAL_VIEW)}
    pieces: list[Piece] = []
    at = 0
    while at < len(ids):
        first = int(ids[at])
        if first in views:
            last, kind = views[first]
            ends = np.flatnonzero(ids[at:] == last)
            end = at + int(ends[0]) + 1 if len(ends) else len(ids)
            text = collapsed(ids[at:end].tolist(), spelling)
        elif first in spelling:
            end, kind, text = at + 1, NEWLINE if first == tokens.patch_newline else SPECIAL, spelling[first]
        else:
            end, kind = at + 1, TEXT
            while end < len(ids) and scored[end] == scored[at] and int(ids[end]) not in spelling:
                end += 1
            text = tokenizer.decode_text(ids[at:end].tolist())
        pieces.append(Piece(kind, at, end - at, bool(scored[at]), text))
        at = end
    return pieces


def collapsed(ids: Sequence[int], spelling: dict[int, str]) -> str:
    """Ids by their spelling, repeated ones once: `<im_start><im_patch>x169<im_end>`."""
    runs = ((token, sum(1 for _ in same)) for token, same in groupby(ids))
    return "".join(
        spelling.get(token, f"<{token}>") + (f"x{count}" if count > 1 else "") for token, count in runs
    )
