"""What is drawn is what is trained on: rows found by step and number, samples by number and id."""

from dataclasses import replace

import pytest

from megatron_vl.config.mixture import DomainConfig, PackingConfig
from megatron_vl.config.schema import RunConfig, TrainConfig
from megatron_vl.data.bad_samples import BadSampleLog
from megatron_vl.data.draw.find import dense_place, find_row, find_sample
from megatron_vl.data.draw.sample import describe_sample, sample_lines
from megatron_vl.data.loader import Place
from megatron_vl.data.order import rows_for_step
from megatron_vl.data.training import training_loader
from megatron_vl.data.turns import WHOLE
from megatron_vl.errors import DataError
from megatron_vl.plan.layout import Layout
from tests.data.tiny import MODEL, chat, make_data, write_jsonl

PACKED = PackingConfig(enabled=True, pad_multiple=8, look_ahead_rows=8, index_workers=0)
SIZE, STEP = 4, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("found")
    data = make_data(folder, seq_length=128)
    images = [[], ["small.png"], ["wide.png"]]
    records = [chat("What? " + "and " * (n % 5), "red", *images[n % 3], id=f"s{n}") for n in range(60)]
    path = write_jsonl(folder / "train.jsonl", [*records, b"{broken"])
    train = TrainConfig(train_steps=4, global_batch_size=SIZE, micro_batch_size=1)
    return RunConfig(model=MODEL, data=replace(data, train=[path]), train=train, run_dir=str(folder / "run"))


def with_(run: RunConfig, micro_batch_size: int = 1, **data) -> RunConfig:
    data = replace(run.data, **data)
    return replace(run, data=data, train=replace(run.train, micro_batch_size=micro_batch_size))


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.mark.parametrize(
    "micro, data",
    [(1, {}), (2, {}), (1, {"packing": PACKED}), (2, {"packing": replace(PACKED, enabled=False)})],
    ids=["dense", "dense-2", "packed", "planned-dense"],
)
def test_rows_are_those_of_training(run, micro, data):
    """Every row of a step once, as the loader of its rank has it."""
    if "packing" in data and micro == 2:
        data["domains"] = [DomainConfig("all", run.data.train, weight=1.0)]
    config = with_(run, micro, **data)
    layout = Layout(dp=2)
    drawn = [find_row(config, layout, STEP, row, quiet) for row in range(SIZE)]
    found = sorted(tuple(d.sample_id for d in row.documents if d.length) for row in drawn)
    trained = []
    for rank in range(2):
        loader = training_loader(config, Place(rank, 2, None), 4, 60, BadSampleLog("", write=False))
        loader.seek(STEP)
        for batch in loader.next_step():
            names = [name for name, length in zip(batch.sample_ids, batch.doc_lengths) if length]
            trained += [tuple(names)] if batch.cu_seqlens else [(name,) for name in names]
            mine = [row for row in drawn if f"rank {rank}" in row.title]
            assert sum(row.num_scored for row in mine) > 0
        loader.close()
    assert found == sorted(trained) and len({row.title for row in drawn}) == SIZE


def test_dense_places_are_those_of_the_order():
    seen = [dense_place(row, 12, 2, 3) for row in range(12)]
    for row, (rank, number, within) in enumerate(seen):
        assert rows_for_step(0, 12, 2, rank, 3)[number][within] == row


@pytest.mark.parametrize("step, row", [(4, 0), (-1, 0), (0, 4), (0, -1)])
def test_a_row_that_is_not_there(run, step, row):
    with pytest.raises(DataError, match=f"step {step}, row {row}: the run has steps 0 to 3 of rows 0 to 3"):
        find_row(run, Layout(), step, row, quiet)


def test_samples_by_number_and_by_id(run):
    assert find_sample(run, None, 7, None, quiet)[0].parse().id == "s7"
    raw, _, domain = find_sample(run, "train", None, "s31", quiet)
    assert (raw.parse().id, domain) == ("s31", "train") and raw.line == 32
    broken, *_ = find_sample(run, None, None, "train.jsonl:61", quiet)
    assert broken.data == b"{broken"
    with pytest.raises(DataError, match="sample 61: domain train has 61 samples"):
        find_sample(run, None, 61, None, quiet)
    with pytest.raises(DataError, match="none of the 61 samples of domain train has this id"):
        find_sample(run, None, None, "nobody", quiet)
    with pytest.raises(DataError, match="domain web: the run has train"):
        find_sample(run, "web", 0, None, quiet)


def test_pieces_of_a_conversation(run, tmp_path):
    """A cut sample says into what; each piece is found by its id, is in a row under it, and shows its own turns."""
    turns = [("user", "What colour? " * 4), ("assistant", "red")] * 6
    long = {"id": "a", "messages": [{"role": role, "content": text} for role, text in turns]}
    path = write_jsonl(tmp_path / "cut.jsonl", [chat("What?", "red", id=f"s{n}") for n in range(6)] + [long])
    packing = replace(PACKED, overlong="split_turns")
    config = replace(with_(run, train=[path], packing=packing), run_dir=str(tmp_path / "run"))
    raw, piece, domain = find_sample(config, None, 6, None, quiet)
    whole, _ = describe_sample(raw, domain, config, piece)
    names = whole.cut_into
    assert piece == WHOLE and whole.refused is None and names[:2] == ("a#1", "a#2")
    assert f"cut at turns into {len(names)} documents, a#1 to a#{len(names)}" in sample_lines(whole)
    lengths = {}
    for name in names:
        raw, piece, _ = find_sample(config, None, None, name, quiet)
        part, _ = describe_sample(raw, domain, config, piece)
        assert part.id == name and part.refused is None and not part.cut_into
        lengths[name] = sum(piece.count for piece in part.pieces)
    assert sum(lengths.values()) == sum(piece.count for piece in whole.pieces)
    rows = [find_row(config, Layout(), step, row, quiet) for step in range(4) for row in range(SIZE)]
    drawn = {d.sample_id: d.length for row in rows for d in row.documents}
    assert {name: drawn[name] for name in names} == lengths and "a" not in drawn
    with pytest.raises(DataError, match="has this id"):
        find_sample(config, None, None, f"a#{len(names) + 1}", quiet)
    refusing = replace(config, data=replace(config.data, packing=PACKED))
    assert describe_sample(raw, domain, refusing)[0].refused.reason == "too_long"
