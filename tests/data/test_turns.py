"""Conversations longer than a row, cut between turns: by rule, counted, nothing of them lost or learnt twice."""

import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron_vl.config.mixture import DomainConfig, PackingConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.bad_samples import BadSample, BadSampleLog
from megatron_vl.data.jsonl import JsonlSource
from megatron_vl.data.lengths_build import length_index
from megatron_vl.data.loader import Place
from megatron_vl.data.make_plan import make_plan
from megatron_vl.data.packed import DomainSources, PackedMicroBatches, open_plan, packed_loader
from megatron_vl.data.plan_report import record_of, report_lines
from megatron_vl.data.plan_settings import PlanSettings
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.sample import Message, TextPart
from megatron_vl.data.turns import WHOLE, Piece, SplitRule, cut, turn_pairs
from megatron_vl.errors import DataError
from tests.data.tiny import MODEL, chat, make_data, raw, write_jsonl

LENGTH = 96
PACKING = PackingConfig(
    enabled=True, pad_multiple=8, look_ahead_rows=8, overlong="split_turns", index_workers=0
)


def talk(
    name: str, turns: int, images: dict[int, str] | None = None, system: str = "", long_at: int = -1
) -> dict:
    """A conversation whose words say which turn they belong to; images: path by number of the turn."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in range(turns):
        text = f"How many shapes? {turn} " + "shapes " * (40 if turn == long_at else turn % 3)
        content = [{"type": "image", "image": (images or {})[turn]}] if turn in (images or {}) else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
        messages.append({"role": "assistant", "content": f"The circle is {name} {turn}."})
    return {"id": name, "messages": messages}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    make_data(folder)
    records = [chat("What colour? " + "and " * (n % 9), "red", id=f"s{n}") for n in range(60)]
    records[7] = talk("a", 12)
    records[21] = talk("b", 9, {0: "small.png", 5: "wide.png", 6: "small.png"}, system="circle")
    records[40] = talk("c", 7, long_at=3)
    records[41] = {"id": "d", "text": "The circle is red. " * 40}
    records[42] = talk("e", 1, long_at=0)
    write_jsonl(folder / "talk.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def data(folder) -> DataConfig:
    return DataConfig(
        data_root=str(folder),
        tokenizer=str(folder / "text.model"),
        seq_length=LENGTH,
        num_workers=0,
        packing=PACKING,
    )


def batches_of(data, folder, where, place=Place(), steps=40) -> PackedMicroBatches:  # noqa: B008
    domain = DomainConfig("talk", [str(folder / "talk.jsonl")], weight=1.0)
    settings = PlanSettings.of(data, data.packing, [domain], [], MODEL, 4)
    source = JsonlSource(domain.paths)
    plan = open_plan(settings, [source], data, data.packing, MODEL, where, steps, True, lambda line: None)
    return PackedMicroBatches(DomainSources([source]), plan, RowBuilder(data, MODEL), place)


def turns(*roles: str) -> list[Message]:
    return [Message(role, (TextPart(role),)) for role in roles]


def test_turn_pairs_begin_with_the_user_turn_after_an_answer():
    talk = turns("system", "user", "user", "assistant", "user", "assistant", "assistant", "user")
    assert turn_pairs(talk) == [(1, 4), (4, 7), (7, 8)]
    assert turn_pairs(turns("assistant", "user", "assistant")) == [(0, 1), (1, 3)]
    assert turn_pairs(turns("system")) == []


@pytest.mark.parametrize(
    ("costs", "rule", "ends"),
    [
        ([(4, 0, 0)] * 6, SplitRule(24), []),
        ([(4, 0, 0)] * 6, SplitRule(23), [4, 6]),
        ([(4, 0, 0)] * 6, SplitRule(8), [2, 4, 6]),
        ([(4, 1, 0)] * 6, SplitRule(99, max_globals=2), [2, 4, 6]),
        ([(4, 1, 3)] * 6, SplitRule(99, max_crops=12), [4, 6]),
        ([(4, 0, 0)] * 2 + [(40, 0, 0)] * 2 + [(4, 0, 0)] * 2, SplitRule(20), [2, 4, 6]),
    ],
    ids=["fits", "one too many", "pair by pair", "global views", "crops", "a pair that fits no row"],
)
def test_as_many_pairs_as_a_row_takes(costs, rule, ends):
    pieces = cut(turns(*("user", "assistant") * 3), np.array(costs), rule)
    assert pieces == ([Piece(n + 1, s, e) for n, (s, e) in enumerate(zip([0, *ends], ends))] or [WHOLE])


def test_system_turns_count_in_every_piece():
    talk = turns("system", *("user", "assistant") * 3)
    costs = np.array([(10, 0, 0)] + [(4, 0, 0)] * 6)
    assert [piece.end for piece in cut(talk, costs, SplitRule(27))] == [5, 7]
    assert [piece.end for piece in cut(talk, costs, SplitRule(25))] == [3, 5, 7]


def test_tokens_of_the_turns_are_those_of_the_conversation(data):
    builder = RowBuilder(replace(data, seq_length=9999), MODEL)
    record = raw(talk("b", 9, {0: "small.png", 5: "wide.png"}, system="circle"))
    sample = record.parse()
    plans = [image.plan for image in builder._plan_images(sample, record)[0]]
    row, _ = builder.build(record)
    found = builder.template.turn_tokens(sample, plans)
    assert len(found) == 19 and found.sum() == len(row.ids)


def test_every_scored_token_is_in_exactly_one_piece(data, folder, tmp_path):
    whole = RowBuilder(replace(data, seq_length=9999), MODEL)
    batches = batches_of(data, folder, tmp_path)
    index, source = batches.plan.domains[0].index, batches.source
    by_sample: dict[int, list[int]] = {}
    for document in range(len(index)):
        by_sample.setdefault(index.part(document)[0], []).append(document)
    assert list(by_sample) == list(range(60)), "in the order of the samples, none left out"
    for sample, documents in by_sample.items():
        record = source.at(0, sample)
        row, images = whole.build(record)
        built = [whole.build(record, index.part(document)[1]) for document in documents]
        scored = [piece.labels[piece.labels != -100].tolist() for piece, _ in built]
        assert sum(scored, []) == row.labels[row.labels != -100].tolist()
        assert [image.name for _, mine in built for image in mine] == [image.name for image in images]
        assert all(len(mine[0].ids) == index.tokens[n] for mine, n in zip(built, documents))
    cut_ones = {source.at(0, s).parse().id: len(d) for s, d in by_sample.items() if len(d) > 1}
    assert set(cut_ones) == {"a", "b", "c"} and min(cut_ones.values()) >= 3
    assert index.split() == (3, sum(cut_ones.values()))


def test_a_piece_is_a_conversation_of_its_own(data, folder, tmp_path):
    batches = batches_of(data, folder, tmp_path)
    index, builder, tokens = batches.plan.domains[0].index, batches.builder, MODEL.tokens
    decode = builder.template.tokenizer.decode
    pieces = [index.part(n)[1] for n in range(len(index)) if index.part(n)[0] == 21]
    for piece in pieces:
        row, images = builder.build(batches.source.at(0, 21), piece)
        assert row.sample_id == f"b#{piece.number}" and all(i.sample_id == row.sample_id for i in images)
        text = decode([i for i in row.ids.tolist() if i != tokens.im_patch], tokens)
        assert text.startswith("<|im_start|>system\ncircle<|im_end|>\n<|im_start|>user\n")
        assert text.count("<|im_start|>user") == (piece.end - piece.first) // 2
    assert (
        pieces[0].first == 1
        and all(a.end == b.first for a, b in zip(pieces, pieces[1:]))
        and pieces[-1].end == 19
    )


def test_splits_and_refusals_are_counted(data, folder, tmp_path):
    plan = batches_of(data, folder, tmp_path).plan
    samples, documents = plan.domains[0].index.split()
    lines = "\n".join(report_lines(plan))
    assert f"cut at turns in domain talk: 3 of 60 samples, into {documents} documents" in lines
    assert f"refused in domain talk: 3 of {57 + documents} documents: too_long 3" in lines
    assert record_of(plan)["split"] == {"talk": {"samples": 3, "documents": documents}}
    refuse = replace(data, packing=replace(PACKING, overlong="refuse"))
    plan = batches_of(refuse, folder, tmp_path / "refuse").plan
    assert "too_long 5" in "\n".join(report_lines(plan)) and record_of(plan)["split"]["talk"]["samples"] == 0


def test_every_piece_is_trained_on_and_refused_pairs_are_reported(data, folder, tmp_path):
    """Over two epochs and a little: each document two or three times."""
    batches = batches_of(data, folder, tmp_path)
    index = batches.plan.domains[0].index
    seen, refused = Counter(), {}
    for row in batches.plan.rows(0, 160):
        for document in row.documents:
            built, _ = batches._build(document)
            seen[built.sample_id] += 1
            if built.refused is not None:
                refused[built.refused.id] = built.refused.reason
    assert refused == {"c#3": "too_long", "d": "too_long", "e": "too_long"}
    assert (
        len(seen) == len(index) and min(seen.values()) >= 1 and max(seen.values()) <= min(seen.values()) + 1
    )
    log = BadSampleLog(str(tmp_path / "bad.jsonl"), write=True)
    for name in ("c#3", "c#4", "c#3"):
        log.add([BadSample(name, "talk.jsonl", 41, "too_long", "")])
    assert log.total == 2


def test_views_of_a_row_cut_too(data, folder, tmp_path):
    limited = replace(data, packing=replace(PACKING, max_global_views=1))
    batches = batches_of(limited, folder, tmp_path)
    index = batches.plan.domains[0].index
    mine = [n for n in range(len(index)) if index.part(n)[0] == 21]
    assert [int(index.globals_[n]) for n in mine].count(1) == 3 and max(index.globals_) == 1
    assert "too_many_views" not in batches.plan.domains[0].refused()


def test_resume_on_another_data_parallel_size(data, folder, tmp_path):
    def ids(dp_size, first, last):
        loaders = [
            packed_loader(batches_of(data, folder, tmp_path, Place(r, dp_size, None)), first)
            for r in range(dp_size)
        ]
        return [
            Counter(tuple(b.sample_ids) for loader in loaders for b in loader.next_step())
            for _ in range(first, last)
        ]

    straight = ids(1, 0, 24)
    assert ids(2, 0, 11) + ids(4, 11, 24) == straight
    assert any(name.startswith("a#") for rows in straight for row in rows for name in row)


def test_built_by_workers_and_opened_again(data, folder, tmp_path):
    rule = SplitRule.of(PACKING, LENGTH)
    source = JsonlSource([str(folder / "talk.jsonl")])
    alone = length_index(tmp_path / "one", "talk", source, data, MODEL, split=rule)
    shared = length_index(tmp_path / "two", "talk", source, data, MODEL, workers=2, chunk=9, split=rule)
    again = length_index(tmp_path / "two", "talk", source, data, MODEL, split=rule)
    for index in (shared, again):
        assert np.array_equal(alone.pieces, index.pieces) and np.array_equal(alone.tokens, index.tokens)
        assert index.digest == alone.digest and index.num_samples == 60
    with pytest.raises(DataError, match="rules.split_turns.tokens was 96, is 64"):
        length_index(tmp_path / "one", "talk", source, data, MODEL, split=replace(rule, tokens=64))
    plain = length_index(tmp_path / "three", "talk", source, data, MODEL)
    assert plain.pieces is None and plain.digest != alone.digest


def test_without_long_conversations_the_order_is_that_of_refusing(data, folder, tmp_path):
    """Turning the key on changes nothing where nothing is cut, apart from the digest."""
    short = write_jsonl(
        tmp_path / "short.jsonl", [chat("What? " * (n % 9), "red", id=f"s{n}") for n in range(50)]
    )
    domain, source = DomainConfig("talk", [short], weight=1.0), JsonlSource([short])
    settings = PlanSettings.of(data, PACKING, [domain], [], MODEL, 4)
    plans = [
        make_plan(settings, [length_index(tmp_path / str(rule), "talk", source, data, MODEL, split=rule)], 20)
        for rule in (None, SplitRule.of(PACKING, LENGTH))
    ]
    assert [plans[0].step(n) for n in range(20)] == [plans[1].step(n) for n in range(20)]


def test_checksums_stay_with_their_samples(data, folder, tmp_path):
    """Documents behind a cut sample have other numbers than their samples: each is compared with its own record."""
    batches = batches_of(data, folder, tmp_path)
    index = batches.plan.domains[0].index
    assert len(index.contents) == index.num_samples == 60 < len(index)
    documents = {d.index: d for row in batches.plan.rows(0, 160) for d in row.documents}
    assert {batches._build(document)[0].sample_id for document in documents.values()} >= {"s59", "a#2"}
    changed = np.array(index.contents)
    changed[21] += 1
    domain = replace(batches.plan.domains[0], index=replace(index, contents=changed))
    batches.plan = replace(batches.plan, domains=[domain])
    wrong = set()
    for document in documents.values():
        try:
            batches._build(document)
        except DataError as error:
            assert "is not what it was" in str(error)
            wrong.add(index.part(document.index)[0])
    assert wrong == {21}


def test_a_copy_is_compared_by_samples_and_pieces(data, folder, tmp_path):
    rule, lines = SplitRule.of(PACKING, LENGTH), []
    where = tmp_path / "copy"
    where.mkdir()
    for name in ("talk.jsonl", "small.png", "wide.png"):
        shutil.copy(folder / name, where / name)

    def built(folder, **changes):
        source = JsonlSource([str(folder / "talk.jsonl")])
        settings = replace(data, data_root=str(folder), **changes)
        return length_index(tmp_path / "i", "talk", source, settings, MODEL, say=lines.append, split=rule)

    first = built(folder)
    assert built(where).digest == first.digest and lines[-1].startswith("comparing domain talk: 60 of 60")
    shutil.copy(where / "small.png", where / "wide.png")
    os.utime(where / "talk.jsonl", ns=(1, 1))
    with pytest.raises(
        DataError, match=r"sample 21#\d of domain talk has .* its images are not those of then"
    ):
        built(where)
    shutil.copy(folder / "wide.png", where / "wide.png")
    text = (where / "talk.jsonl").read_bytes()
    (where / "talk.jsonl").write_bytes(text.replace(b'"s50"', b'"s5x"'))
    with pytest.raises(DataError, match=r"sample 50 \(.*talk.jsonl:51\) has changed"):
        built(where)


def test_pieces_that_are_not_all_there_are_damage(data, folder, tmp_path):
    rule, source = SplitRule.of(PACKING, LENGTH), JsonlSource([str(folder / "talk.jsonl")])
    index = length_index(tmp_path, "talk", source, data, MODEL, split=rule)
    np.save(index.folder / "pieces.npy", np.array(index.pieces)[1:])
    with pytest.raises(DataError, match="is damaged"):
        length_index(tmp_path, "talk", source, data, MODEL, split=rule)
    (index.folder / "pieces.npy").unlink()
    with pytest.raises(DataError, match="is damaged"):
        length_index(tmp_path, "talk", source, data, MODEL, split=rule)
