"""``make rl-quickstart``: a short SFT and RLVR from the quickstart's checkpoint on CPU, the curve and what it gained.

python examples/rl/rl_quickstart.py [--quickstart DIR] [--out DIR] [--seed N] [--control shuffled] [--no-checks] ...
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart" / "quickstart.py"
PREPARE, CONFIG = HERE / "prepare.yaml", HERE / "rlvr_tiny.yaml"
RANKS = 2
TYPES = ("position", "count", "box")
GAIN, FORMED_GAIN = 0.15, 0.10  # of the mean reward, and of it among well-formed answers
BLIND = 0.05  # how far the reward with other pictures may be from that without any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace values of rlvr_tiny.yaml"
    )
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="run to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/rl_quickstart"), help="folder for everything")
    parser.add_argument(
        "--prepared",
        type=Path,
        help="run of the short SFT to start from (default OUT/prepare, made if missing)",
    )
    parser.add_argument(
        "--pictures", type=int, help="new pictures to train on (default those of make_prompts.py)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of sampling (default %(default)s)")
    parser.add_argument("--control", choices=("shuffled",), help="train on answers shuffled within each type")
    parser.add_argument("--no-checks", action="store_true", help="do not fail when a promise does not hold")
    return parser.parse_intermixed_args()


def main() -> int:
    """Checkpoint, data, the short SFT, the run, the curve, the table. Returns 0 when every promise held."""
    from make_prompts import make_prompts
    from make_prompts import parse_arguments as data_arguments

    arguments = parse()
    code = pre_train(arguments.quickstart)
    if code:
        return code
    begin = time.monotonic()
    data, run = arguments.out / "data", arguments.out / "run"
    options = ["--quickstart", arguments.quickstart / "data", "--out", data]
    if arguments.pictures:
        options += ["--prepare", arguments.pictures, "--prompts", arguments.pictures]
    if arguments.control:
        options += ["--shuffled", arguments.seed]
    make_prompts(data_arguments([str(option) for option in options]))
    common = [f"data.data_root={data}", f"data.tokenizer={arguments.quickstart / 'data' / 'tokenizer.model'}"]
    prepared = arguments.prepared or arguments.out / "prepare"
    if not (prepared / "checkpoints" / "latest").is_file():
        code = megatron_vl("sft", PREPARE, *prepare_keys(arguments, data, prepared), *common)
        if code:
            return code
    keys = [
        f"run_dir={run}",
        f"train.init_from={prepared}",
        f"train.seed={arguments.seed}",
        f"rl.prompts=[{data / 'train.jsonl'}]",
        f"rl.eval_prompts=[{data / 'heldout.jsonl'}]",
    ]
    code = megatron_vl("rl", CONFIG, *keys, *common, *arguments.overrides)
    if code:
        return code
    return report(run, (time.monotonic() - begin) / 60, not arguments.no_checks and not arguments.control)


def megatron_vl(command: str, config: Path, *keys: str) -> int:
    """Run a command of the library on RANKS ranks; returns its exit code."""
    words = [sys.executable, "-m", "megatron_vl", command, str(config), *keys, "--nproc", str(RANKS)]
    return subprocess.run(words, check=False).returncode


def prepare_keys(arguments: argparse.Namespace, data: Path, run: Path) -> list[str]:
    """What ``--out`` and ``--quickstart`` move in prepare.yaml."""
    return [
        f"run_dir={run}",
        f"data.domains=[{{name: pictures, paths: [{data / 'prepare.jsonl'}], weight: 1}}]",
        f"data.packing.index_dir={arguments.out / 'index'}",
        f"train.init_from={arguments.quickstart}",
    ]


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
    before, after = evaluation(run, 0), evaluation(run, training[-1]["step"])
    draw_curve(training, run / "curve.png")
    print("\nmean reward of held-out questions, sampled at temperature 1")
    print(f"{'type':<10}{'before':>10}{'after':>10}{'swapped':>10}{'no image':>10}")
    for kind in (*TYPES, "all"):
        shown = (
            reward(before, kind),
            *(reward(after, kind, suffix) for suffix in ("", " swapped", " no image")),
        )
        print(f"{kind:<10}" + "".join(f"{value:>10.3f}" for value in shown))
    checks = promises(before, after, [record["critic/explained_variance"] for record in training])
    for passed, text in checks:
        print(f"{'ok  ' if passed else 'MISS'} {text}")
    print(
        f"\n{len(training)} iterations, {minutes:.1f} minutes. In {run}: metrics.jsonl, curve.png, rollouts/ (every "
        "response; pages with pictures), checkpoints/"
    )
    return 1 if check and not all(passed for passed, _ in checks) else 0


def evaluation(run: Path, step: int) -> list[dict]:
    """Every held-out response after an iteration."""
    path = run / "evaluation" / f"step_{step:06d}" / f"iteration_{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reward(responses: Sequence[Mapping], kind: str, suffix: str = "", formed: bool = False) -> float:
    """Mean reward of a type; ``all`` = mean over the types. formed: among answers that are one, whatever they say."""
    if kind == "all":
        return sum(reward(responses, one, suffix, formed) for one in TYPES) / len(TYPES)
    rewards = [
        r["reward"]
        for r in responses
        if r["source"] == kind + suffix and (r["outcome"] == "ok" or not formed)
    ]
    return sum(rewards) / max(len(rewards), 1)


def promises(before: list[dict], after: list[dict], explained: list[float]) -> list[tuple[bool, str]]:
    """What the example promises, and whether it held. explained: variance of the returns, by iteration."""
    start, end = reward(before, "all"), reward(after, "all")
    wanted = min(GAIN, (1.0 - start) / 2)
    formed, formed_end = reward(before, "all", formed=True), reward(after, "all", formed=True)
    swapped, blind = reward(after, "all", " swapped"), reward(after, "all", " no image")
    third = max(1, len(explained) // 3)
    early, late = sum(explained[:third]) / third, sum(explained[-third:]) / third
    starts = {kind: reward(before, kind) for kind in TYPES}
    return [
        (
            all(0 < value < 1 for value in starts.values()),
            f"no type starts at 0 or 1: {', '.join(f'{kind} {value:.3f}' for kind, value in starts.items())}",
        ),
        (end - start >= wanted, f"held-out reward {start:.3f} -> {end:.3f}; {wanted:.3f} more is promised"),
        (
            formed_end - formed >= FORMED_GAIN,
            f"among well-formed answers {formed:.3f} -> {formed_end:.3f}; {FORMED_GAIN:g} more is promised",
        ),
        (
            abs(swapped - blind) <= BLIND,
            f"with other pictures {swapped:.3f}, without any {blind:.3f}; within {BLIND:g} is promised",
        ),
        (
            late > early,
            f"explained variance {early:.2f} in the first third of the iterations, {late:.2f} in the last",
        ),
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
