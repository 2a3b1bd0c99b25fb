"""Both kinds of tokenizer file: text comes back, special ids never come from text, clashes are named."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_vl.config.model import SpecialTokens
from megatron_vl.data.special_tokens import LITERALS
from megatron_vl.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vl.errors import DataError
from tests.data.tiny import TEXTS, TOKENS

TRICKY = ["", " two  spaces ", "\n\nline\r\n\ttab", "héllo 😀 日本語 \u202e", "a\0b", "<0x41> <s> </s> <unk>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def sentencepiece_file(folder) -> str:
    path = str(folder / "text.model")
    train_sentencepiece(TEXTS, path, vocab_size=300)
    return path


def byte_level(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def huggingface_file(folder) -> str:
    """Like the released file: special tokens are entries of the tokenizer, behind the text tokens."""
    tokenizer = byte_level(TEXTS, 280)
    tokenizer.add_special_tokens(
        [AddedToken(LITERALS[name], special=True) for name in ("endoftext", "chat_start")]
    )
    tokenizer.add_tokens([AddedToken(LITERALS["think_start"], special=False)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    path = str(folder / "tokenizer.json")
    tokenizer.save(path)
    return path


def own_ids(path: str) -> SpecialTokens:
    """Special ids as the Hugging Face file has them, the others from 400 on."""
    added = {token["content"]: token["id"] for token in json.loads(Path(path).read_text())["added_tokens"]}
    return SpecialTokens(
        **{name: added.get(text, 400 + n) for n, (name, text) in enumerate(LITERALS.items())}
    )


@pytest.mark.parametrize("text", [*TRICKY, *LITERALS.values()])
def test_text_comes_back_and_is_never_special(sentencepiece_file, huggingface_file, text):
    special = own_ids(huggingface_file)
    for path, tokens in ((sentencepiece_file, TOKENS), (huggingface_file, special)):
        tokenizer = load_tokenizer(path, tokens, 512)
        ids = tokenizer.encode(text)
        assert tokenizer.decode_text(ids) == text
        # <think> is an ordinary entry of the released tokenizer; the template splits it off before.
        if text != LITERALS["think_start"]:
            assert not set(ids) & set(asdict(tokens).values())


def test_truncation_and_padding_of_the_file_are_off(huggingface_file):
    tokenizer = load_tokenizer(huggingface_file, own_ids(huggingface_file), 512)
    assert len(tokenizer.encode("xyzxyz")) == 6


def test_decode_spells_special_ids(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file, TOKENS, 512)
    ids = [
        TOKENS.chat_start,
        *tokenizer.encode("user"),
        TOKENS.im_patch,
        TOKENS.im_patch,
        *tokenizer.encode("red"),
    ]
    assert tokenizer.decode(ids, TOKENS) == "<|im_start|>user<im_patch><im_patch>red"


def test_ids_without_a_piece_do_not_vanish(sentencepiece_file, huggingface_file):
    special = own_ids(huggingface_file)
    for path, tokens in ((sentencepiece_file, TOKENS), (huggingface_file, special)):
        tokenizer = load_tokenizer(path, tokens, 512)
        first, second = tokenizer.encode("red"), tokenizer.encode("circle")
        text = tokenizer.decode([*first, 399, 511, *second], tokens)
        assert text == f"{tokenizer.decode_text(first)}<|id 399|><|id 511|>{tokenizer.decode_text(second)}"


def test_travels_to_workers(sentencepiece_file, huggingface_file):
    for tokenizer in (
        load_tokenizer(sentencepiece_file, TOKENS, 512),
        load_tokenizer(huggingface_file, own_ids(huggingface_file), 512),
    ):
        assert pickle.loads(pickle.dumps(tokenizer)).encode("red circle") == tokenizer.encode("red circle")


def test_training_is_deterministic_and_exact_in_size(folder):
    files = [folder / name for name in ("one.model", "two.model")]
    for file in files:
        tokenizer = train_sentencepiece(iter(TEXTS), str(file), vocab_size=300)
        assert len(tokenizer.text_pieces()) == 300
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(DataError, match="vocab_size = 5000"):
        train_sentencepiece(TEXTS, str(folder / "big.model"), vocab_size=5000)
    assert not (folder / "big.model").exists()


def test_clash_with_a_text_token_names_both(sentencepiece_file, huggingface_file):
    with pytest.raises(
        DataError, match=r"model.tokens.im_patch = 298 \(<im_patch>\) is also the id of the text token '.+'"
    ):
        load_tokenizer(sentencepiece_file, replace(TOKENS, im_patch=298), 512)
    with pytest.raises(
        DataError, match=r"model.tokens.im_end = 65 \(<im_end>\) is also the id of the text token"
    ):
        load_tokenizer(huggingface_file, replace(own_ids(huggingface_file), im_end=65), 512)


def test_vocabulary_too_small_and_ids_that_differ(sentencepiece_file, huggingface_file):
    with pytest.raises(DataError, match=r"has id 299, not below model.text.vocab_size = 200"):
        load_tokenizer(sentencepiece_file, TOKENS, 200)
    with pytest.raises(
        DataError, match=r"chat_start = 491, but the tokenizer has <\|im_start\|> under id \d+"
    ):
        load_tokenizer(huggingface_file, TOKENS, 512)


def test_unusable_files(folder):
    (folder / "bad.json").write_text("{}")
    (folder / "bad.model").write_bytes(b"no model")
    (folder / "bad.txt").write_text("")
    for name, message in (
        ("bad.json", "not a readable tokenizer.json"),
        ("bad.model", "not a readable SentencePiece model"),
        ("bad.txt", "must end in .json"),
        ("none.json", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(str(folder / name), TOKENS, 512)
