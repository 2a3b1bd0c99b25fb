"""Text to ids and back, over a Hugging Face `tokenizer.json` or a SentencePiece model.

A tokenizer here knows text only. Special ids come from `model.tokens` and are put in by the template; no
text, however written, encodes to one. The special ids may lie outside the tokenizer's own range.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import sentencepiece
import tokenizers

from megatron_vl.config.model import SpecialTokens
from megatron_vl.data.special_tokens import LITERALS
from megatron_vl.errors import DataError


class TextTokenizer(ABC):
    """Encodes pieces of text. Instances travel to worker processes by their path."""

    def __init__(self, path: str):
        self.path = path

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without anything added before or after. Never a special id."""

    @abstractmethod
    def decode_text(self, ids: Sequence[int]) -> str:
        """Text of ids that this tokenizer made."""

    @abstractmethod
    def text_pieces(self) -> dict[int, str]:
        """Every id that `encode` can return, with its spelling."""

    @abstractmethod
    def id_of(self, piece: str) -> int | None:
        """Id of an entry of the vocabulary, None when there is none of that spelling."""

    @abstractmethod
    def knows(self, token_id: int) -> bool:
        """Whether the vocabulary has this id."""

    def decode(self, ids: Iterable[int], tokens: SpecialTokens) -> str:
        """Text of any ids; special ids appear as their spelling, e.g. `<im_patch>`, those of no piece as `<|id 417|>`.

        A model may have more ids than its tokenizer, and may sample them: they must not vanish from an answer.
        """
        spelling = {value: LITERALS[name] for name, value in asdict(tokens).items()}
        parts: list[str] = []
        run: list[int] = []
        for token_id in ids:
            if token_id in spelling:
                parts += [self.decode_text(run), spelling[token_id]]
                run = []
            elif not self.knows(int(token_id)):
                parts += [self.decode_text(run), f"<|id {int(token_id)}|>"]
                run = []
            else:
                run.append(int(token_id))
        return "".join([*parts, self.decode_text(run)])

    def __reduce__(self):
        return type(self), (self.path,)


class HuggingFaceTokenizer(TextTokenizer):
    """A `tokenizer.json`. Truncation, padding, templates and special tokens that it may ask for stay off."""

    def __init__(self, path: str):
        super().__init__(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception for an unreadable or malformed file
            raise DataError(f"{path}: not a readable tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The spelling of a special token inside a text is then ordinary text.
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode_text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def text_pieces(self) -> dict[int, str]:
        special = {
            number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return {number: piece for piece, number in vocabulary.items() if number not in special}

    def id_of(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def knows(self, token_id: int) -> bool:
        return self._tokenizer.id_to_token(token_id) is not None


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece `.model`. Its control pieces (`<s>`, `</s>`, `<pad>`) are never used."""

    def __init__(self, path: str):
        super().__init__(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: not a readable SentencePiece model ({error})") from error

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode_text(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def text_pieces(self) -> dict[int, str]:
        model = self._processor
        return {
            number: model.id_to_piece(number)
            for number in range(model.get_piece_size())
            if not model.is_control(number) and not model.is_unused(number)
        }

    def id_of(self, piece: str) -> int | None:
        number = self._processor.piece_to_id(piece)
        return number if self._processor.id_to_piece(number) == piece else None

    def knows(self, token_id: int) -> bool:
        return 0 <= token_id < self._processor.get_piece_size()


def load_tokenizer(path: str, tokens: SpecialTokens, vocab_size: int) -> TextTokenizer:
    """Opens `tokenizer.json` or a `.model` file and checks it against the model.

    Raises DataError when the file is missing or of another kind, when an id that text can produce is a
    special id of the model or not below vocab_size, or when the file has a special token under another id
    than the model.
    """
    if not os.path.isfile(path):
        raise DataError(
            f"data.tokenizer = {path}: no such file; give the path of a tokenizer.json or a .model file"
        )
    if path.endswith(".json"):
        tokenizer: TextTokenizer = HuggingFaceTokenizer(path)
    elif path.endswith(".model"):
        tokenizer = SentencePieceTokenizer(path)
    else:
        raise DataError(
            f"data.tokenizer = {path}: must end in .json (Hugging Face) or .model (SentencePiece)"
        )
    check_tokenizer(tokenizer, tokens, vocab_size)
    return tokenizer


def check_tokenizer(tokenizer: TextTokenizer, tokens: SpecialTokens, vocab_size: int) -> None:
    """The id checks of `load_tokenizer`; all problems in one DataError."""
    pieces = tokenizer.text_pieces()
    problems = []
    for name, special_id in asdict(tokens).items():
        literal = LITERALS[name]
        if special_id >= vocab_size:
            problems.append(
                f"model.tokens.{name} = {special_id} is not below model.text.vocab_size = {vocab_size}"
            )
        if special_id in pieces and pieces[special_id] != literal:
            problems.append(
                f"model.tokens.{name} = {special_id} ({literal}) is also the id of the text token "
                f"{pieces[special_id]!r}"
            )
        own_id = tokenizer.id_of(literal)
        if own_id is not None and own_id != special_id:
            problems.append(
                f"model.tokens.{name} = {special_id}, but the tokenizer has {literal} under id {own_id}"
            )
    largest = max(pieces, default=-1)
    if largest >= vocab_size:
        problems.append(
            f"text token {pieces[largest]!r} has id {largest}, not below model.text.vocab_size = {vocab_size}"
        )
    if problems:
        raise DataError(
            f"{tokenizer.path} does not fit the model: {'; '.join(problems)}; choose ids in model.tokens "
            "that are not text tokens, and a model.text.vocab_size above all of them"
        )


def train_sentencepiece(
    texts: Iterable[str], path: str, vocab_size: int, character_coverage: float = 1.0
) -> SentencePieceTokenizer:
    """Trains a small SentencePiece BPE model, writes it to `path` and returns it. Deterministic and quiet.

    Spaces and line breaks are kept as they are, no space is put before a text, digits stay apart (as in
    Qwen3's tokenizer), and unknown characters fall back to bytes, so that any text without U+2581 comes back
    unchanged. vocab_size counts the 256 bytes and `<unk>`.
    Raises DataError when the texts are too few for that many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"vocab_size = {vocab_size}: SentencePiece could not train on these texts ({error})"
        ) from error
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.writing"
    with open(temporary, "wb") as file:
        file.write(model.getvalue())
    os.replace(temporary, path)
    return SentencePieceTokenizer(path)
