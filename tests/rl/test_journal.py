"""The journal: what was written comes back, what was cut off or spoilt does not, others' records are left alone."""

import numpy as np
import pytest

from megatron_vl.errors import DataError
from megatron_vl.generate.request import LENGTH, STOP, Response
from megatron_vl.rl.journal import Journal, iteration_folder, old_iterations
from megatron_vl.rl.rewards.verdict import Malformed, Ok, VerifierError


def response(prompt: str, index: int, version: str = "w1", seed: int | None = None) -> Response:
    tokens = tuple(range(5, 8 + index))
    logprobs = tuple(float(np.float32(-0.1 * (n + 1))) for n in range(len(tokens)))
    return Response(
        prompt,
        index,
        100 + index if seed is None else seed,
        version,
        tokens,
        logprobs,
        STOP if index else LENGTH,
    )


SEEDS = {("a", 0): 100, ("a", 1): 101, ("b", 0): 100}


def test_round_trip_over_ranks(tmp_path):
    first, second = (Journal(tmp_path, 3, rank, "s0") for rank in (0, 1))
    one, two = response("a", 0), response("a", 1)
    entries = [first.add_response(one), second.add_response(two)]
    assert second.load(entries[0]) == one and first.load(entries[1]) == two
    first.add_verdict(("a", 0), 100, "w1", Ok(0.25, {"iou": 0.25}))
    second.add_verdict(("a", 1), 101, "w1", Malformed("no_answer", "empty"))
    found = first.scan("w1", SEEDS)
    assert found.entries == {entry.key: entry for entry in entries} and found.damaged == 0
    assert found.verdicts == {("a", 0): Ok(0.25, {"iou": 0.25}), ("a", 1): Malformed("no_answer", "empty")}
    assert Journal(tmp_path, 4, 0, "s0").scan("w1", SEEDS).entries == {}


@pytest.mark.parametrize("version, seed", [("w2", 100), ("w1", 99)])
def test_other_weights_or_seeds_do_not_count(tmp_path, version, seed):
    journal = Journal(tmp_path, 0, 0, "s0")
    journal.add_response(response("a", 0, version, seed))
    journal.add_verdict(("a", 0), seed, version, Ok(1.0, {}))
    found = journal.scan("w1", SEEDS)
    assert not found.entries and not found.verdicts


def test_a_verdict_of_other_weights_does_not_count_for_the_new_response(tmp_path):
    journal = Journal(tmp_path, 0, 0, "s0")
    journal.add_response(response("a", 0, "w0"))
    journal.add_verdict(("a", 0), 100, "w0", Ok(1.0, {}))
    journal.add_response(response("a", 0, "w1"))
    found = journal.scan("w1", SEEDS)
    assert set(found.entries) == {("a", 0)} and not found.verdicts


def test_verifier_errors_are_asked_again(tmp_path):
    journal = Journal(tmp_path, 0, 0, "s0")
    journal.add_response(response("a", 0))
    journal.add_verdict(("a", 0), 100, "w1", VerifierError("timeout"))
    assert journal.scan("w1", SEEDS).verdicts == {}
    journal.add_verdict(("a", 0), 100, "w1", Ok(1.0, {}))
    assert journal.scan("w1", SEEDS).verdicts == {("a", 0): Ok(1.0, {})}


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_line_that_was_cut_off_is_drawn_again(tmp_path, cut):
    journal = Journal(tmp_path, 0, 0, "s0")
    journal.add_response(response("a", 0))
    journal.add_response(response("a", 1))
    journal.close()
    path = next(iteration_folder(tmp_path, 0).glob("responses-*"))
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(tmp_path, 0, 0, "s1")
    found = again.scan("w1", SEEDS)
    assert set(found.entries) == {("a", 0)} and found.damaged == 1
    again.add_response(response("a", 1))  # goes to a file of its own, not behind the torn line
    assert set(again.scan("w1", SEEDS).entries) == {("a", 0), ("a", 1)}


def test_a_spoilt_byte_is_found(tmp_path):
    journal = Journal(tmp_path, 0, 0, "s0")
    entry = journal.add_response(response("a", 0))
    journal.add_response(response("a", 1))
    journal.close()
    path = iteration_folder(tmp_path, 0) / entry.file
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    found = journal.scan("w1", SEEDS)
    assert set(found.entries) == {("a", 1)} and found.damaged == 1
    with pytest.raises(DataError, match="prompt a, sample 0, is no longer there"):
        journal.load(entry)


def test_the_first_of_two_counts(tmp_path):
    for start in ("s1", "s0"):
        Journal(tmp_path, 0, 0, start).add_response(response("a", 0))
    assert (
        Journal(tmp_path, 0, 0, "s2").scan("w1", SEEDS).entries[("a", 0)].file
        == "responses-s0-rank00000.jsonl"
    )


def test_old_iterations():
    names = ["iteration_000002", "iteration_000010", "notes", "iteration_000001"]
    assert old_iterations(names, 2) == ["iteration_000001"]
    assert old_iterations(names, 5) == []
