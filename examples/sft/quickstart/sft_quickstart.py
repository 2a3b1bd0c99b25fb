"""``make sft-quickstart``: two stages of fine-tuning from the quickstart's checkpoint on 4 CPU ranks, and their scores.

python examples/sft/quickstart/sft_quickstart.py [--quickstart DIR] [--out DIR] [--no-checks] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parents[1] / "quickstart" / "quickstart.py"
sys.path[:0] = [str(HERE), str(QUICKSTART.parent)]
RANKS = 4
STAGES = ("stage1", "stage2")
COLUMNS = ("pre-trained", "stage 1", "stage 2")
MOST_WAIT = 0.05  # of the time of a step
SCORED_LENGTH, SCORED_ROWS = 96, 32


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace values of both stages' files"
    )
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="run to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/sft_quickstart"), help="folder for everything")
    parser.add_argument("--images", type=int, default=8000, help="pictures to train on (default %(default)s)")
    parser.add_argument("--no-checks", action="store_true", help="do not fail when a promise does not hold")
    return parser.parse_intermixed_args()


def main() -> int:
    """The parent: checkpoint, data, the stages, scores, table. Returns 0 when every promise held."""
    from instructions import make_instructions
    from instructions import parse_arguments as data_arguments

    from megatron_vl.plan.checks import load_checked_run
    from megatron_vl.train import sft

    arguments, begin = parse(), time.monotonic()
    code = pre_train(arguments.quickstart)
    if code:
        return code
    started, data = time.monotonic(), arguments.out / "data"
    options = ["--out", data, "--heldout", arguments.quickstart / "data", "--images", arguments.images]
    make_instructions(data_arguments([str(option) for option in options]))
    if load_checked_run(*split(stage("stage1", arguments)), None, RANKS).config.parallel.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in STAGES:
        print(f"\n{name}: python -m megatron_vl sft {HERE / name}.yaml --nproc {RANKS}", flush=True)
        code = sft.main([*stage(name, arguments), "--nproc", str(RANKS)])
        if code:
            return code
    code = score_all(arguments)
    if code:
        return code
    seconds = time.monotonic() - started
    return report(arguments, seconds, time.monotonic() - begin - seconds)


def pre_train(run: Path) -> int:
    """Make the quickstart's checkpoint if it is not there; returns an exit code."""
    if (run / "scores.json").is_file():
        return 0
    print(f"{run} holds no finished quickstart: it comes first, about 7 minutes on 2 cores", flush=True)
    return subprocess.run([sys.executable, str(QUICKSTART), f"run_dir={run}"], check=False).returncode


def stage(name: str, arguments: argparse.Namespace) -> list[str]:
    """YAML file of a stage and the keys that ``--out`` and ``--quickstart`` move."""
    out, number = arguments.out, STAGES.index(name)
    domains = ", ".join(
        f"{{name: {domain}, paths: [{out / 'data' / domain / 'train.jsonl'}], modality: {modality}, weight: 1}}"
        for domain, modality in (("text", "text"), ("vision", "multimodal"))
    )
    first = out / STAGES[number - 1] if number else arguments.quickstart
    moved = [
        f"run_dir={out / name}",
        f"data.domains=[{domains}]",
        f"data.packing.index_dir={out / 'index'}",
        f"data.data_root={out / 'data' / 'vision'}",
        f"data.tokenizer={arguments.quickstart / 'data' / 'tokenizer.model'}",
        f"train.init_from={first}",
    ]
    return [str(HERE / f"{name}.yaml"), *moved, *arguments.overrides]


def heldout(arguments: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """What is scored: name -> (file, folder of its pictures)."""
    from instructions import TEXT, VISION

    pictures = arguments.quickstart / "data"
    return {
        "pictures, plainly asked": (pictures / "heldout.jsonl", pictures),
        "pictures, in a form": (arguments.out / "data" / VISION, pictures),
        "descriptions, in a form": (arguments.out / "data" / TEXT, pictures),
    }


def score_all(arguments: argparse.Namespace) -> int:
    """Start ranks that score the three checkpoints; returns an exit code."""
    from megatron_vl.parallel.launch import run_local
    from megatron_vl.plan.checks import load_checked_run
    from megatron_vl.plan.layout import Layout

    config = load_checked_run(*split(stage("stage2", arguments)), None, RANKS).config
    layout = Layout.from_config(config.parallel, RANKS)
    os.environ["SFT_QUICKSTART"] = "score"
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    return run_local(command, layout, stop_seconds=config.parallel.timeout_seconds)


def split(stage_arguments: list[str]) -> tuple[str, list[str]]:
    """(file, overrides)."""
    return stage_arguments[0], stage_arguments[1:]


def rank() -> int:
    """One of the ranks that score: each checkpoint on each held-out file; rank 0 writes scores.json."""
    from megatron_vl.parallel.runtime import Phase, reported, start_from_environment
    from megatron_vl.plan.checks import load_checked_run

    arguments = parse()
    config = load_checked_run(*split(stage("stage2", arguments)), None, RANKS).config
    runs = (arguments.quickstart, *(arguments.out / name for name in STAGES))
    with start_from_environment(config.parallel, config.train.seed) as runtime:
        with reported(runtime, Phase()):
            scores = {
                column: score_run(config, runtime, run, heldout(arguments))
                for column, run in zip(COLUMNS, runs)
            }
        if runtime.rank == 0:
            (arguments.out / "scores.json").write_text(json.dumps(scores))
    return 0


def score_run(config, runtime, run: Path, files: dict[str, tuple[Path, Path]]) -> dict[str, dict[str, bool]]:
    """The newest checkpoint of a run, in whatever layout it was saved: right or wrong by file and sample id."""
    from megatron_vl.checkpoint.resume import choose_first
    from megatron_vl.train.build import build

    stored = choose_first(str(run), config.checkpoint, runtime)
    parts = build(config, runtime, stored.weight, with_optimizer=False)
    found = {name: score_file(parts, file, root) for name, (file, root) in files.items()}
    if runtime.rank == 0:
        told = ", ".join(f"{sum(right)} of {len(right)} {name}" for name, right in tallies(found))
        print(f"scored {stored.folder}: {told}", flush=True)
    return found


def tallies(scores: dict[str, dict[str, bool]]) -> list[tuple[str, list[bool]]]:
    """(name of the file, right or wrong per question)."""
    return [(name, list(right.values())) for name, right in scores.items()]


def score_file(parts, file: Path, root: Path) -> dict[str, bool]:
    """Right or wrong by sample id. Rows of one question each, shorter than those of training."""
    from megatron_vl.data.loader import eval_loader
    from megatron_vl.train.feed import Feed, place_of
    from megatron_vl.train.score import score

    runtime = parts.runtime
    data = replace(parts.config.data, eval=[str(file)], data_root=str(root), seq_length=SCORED_LENGTH)
    batch = (SCORED_ROWS, SCORED_ROWS * runtime.layout.dp)
    loader = eval_loader(data, parts.config.model, place_of(runtime), *batch)
    right = score(parts, Feed(loader, runtime, None))
    loader.close()
    return right


def waited(run: Path) -> float:
    """Share of a stage's step time that went into waiting for data, after the first step, which starts the loading."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line][1:]
    return sum(step["data_wait_seconds"] for step in steps) / sum(step["step_seconds"] for step in steps)


def promises(shares: dict[str, dict[str, float]], waits: dict[str, float]) -> list[tuple[bool, str]]:
    """What the example promises, and whether it held. shares: name of the file -> column -> share of right answers."""
    first, _, last = COLUMNS
    kept, (formed, described) = shares["pictures, plainly asked"], list(shares.values())[1:]
    found = [
        (
            kept[last] >= kept[first],
            f"pictures, plainly asked: {kept[last]:.1%} after stage 2, {kept[first]:.1%} before",
        ),
        (
            formed[last] > formed[first],
            f"pictures, in a form: {formed[last]:.1%} after stage 2, {formed[first]:.1%} before",
        ),
        (
            described[last] > described[first],
            f"descriptions, in a form: {described[last]:.1%}, {described[first]:.1%} before",
        ),
    ]
    found += [
        (w < MOST_WAIT, f"{name}: {w:.1%} of the step time waiting for data") for name, w in waits.items()
    ]
    return found


def report(arguments: argparse.Namespace, seconds: float, before: float) -> int:
    """Print the table and the promises; 1 when one did not hold."""
    scores = json.loads((arguments.out / "scores.json").read_text())
    shares: dict[str, dict[str, float]] = {}
    for column in COLUMNS:
        for name, right in tallies(scores[column]):
            shares.setdefault(name, {})[column] = sum(right) / len(right)
    print(
        f"\n{'exact match, held out':<26}{'questions':>10}" + "".join(f"{column:>14}" for column in COLUMNS)
    )
    for name, by_column in shares.items():
        row = "".join(f"{by_column[column]:>14.1%}" for column in COLUMNS)
        print(f"{name:<26}{len(scores[COLUMNS[0]][name]):>10}{row}")
    checks = promises(shares, {name: waited(arguments.out / name) for name in STAGES})
    print("\n" + "\n".join(f"{'ok  ' if held else 'MISS'} {text}" for held, text in checks))
    spent = f", and {before / 60:.1f} before for the quickstart" if before > 5 else ""
    print(f"\n{seconds / 60:.1f} minutes{spent}. Everything is in {arguments.out}/")
    return 0 if arguments.no_checks or all(held for held, _ in checks) else 1


if __name__ == "__main__":
    sys.exit(rank() if "SFT_QUICKSTART" in os.environ and "RANK" in os.environ else main())
