"""The verdict on one response, and on many at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron_vl.errors import ConfigError, MegatronVLError
from megatron_vl.rl.rewards import extract
from megatron_vl.rl.rewards.geometry import Box
from megatron_vl.rl.rewards.grounding import polygon_corners, score_boxes, score_points, score_polygon
from megatron_vl.rl.rewards.gui import score_action
from megatron_vl.rl.rewards.judge import Judge
from megatron_vl.rl.rewards.math_pool import MathPool
from megatron_vl.rl.rewards.mathematics import score_math
from megatron_vl.rl.rewards.numeric import score_count, score_numeric
from megatron_vl.rl.rewards.short import score_choice, score_exact
from megatron_vl.rl.rewards.tally import Tally
from megatron_vl.rl.rewards.task import GROUNDED, Task
from megatron_vl.rl.rewards.verdict import Malformed, NotAnAnswer, Ok, Verdict, VerifierError

STOP, LENGTH = "stop", "length"  # why a response ended: by itself, or at its limit of tokens

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """What verifiers outside of this process need: made once, shared by threads. None where no task asks for it."""

    math: MathPool | None = None
    judge: Judge | None = None

    def require(self, tasks: Sequence[Task]) -> None:
        """Raises ConfigError for tasks that cannot be scored; call it before the first iteration."""
        kinds = {task.kind for task in tasks}
        if "math" in kinds and self.math is None:
            raise ConfigError("there are tasks of kind math and no processes for them; start a MathPool")
        if self.judge is None and ("judge" in kinds or any(task.check_process for task in tasks)):
            raise ConfigError(
                "there are tasks that a judge must score (kind judge, or check_process) and no judge; "
                "name a server, or leave these tasks out"
            )


NO_SERVICES = Services()


def score(task: Task, text: str, finish_reason: str, services: Services = NO_SERVICES) -> Verdict:
    """The verdict on a response.

    text: the whole decoded response. finish_reason: STOP or LENGTH; a response that was cut is malformed whatever it
    says. The same arguments give the same verdict, except for what a judge or a time-out decides.
    """
    services.require([task])
    assert finish_reason in (STOP, LENGTH), finish_reason
    if finish_reason == LENGTH:
        return Malformed("truncated", f"{len(text)} characters")
    try:
        reasoning, answer = extract.split_thinking(text, task.thinking)
        verdict = _grounded(task, answer) if task.kind in GROUNDED else _short(task, text, answer, services)
        if task.check_process and isinstance(verdict, Ok) and verdict.score == 1.0:
            return _with_process(task, reasoning, answer, verdict, services)
        return verdict
    except NotAnAnswer as error:
        return Malformed(error.reason, error.detail)


def score_all(
    tasks: Sequence[Task],
    texts: Sequence[str],
    finish_reasons: Sequence[str],
    services: Services,
    max_error_share: float,
    threads: int = 32,
) -> tuple[list[Verdict], Tally]:
    """Verdicts in the order of the arguments, and their counts.

    Raises TooManyVerifierErrors as soon as more than `max_error_share` of all cannot be decided any more, without
    waiting for the rest: a judge that is down is not asked thousands of times.
    """
    services.require(tasks)
    tally = Tally(total=len(tasks), max_error_share=max_error_share)

    def one(number: int) -> Verdict:
        if tally.too_many:
            return VerifierError("not_asked", "too many verdicts were missing already")
        verdict = _guarded(tasks[number], texts[number], finish_reasons[number], services)
        tally.add(verdict, tasks[number].kind)
        return verdict

    with ThreadPoolExecutor(threads, thread_name_prefix="reward") as pool:
        verdicts = list(pool.map(one, range(len(tasks))))
    tally.check()
    return verdicts, tally


def _guarded(task: Task, text: str, finish_reason: str, services: Services) -> Verdict:
    """A fault of a verifier on one strange response must not end a run of days: it is told, counted and masked."""
    try:
        return score(task, text, finish_reason, services)
    except MegatronVLError:
        raise
    except Exception as error:
        _log.exception("the verifier of kind %s failed on task %s", task.kind, task.digest)
        return VerifierError("exception", f"{type(error).__name__}: {error}"[:200])


def _short(task: Task, text: str, answer: str, services: Services) -> Verdict:
    if task.kind == "format":
        return _format(task, text, answer)
    found = extract.short_answer(answer, task.boxed or task.kind == "math")
    gold = task.answer
    if task.kind == "exact":
        return score_exact(gold, task.case_sensitive, found)
    if task.kind == "choice":
        return score_choice(frozenset(gold), task.choices, found)
    if task.kind == "numeric":
        return score_numeric(gold, task.abs_tolerance, task.rel_tolerance, task.units, found)
    if task.kind == "count":
        return score_count(gold, found)
    if task.kind == "math":
        return score_math(gold, found, services.math)
    assert task.kind == "judge", task.kind
    return services.judge.same_answer(gold, found.text)


def _grounded(task: Task, answer: str) -> Verdict:
    canvas, decay = task.canvas, task.decay
    if task.kind == "gui":
        text, action = extract.structured_answer(answer), json.loads(task.answer)
        return score_action(action, task.action_schema, canvas, decay, task.radius, text)
    text = extract.structured_answer(extract.normalise(answer))
    if task.kind == "box":
        gold: list[Box] = [canvas.box(box) for box in task.answer]
        return score_boxes(gold, canvas, decay, text)
    if task.kind == "point":
        points = [canvas.point(*point) for point in task.answer]
        return score_points(points, canvas, decay, task.radius, text)
    assert task.kind == "polygon", task.kind
    return score_polygon(polygon_corners(task.answer, canvas), canvas, decay, text)


def _format(task: Task, text: str, answer: str) -> Ok:
    """1 for a response of the right form: thinking opened at most once, at the very start, and closed once, then an
    answer, in one box if the task wants a box. Anything else is malformed: there is no third outcome."""
    opened = text.count(extract.THINK)
    if opened > 1 or (opened and not text.lstrip().startswith(extract.THINK)):
        raise NotAnAnswer("format", f"{extract.THINK} stands elsewhere than once at the start")
    if text.count(extract.END_THINK) != int(task.thinking):
        raise NotAnAnswer("format", f"{text.count(extract.END_THINK)} times {extract.END_THINK}")
    if task.boxed:
        extract.short_answer(answer, need_box=True)
    return Ok(1.0)


def _with_process(task: Task, reasoning: str, answer: str, right: Ok, services: Services) -> Verdict:
    """A right answer stays right only if the reasoning leads to it."""
    sound = services.judge.sound(task.question, reasoning, answer.strip())
    if isinstance(sound, VerifierError):
        return sound
    return Ok(sound.score, {**right.parts, "answer": right.score, "process": sound.score})
