"""Every verifier on the table of `cases.py`, and what holds for all of them."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest

from megatron_vl.rl.rewards.score import LENGTH, STOP, Services, score
from megatron_vl.rl.rewards.task import KEYS, parse_task
from megatron_vl.rl.rewards.verdict import Malformed, Ok, Verdict, VerifierError
from tests.rl.rewards.cases import CASES, ERROR


@pytest.mark.parametrize(
    ("task", "text", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_verdict(task, text, expected, math_pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    verdict = score(parse_task(task), text, STOP, Services(math=math_pool))
    assert time.process_time() - started < 1.0  # of this process: no text keeps it busy
    if isinstance(expected, str):
        assert outcome(verdict) == expected, verdict
    else:
        assert isinstance(verdict, Ok), verdict
        assert verdict.score == pytest.approx(expected, abs=1e-9)
    assert not list(tmp_path.iterdir())  # nothing was carried out


def outcome(verdict: Verdict) -> str:
    if isinstance(verdict, Ok):
        return f"ok {verdict.score}"
    return verdict.reason if isinstance(verdict, Malformed) else ERROR + verdict.reason


def test_the_table_covers_what_is_promised():
    kinds = Counter(json.loads(json.dumps(case[1]))["kind"] for case in CASES)
    assert len(CASES) >= 120 and len({case[0] for case in CASES}) == len(CASES)
    assert set(kinds) == set(KEYS) - {"judge"}  # the judge has its own server and tests


@pytest.mark.parametrize("case", CASES[::7], ids=[case[0] for case in CASES[::7]])
def test_what_was_cut_is_malformed_whatever_it_says(case):
    verdict = score(parse_task(case[1]), case[2], LENGTH, Services(math=object()))  # type: ignore[arg-type]
    assert isinstance(verdict, Malformed) and verdict.reason == "truncated"


def test_no_verdict_depends_on_what_was_thought(math_pool):
    """The thinking may hold any answer: right ones and wrong ones, boxes, coordinates, JSON."""
    noise = r"\boxed{5} \boxed{B} [100, 100, 200, 200] {'action': 'wait'} The answer is 5. NaN " * 3
    for _, record, text, expected in CASES:
        if text.startswith("<think>Let me see.") and record["kind"] not in ("math", "format"):
            verdict = score(
                parse_task(record), text.replace("Let me see.", noise, 1), STOP, Services(math=math_pool)
            )
            got = verdict.score if isinstance(verdict, Ok) else verdict.reason
            assert got == (expected if isinstance(expected, str) else pytest.approx(expected)), text[:200]


def test_verifier_errors_are_never_scores():
    for verdict in (VerifierError("judge_timeout"), Malformed("nan")):
        assert not hasattr(verdict, "score")
    with pytest.raises(AssertionError):
        Ok(float("nan"))
