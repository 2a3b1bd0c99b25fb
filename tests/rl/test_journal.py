"""The journal: what was written comes back, what was cut off or spoilt does not, old iterations go."""

import numpy as np
import pytest

from megatron_vl.generate.request import LENGTH, STOP, Prompt, Request, Response
from megatron_vl.rl.journal import Journal, retire
from megatron_vl.rl.rewards.verdict import Malformed, Ok, VerifierError


def response(prompt: str, index: int, version: str = "w1", seed: int | None = None) -> Response:
    tokens = tuple(range(5, 8 + index))
    logprobs = tuple(float(np.float32(-0.1 * (n + 1))) for n in range(len(tokens)))
    finish = STOP if index else LENGTH
    return Response(prompt, index, 100 + index if seed is None else seed, version, tokens, logprobs, finish)


def request(prompt: str, index: int) -> Request:
    return Request(Prompt(prompt, (1, 2)), index, 100 + index)


WANTED = [request("a", 0), request("a", 1), request("b", 0)]


def test_round_trip_over_starts(tmp_path):
    one, two = response("a", 0), response("a", 1)
    for part, verdict in ((one, Ok(0.25, {"iou": 0.25})), (two, Malformed("no_answer", "empty"))):
        with Journal(tmp_path, 3) as journal:
            journal.add_responses([part])
            journal.add_verdicts([(part, verdict)])
    found = Journal(tmp_path, 3).scan("w1", WANTED)
    assert found.responses == {("a", 0): one, ("a", 1): two} and found.damaged == 0
    assert found.verdicts == {("a", 0): Ok(0.25, {"iou": 0.25}), ("a", 1): Malformed("no_answer", "empty")}
    assert Journal(tmp_path, 4).scan("w1", WANTED).responses == {}


@pytest.mark.parametrize("version, seed", [("w2", 100), ("w1", 99)])
def test_other_weights_or_seeds_do_not_count(tmp_path, version, seed):
    with Journal(tmp_path, 0) as journal:
        other = response("a", 0, version, seed)
        journal.add_responses([other])
        journal.add_verdicts([(other, Ok(1.0, {}))])
        found = journal.scan("w1", WANTED)
    assert not found.responses and not found.verdicts


def test_a_verdict_of_other_weights_does_not_count_for_the_new_response(tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.add_responses([response("a", 0, "w0")])
        journal.add_verdicts([(response("a", 0, "w0"), Ok(1.0, {}))])
        journal.add_responses([response("a", 0, "w1")])
        found = journal.scan("w1", WANTED)
    assert set(found.responses) == {("a", 0)} and not found.verdicts


def test_verifier_errors_are_asked_again(tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.add_responses([response("a", 0)])
        journal.add_verdicts([(response("a", 0), VerifierError("timeout"))])
        assert journal.scan("w1", WANTED).verdicts == {}
        journal.add_verdicts([(response("a", 0), Ok(1.0, {}))])
        assert journal.scan("w1", WANTED).verdicts == {("a", 0): Ok(1.0, {})}


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_line_that_was_cut_off_is_drawn_again(tmp_path, cut):
    with Journal(tmp_path, 0) as journal:
        journal.add_responses([response("a", 0), response("a", 1)])
    path = next(journal.folder.glob("responses-*"))
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(tmp_path, 0) as again:
        found = again.scan("w1", WANTED)
        assert set(found.responses) == {("a", 0)} and found.damaged == 1
        again.add_responses([response("a", 1)])  # goes to a file of its own, not behind the torn line
        assert set(again.scan("w1", WANTED).responses) == {("a", 0), ("a", 1)}


def test_a_spoilt_byte_is_found(tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.add_responses([response("a", 0), response("a", 1)])
    path = next(journal.folder.glob("responses-*"))
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    found = Journal(tmp_path, 0).scan("w1", WANTED)
    assert set(found.responses) == {("a", 1)} and found.damaged == 1


def test_old_iterations_go(tmp_path):
    for iteration in (0, 1, 2, 3, 7):
        Journal(tmp_path, iteration)
    (tmp_path / "notes").mkdir()
    retire(tmp_path, newest=3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iteration_000002",
        "iteration_000003",
        "iteration_000007",
        "notes",
    ]
