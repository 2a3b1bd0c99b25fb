"""Exact match in every layout equals a plain argmax over whole logits on one rank."""

from pathlib import Path

import pytest

from tests.data.tiny import chat, write_jsonl
from tests.train import on_ranks
from tests.train.tiny_run import LAYOUTS, load, make_files, read_lines, write_config

BAD = "no such picture"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """10 held-out samples in steps of 8: the second is filled up; one of them is refused."""
    folder = make_files(tmp_path_factory.mktemp("score"), heldout=9)
    lines = read_lines(folder / "eval.jsonl")
    write_jsonl(folder / "eval.jsonl", [*lines[:4], chat("What?", "red", "missing.png", id=BAD), *lines[4:]])
    return write_config(folder, folder / "run", eval_interval=100)


@pytest.fixture(scope="module")
def answers(world, config) -> dict[str, list[int]]:
    """What the untrained model says, on every third sample with one token changed, first or last in turn."""
    (said,) = world.run(1, on_ranks.greedy, load(config))
    assert len(said.pop(BAD)) == 0 and len(said) == 9 and len({tuple(tokens) for tokens in said.values()}) > 2
    for number, tokens in enumerate(said.values()):
        if number % 3 == 0:
            tokens[-(number % 2)] ^= 1
    return said


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("1", []),
        ("tp2pp2", ["parallel.sequence_parallel=true"]),
        ("cp2", []),
        ("dp2tp2", ["train.micro_batch_size=1"]),
        ("tp2pp2", ["parallel.virtual_pipeline_model_parallel_size=2", "parallel.vision_placement=all"]),
    ],
    ids=["1", "tp2sppp2", "cp2", "dp2tp2", "tp2pp2vpp2"],
)
def test_exact_match_equals_a_plain_argmax(world, config, answers, layout, keys):
    ranks = world.run(LAYOUTS[layout][0], on_ranks.scored, load(config, layout, *keys), answers)
    expected = {name: number % 3 != 0 for number, name in enumerate(answers)}
    assert all(rank == expected for rank in ranks), (
        "filler or the refused sample was counted, or a rank differs"
    )
    assert 0 < sum(expected.values()) < len(expected)


def test_a_model_whose_vocabulary_tp_does_not_divide(world, config):
    """511 tokens on two ranks: the padding row is never the best."""
    keys = ["model.text.vocab_size=511"]
    (said,) = world.run(1, on_ranks.greedy, load(config, "1", *keys))
    said.pop(BAD)
    for rank in world.run(4, on_ranks.scored, load(config, "tp2pp2", *keys), said):
        assert rank == dict.fromkeys(said, True)
