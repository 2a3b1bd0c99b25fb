"""The process in which `math-verify` runs, started by `math_pool.py` and never imported by it.

    python -P math_worker.py PARENT_PID MEMORY_BYTES ALARM_SECONDS

Reads {"gold", "answer"} as JSON lines, answers each with {"status", "detail"}. It ends when its input ends, when its
parent is another process than at first, and by SIGALRM when one comparison takes longer than ALARM_SECONDS: so nothing
is left running when the parent dies in the middle of one. Only LaTeX is parsed: the extraction of plain expressions of
math-verify 0.9.0 ends in `sympy.parse_expr`, which evaluates Python.

math-verify rounds decimals to 6 places and takes differences below 1e-15 for 0, so that all small numbers are the same
to it. What it calls the same must therefore also be relatively close, see `close`.
"""

import json
import math
import os
import resource
import select
import signal
import sys

PARENT_POLL_SECONDS = 5.0
# Above the error of any number rounded to five significant digits.
RELATIVE = 1e-4
# Below it a number that could be 0 is 0: sympy gives about 1e-125 for roots that cancel.
NOTHING = 1e-90


def main() -> None:
    parent, memory, alarm = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What a library prints must not be taken for an answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.setitimer(signal.ITIMER_REAL, 60.0 + alarm)
    compare = comparison()
    say(out, "ready", "")
    buffered = b""
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        while b"\n" not in buffered:
            if os.getppid() != parent:
                return
            if select.select([0], [], [], PARENT_POLL_SECONDS)[0]:
                data = os.read(0, 65536)
                if not data:
                    return
                buffered += data
        line, _, buffered = buffered.partition(b"\n")
        signal.setitimer(signal.ITIMER_REAL, alarm)
        request = json.loads(line)
        try:
            status, detail = compare(request["gold"], request["answer"])
        except Exception as error:  # the library raises whatever sympy raises; it is told, not hidden
            status, detail = "error", f"{type(error).__name__}: {error}"[:200]
        say(out, status, detail)


def say(out, status: str, detail: str) -> None:
    out.write(json.dumps({"status": status, "detail": detail}) + "\n")
    out.flush()


def comparison():
    """The function (gold, answer) -> (status, detail)."""
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        # No time-out of the library: it would replace the alarm of this process, which also ends C code.
        return parse(
            "\\boxed{" + text + "}",
            latex,
            fallback_mode="no_fallback",
            parsing_timeout=None,
            raise_on_error=True,
        )

    def compare(gold: str, answer: str) -> tuple[str, str]:
        wanted = read(gold)
        if not wanted:
            return "no_gold", ""
        given = read(answer)
        if not given:
            return "no_answer", ""
        same = any(
            verify(one, two, timeout_seconds=None, raise_on_error=True) and close(one, two)
            for one in wanted
            for two in given
        )
        return ("equal" if same else "different"), ""

    compare("1", "1")  # builds the parser, so that the first real comparison is not slower than others
    return compare


def close(one, two) -> bool:
    """Whether two results that are the same to math-verify are also the same within RELATIVE, number by number.

    one, two: of sympy. Lists, intervals and matrices are compared member by member, equations by their right sides,
    expressions at one point. What has no such members or value is left to math-verify.
    """
    from sympy import Interval, MatrixBase, Set, Tuple
    from sympy.core.relational import Relational

    if isinstance(one, Relational) or isinstance(two, Relational):
        return _close_relations(one, two)
    if isinstance(one, Interval) and isinstance(two, Interval):
        return close(one.start, two.start) and close(one.end, two.end)
    if isinstance(one, MatrixBase) and isinstance(two, MatrixBase):
        return all(map(close, one.flat(), two.flat()))
    if isinstance(one, Tuple) and isinstance(two, Tuple):
        return all(map(close, one.args, two.args))
    if isinstance(one, Set) and isinstance(two, Set):
        if not (one.is_FiniteSet and two.is_FiniteSet):
            return True
        pairs = [[close(a, b) for b in two.args] for a in one.args]
        return all(map(any, pairs)) and all(map(any, zip(*pairs)))
    values = [(a, b) for a in _values(one) for b in _values(two)]
    return not values or any(_close_numbers(a, b) for a, b in values)


def _close_relations(one, two) -> bool:
    """Of the same left side, or with a single number or expression: the right sides. Otherwise nothing is known."""
    from sympy.core.relational import Relational

    if isinstance(one, Relational) and isinstance(two, Relational):
        return one.lhs != two.lhs or close(one.rhs, two.rhs)
    return close(getattr(one, "rhs", one), getattr(two, "rhs", two))


def _values(expression) -> list[complex]:
    """The number that an expression is, with fixed numbers for its symbols; of a percentage also without the percent,
    which math-verify takes for the same. Empty where there is none that is finite."""
    from sympy import Float, Rational, UnevaluatedExpr

    percent = UnevaluatedExpr(Rational(1, 100))
    found = []
    for reading in (1, Rational(1, 100)):
        try:
            plain = expression.subs(percent, reading)
            symbols = sorted(plain.free_symbols, key=str)
            at = {symbol: Float(0.7310585786 + 0.1 * number) for number, symbol in enumerate(symbols)}
            found.append(complex(plain.subs(at).evalf(20)))
        except (AttributeError, TypeError, ValueError, OverflowError):
            continue  # text, a function without a name, a value that no float holds
        if plain == expression:
            break
    return [value for value in found if math.isfinite(abs(value))]


def _close_numbers(one: complex, two: complex) -> bool:
    size = max(abs(one), abs(two))
    return size < NOTHING or abs(one - two) <= RELATIVE * size


if __name__ == "__main__":
    main()
