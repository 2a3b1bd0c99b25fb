"""``make rl-quickstart``: RLVR from the quickstart's checkpoint on CPU, its curve and what it gained.

python examples/rl/rl_quickstart.py [--quickstart DIR] [--out DIR] [--control shuffled] [--no-checks] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart" / "quickstart.py"
CONFIG = HERE / "rlvr_tiny.yaml"
RANKS = 2
TYPES = ("shape", "count", "box")
GAIN, FORMED_GAIN = 0.15, 0.10  # of the mean reward, and of it among well-formed answers
BLIND = 0.05  # how far the reward with other pictures may be from that without any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace values of rlvr_tiny.yaml"
    )
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="run to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/rl_quickstart"), help="folder for everything")
    parser.add_argument("--seed", type=int, default=1234, help="of sampling (default %(default)s)")
    parser.add_argument("--control", choices=("shuffled",), help="train on answers shuffled within each type")
    parser.add_argument("--no-checks", action="store_true", help="do not fail when a promise does not hold")
    return parser.parse_intermixed_args()


def main() -> int:
    """Checkpoint, prompts, the run, the curve, the table. Returns 0 when every promise held."""
    from make_prompts import make_prompts

    arguments = parse()
    code = pre_train(arguments.quickstart)
    if code:
        return code
    begin = time.monotonic()
    data, run = arguments.out / "data", arguments.out / "run"
    make_prompts(arguments.quickstart / "data", data, shuffled=arguments.seed if arguments.control else None)
    keys = [
        f"run_dir={run}",
        f"data.data_root={arguments.quickstart / 'data'}",
        f"data.tokenizer={arguments.quickstart / 'data' / 'tokenizer.model'}",
        f"train.init_from={arguments.quickstart}",
        f"train.seed={arguments.seed}",
        f"rl.prompts=[{data / 'train.jsonl'}]",
        f"rl.eval_prompts=[{data / 'heldout.jsonl'}]",
        *arguments.overrides,
    ]
    command = [sys.executable, "-m", "megatron_vl", "rl", str(CONFIG), *keys, "--nproc", str(RANKS)]
    code = subprocess.run(command, check=False).returncode
    if code:
        return code
    return report(run, (time.monotonic() - begin) / 60, not arguments.no_checks and not arguments.control)


def pre_train(run: Path) -> int:
    """Make the quickstart's checkpoint if it is not there; returns an exit code."""
    if (run / "scores.json").is_file():
        return 0
    print(f"{run} holds no finished quickstart: it comes first, about 7 minutes on 2 cores", flush=True)
    return subprocess.run([sys.executable, str(QUICKSTART), f"run_dir={run}"], check=False).returncode


def report(run: Path, minutes: float, check: bool) -> int:
    """Print the table and the promises, draw the curve; 1 when a promise does not hold."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "reward/mean" in record]
    before, after = (record for record in (records_of_evaluation(records)[i] for i in (0, -1)))
    draw_curve(training, run / "curve.png")
    print("\nmean reward of held-out questions, sampled at temperature 1")
    print(f"{'type':<10}{'before':>10}{'after':>10}{'swapped':>10}{'no image':>10}")
    for kind in (*TYPES, "all"):
        print(f"{kind:<10}" + "".join(f"{value:>10.3f}" for value in row(kind, before, after)))
    checks = promises(before, after, training)
    for passed, text in checks:
        print(f"{'ok  ' if passed else 'MISS'} {text}")
    print(
        f"\n{len(training)} iterations, {minutes:.1f} minutes. In {run}: metrics.jsonl, curve.png, rollouts/ (every "
        "response; pages with pictures), checkpoints/"
    )
    return 1 if check and not all(passed for passed, _ in checks) else 0


def records_of_evaluation(records: list[dict]) -> list[dict]:
    """Evaluations in order."""
    return [record for record in records if "eval/reward/mean" in record]


def row(kind: str, before: Mapping, after: Mapping) -> list[float]:
    """Rewards before, after, after with other pictures, after without pictures."""
    return [
        reward(before, kind),
        reward(after, kind),
        reward(after, kind, " swapped"),
        reward(after, kind, " no image"),
    ]


def reward(record: Mapping, kind: str, suffix: str = "") -> float:
    """Mean reward of a type in an evaluation; ``all`` = mean over the types."""
    kinds = TYPES if kind == "all" else (kind,)
    return sum(record[f"eval/reward/source/{name}{suffix}"] for name in kinds) / len(kinds)


def promises(before: Mapping, after: Mapping, training: list[dict]) -> list[tuple[bool, str]]:
    """What the example promises, and whether it held."""
    start, end = reward(before, "all"), reward(after, "all")
    wanted = min(GAIN, (1.0 - start) / 2)
    formed = [record["eval/reward/score_well_formed"] for record in (before, after)]
    swapped, blind = reward(after, "all", " swapped"), reward(after, "all", " no image")
    explained = [record["critic/explained_variance"] for record in training]
    third = max(1, len(explained) // 3)
    early, late = sum(explained[:third]) / third, sum(explained[-third:]) / third
    neither = all(0 < reward(before, kind) < 1 for kind in TYPES)
    return [
        (neither, f"no type starts at 0 or 1: {', '.join(f'{k} {reward(before, k):.3f}' for k in TYPES)}"),
        (
            end - start >= wanted,
            f"held-out reward {start:.3f} -> {end:.3f}, at least {wanted:.3f} more is promised",
        ),
        (
            formed[1] - formed[0] >= FORMED_GAIN,
            f"among well-formed answers {formed[0]:.3f} -> {formed[1]:.3f} (all three forms of the questions), at least "
            f"{FORMED_GAIN:g} more",
        ),
        (abs(swapped - blind) <= BLIND, f"with other pictures {swapped:.3f}, without any {blind:.3f}"),
        (late > early, f"explained variance {early:.2f} in the first third, {late:.2f} in the last"),
    ]


def draw_curve(training: list[dict], path: Path) -> None:
    """Reward and explained variance over iterations, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record["step"] for record in training]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for kind in (*TYPES, None):
        name = "reward/mean" if kind is None else f"reward/source/{kind}"
        left.plot(steps, [record.get(name) for record in training], label=kind or "all", lw=1 if kind else 2)
    left.set(title="reward of the training prompts", xlabel="iteration", ylim=(0, 1))
    left.legend()
    right.plot(steps, [record["critic/explained_variance"] for record in training])
    right.set(title="explained variance of the critic", xlabel="iteration")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
