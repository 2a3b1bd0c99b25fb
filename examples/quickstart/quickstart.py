"""``make quickstart``: draw pictures, train the tiny model on 4 CPU ranks (TP2 x PP2), score it before and after.

python examples/quickstart/quickstart.py [--train-images N] [--no-checks] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "quickstart.yaml"
HELDOUT = {"after": "heldout.jsonl", "swapped": "heldout_swapped.jsonl", "no image": "heldout_no_image.jsonl"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace values of quickstart.yaml"
    )
    parser.add_argument("--train-images", type=int, help="pictures to train on (default 3000)")
    parser.add_argument("--heldout-questions", type=int, help="held-out questions (default about 1200)")
    parser.add_argument(
        "--no-checks", action="store_true", help="do not fail when a promise of the table does not hold"
    )
    return parser.parse_intermixed_args()


def main() -> int:
    """The parent: data, then the ranks, then the table. Returns 0 when every promise of the table held."""
    from make_data import check_disjoint, make_data
    from make_data import parse_arguments as data_arguments

    from megatron_vl.parallel.launch import STOPPED, run_local
    from megatron_vl.plan.checks import load_checked_run
    from megatron_vl.plan.layout import Layout
    from megatron_vl.train.pretrain import stop_seconds

    arguments, begin = parse(), time.monotonic()
    run_dir = load_checked_run(str(CONFIG), arguments.overrides, None, 4).config.run_dir
    folder = Path(run_dir) / "data"
    options = ["--out", str(folder)]
    for name in ("train_images", "heldout_questions"):
        if getattr(arguments, name) is not None:
            options += ["--" + name.replace("_", "-"), str(getattr(arguments, name))]
    make_data(data_arguments(options))
    check_disjoint(folder)
    loaded = load_checked_run(
        str(CONFIG), data_overrides(folder) + arguments.overrides, None, 4, to_train=True
    )
    layout = Layout.from_config(loaded.config.parallel, 4)
    if loaded.config.parallel.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["QUICKSTART_OVERRIDES"] = json.dumps(data_overrides(folder) + arguments.overrides)
    code = run_local(
        [sys.executable, str(Path(__file__).resolve())], layout, stop_seconds=stop_seconds(loaded.config)
    )
    if code == STOPPED:
        print("stopped; the same command goes on from the newest checkpoint")
    if code:
        return code
    return report(Path(run_dir), folder, loaded.config, time.monotonic() - begin, not arguments.no_checks)


def data_overrides(folder: Path) -> list[str]:
    """The data keys, so that ``run_dir=DIR`` moves everything."""
    return [
        f"data.train=[{folder / 'train.jsonl'}]",
        f"data.eval=[{folder / HELDOUT['after']}]",
        f"data.data_root={folder}",
        f"data.tokenizer={folder / 'tokenizer.model'}",
    ]


def rank() -> int:
    """One of the 4 ranks: score, train, score three times. Returns its exit code, 75 when it was asked to stop."""
    from megatron_vl.data.loader import eval_loader
    from megatron_vl.parallel.launch import STOPPED
    from megatron_vl.parallel.runtime import Phase, reported, start_from_environment
    from megatron_vl.plan.checks import load_checked_run
    from megatron_vl.train.feed import Feed, place_of
    from megatron_vl.train.loop import train
    from megatron_vl.train.prepare import prepare, resume
    from megatron_vl.train.score import score

    overrides = json.loads(os.environ["QUICKSTART_OVERRIDES"])
    loaded = load_checked_run(str(CONFIG), overrides, None, int(os.environ["WORLD_SIZE"]), to_train=True)
    config = loaded.config
    with start_from_environment(config.parallel, config.train.seed) as runtime:
        phase = Phase()
        with reported(runtime, phase):
            run = prepare(loaded, runtime, phase)
            run.stop.listen(config.train.exit_duration_minutes, speaks=runtime.rank == 0)
            progress = resume(run)

            def score_file(name: str) -> dict[str, bool]:
                phase.enter(f"scoring {name}")
                data = replace(config.data, eval=[str(Path(config.data.data_root) / name)])
                loader = eval_loader(
                    data,
                    config.model,
                    place_of(runtime),
                    config.train.micro_batch_size,
                    config.train.global_batch_size,
                )
                right = score(run.parts, Feed(loader, runtime, None))
                loader.close()
                run.say(f"scored {name}: {sum(right.values())} of {len(right)} right")
                return right

            results = {}
            before = run.folder / "before.json"
            if progress.step == 0:
                results["before"] = score_file(HELDOUT["after"])
                if runtime.rank == 0:
                    before.write_text(json.dumps(results["before"]))
            elif runtime.rank == 0 and before.exists():
                results["before"] = json.loads(before.read_text())
            train(run, progress)
            if not run.stop.agreed:
                for column, name in HELDOUT.items():
                    results[column] = score_file(name)
                if runtime.rank == 0:
                    (run.folder / "scores.json").write_text(json.dumps(results))
            run.close()
    return STOPPED if run.stop.agreed else 0


def report(run_dir: Path, folder: Path, config, seconds: float, check: bool) -> int:
    """Print the table, the promises, and where everything is."""
    from scoring import build_table, check_table, format_table

    questions = [json.loads(line) for line in (folder / HELDOUT["after"]).read_text().splitlines()]
    scores = json.loads((run_dir / "scores.json").read_text())
    columns = {name: [right[q["id"]] for q in questions] for name, right in scores.items()}
    rows = build_table([q["type"] for q in questions], [q["answer"] for q in questions], columns)
    print("\n" + format_table(rows) + "\n")
    checks = check_table(rows) if "before" in columns else []
    for one in checks:
        print(f"{'ok  ' if one.passed else 'MISS'} {one.text}")
    print(
        f"\n{config.train.train_steps} steps, {seconds / 60:.1f} minutes in all. In {run_dir}/: data/ (pictures, "
        "questions, tokenizer.model), config.yaml,\nmetrics.jsonl, bad_samples.jsonl (if any), checkpoints/, "
        "scores.json"
    )
    return 1 if check and not all(one.passed for one in checks) else 0


if __name__ == "__main__":
    if "QUICKSTART_OVERRIDES" in os.environ and "RANK" in os.environ:
        sys.exit(rank())
    else:
        sys.exit(main())
