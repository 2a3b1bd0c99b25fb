"""The process in which `math-verify` runs, started by `math_pool.py` and never imported by it.

    python -P math_worker.py PARENT_PID MEMORY_BYTES ALARM_SECONDS

Reads {"gold", "answer"} as JSON lines, answers each with {"status", "detail"}. It ends when its input ends, when its
parent is another process than at first, and by SIGALRM when one comparison takes longer than ALARM_SECONDS: so nothing
is left running when the parent dies in the middle of one. Only LaTeX is parsed: the extraction of plain expressions of
math-verify 0.9.0 ends in `sympy.parse_expr`, which evaluates Python.
"""

import json
import os
import resource
import select
import signal
import sys

PARENT_POLL_SECONDS = 5.0


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
        same = verify(wanted, given, timeout_seconds=None, raise_on_error=True)
        return ("equal" if same else "different"), ""

    compare("1", "1")  # builds the parser, so that the first real comparison is not slower than others
    return compare


if __name__ == "__main__":
    main()
