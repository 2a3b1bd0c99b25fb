"""``make rl-evidence``: the RL quickstart on three seeds and with shuffled rewards, as a table in docs/rl.md.

    python examples/rl/rl_evidence.py [--quickstart DIR] [--out DIR] [--seeds N N N] [--doc FILE] [section.key=value]

The seeds differ in what is sampled and share one short SFT. In the control every training prompt has the answer of
another one of its type, so its rewards say nothing about the picture. A finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from rl_quickstart import BLIND, GAIN, TYPES, evaluation, reward

HERE = Path(__file__).resolve().parent
DOC = HERE.parents[1] / "docs" / "rl.md"
BEGIN, END = "<!-- rl-evidence: begin -->", "<!-- rl-evidence: end -->"
CONTROL_RISE = 0.03  # more than this is a rise


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace values of rlvr_tiny.yaml"
    )
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="run to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/rl_evidence"), help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1235, 1236], help="one run each")
    parser.add_argument("--doc", type=Path, default=DOC, help="file whose table is rewritten")
    return parser.parse_intermixed_args()


def main() -> int:
    """Every run, then the table. Returns 0 when it shows what is claimed."""
    arguments = parse()
    names = {f"seed {seed}": ["--seed", str(seed)] for seed in arguments.seeds}
    names["shuffled rewards"] = ["--seed", str(arguments.seeds[0]), "--control", "shuffled"]
    rows = {}
    for name, options in names.items():
        folder = arguments.out / name.replace(" ", "_")
        code = run(arguments, folder, options)
        if code:
            return code
        rows[name] = figures(folder)
    checks = claims(rows)
    table = "\n".join(lines(rows, checks))
    print("\n" + table)
    write(arguments.doc, table)
    return 0 if all(held for held, _ in checks) else 1


def run(arguments: argparse.Namespace, folder: Path, options: list[str]) -> int:
    """One run of the quickstart unless it is there; returns an exit code."""
    note = folder / "minutes.json"
    if note.is_file():
        return 0
    command = [sys.executable, str(HERE / "rl_quickstart.py"), "--no-checks", "--out", str(folder)]
    command += ["--quickstart", str(arguments.quickstart), "--prepared", str(arguments.out / "prepare")]
    begin = time.monotonic()
    code = subprocess.run([*command, *options, *arguments.overrides], check=False).returncode
    if code == 0:
        note.write_text(json.dumps((time.monotonic() - begin) / 60))
    return code


def figures(folder: Path) -> dict[str, float]:
    """What the table shows of a run."""
    path = folder / "run"
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "reward/mean" in record]
    before, after = evaluation(path, 0), evaluation(path, training[-1]["step"])
    explained = [record["critic/explained_variance"] for record in training]
    third = max(1, len(explained) // 3)
    return {
        "before": reward(before, "all"),
        "after": reward(after, "all"),
        "formed before": reward(before, "all", formed=True),
        "formed after": reward(after, "all", formed=True),
        "swapped": reward(after, "all", " swapped"),
        "blind": reward(after, "all", " no image"),
        "explained early": sum(explained[:third]) / third,
        "explained late": sum(explained[-third:]) / third,
        "iterations": len(training),
        "minutes": json.loads((folder / "minutes.json").read_text()),
        **{f"{kind} before": reward(before, kind) for kind in TYPES},
        **{f"{kind} after": reward(after, kind) for kind in TYPES},
    }


def claims(rows: dict[str, dict[str, float]]) -> list[tuple[bool, str]]:
    """What must hold, and whether it does."""
    *seeds, control = rows.values()
    found = []
    for name, row in list(rows.items())[:-1]:
        wanted = min(GAIN, (1 - row["before"]) / 2)
        gain, formed = row["after"] - row["before"], row["formed after"] - row["formed before"]
        found.append((gain >= wanted, f"{name}: {gain:+.3f}, at least {wanted:+.3f} promised"))
        found.append((formed >= 0.1, f"{name}: {formed:+.3f} among well-formed answers, +0.100 promised"))
        apart = row["swapped"] - row["blind"]
        found.append((abs(apart) <= BLIND, f"{name}: other pictures against none {apart:+.3f}"))
    rise = control["after"] - control["before"]
    found.append(
        (rise <= CONTROL_RISE, f"shuffled rewards: {rise:+.3f}, at most {CONTROL_RISE:+.3f} promised")
    )
    return found


def lines(rows: dict[str, dict[str, float]], checks: list[tuple[bool, str]]) -> list[str]:
    """The table in Markdown, how it was made, and what of it does not hold."""
    head = ["run", "reward", "well-formed", *TYPES, "other pictures", "no picture", "explained variance"]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        pairs = [("before", "after"), ("formed before", "formed after")]
        pairs += [(f"{kind} before", f"{kind} after") for kind in TYPES]
        cells = [name, *(f"{row[a]:.3f} -> {row[b]:.3f}" for a, b in pairs)]
        cells += [f"{row['swapped']:.3f}", f"{row['blind']:.3f}"]
        cells += [f"{row['explained early']:.2f} -> {row['explained late']:.2f}"]
        text.append("| " + " | ".join(cells) + " |")
    first = next(iter(rows.values()))
    minutes = ", ".join(f"{row['minutes']:.1f}" for row in rows.values())
    text += [
        "",
        f"(`make rl-evidence`, {date.today()}, CPU, {platform.machine()}, 2 ranks, {first['iterations']} iterations; "
        f"minutes of the runs: {minutes}, the first with the short SFT. Mean rewards of held-out questions sampled at "
        "temperature 1; explained variance: first and last third of the iterations.)",
    ]
    text += [f"Does not hold: {told}." for held, told in checks if not held]
    return text


def write(path: Path, table: str) -> None:
    """Put the table between the marks of a file."""
    text = path.read_text(encoding="utf-8")
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise SystemExit(
            f"{path}: the lines {BEGIN!r} and {END!r} are missing; put them where the table belongs"
        )
    path.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
