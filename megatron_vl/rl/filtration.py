"""``python -m megatron_vl filter CONFIG --out DIR``: how often each prompt is answered rightly, and which ones to keep.

Every prompt gets ``--samples`` responses (24 in the report); kept are those neither always right nor always wrong, with
``--needs-image`` those that are answered worse without their image, with ``--checkable`` those whose answer the judge
can check. The responses stay, as a pool for later stages. Prompts are taken in the order of the files, some at a time,
each group with a journal and a done mark, so a run that was stopped or killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_vl.config.load import LoadedRun
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.heartbeat import Phase
from megatron_vl.parallel.launch import launched, read_environment, run_local
from megatron_vl.plan.layout import Layout
from megatron_vl.rl.acceptance import Acceptance, keeps
from megatron_vl.rl.collect import Collected, Scored, collect
from megatron_vl.rl.command import load
from megatron_vl.rl.journal import iteration_name
from megatron_vl.rl.prompt_filters import acceptance_of, ask_blind, check_decisions, image_decisions
from megatron_vl.rl.report import rollout_record
from megatron_vl.rl.rewards.filters import MARGIN, PASSES, Decision
from megatron_vl.rl.run import RlRun
from megatron_vl.train.ahead import first_does
from megatron_vl.train.faults import StopRequest
from megatron_vl.train.pretrain import beats_folder, on_rank, stop_seconds

if TYPE_CHECKING:
    from megatron_vl.parallel.runtime import Runtime

Rules = list[dict[str, Decision]]  # of each rule asked for, by prompt id


def main(argv: Sequence[str]) -> int:
    """Check the run before anything is launched, then launch the ranks or be one of them."""
    arguments = parse(argv)
    world_size = read_environment().world_size if launched() else arguments.nproc
    overrides = [*arguments.overrides, f"run_dir={arguments.out}"]
    loaded = load(arguments.config, overrides, world_size)
    check(arguments, loaded.config.rl.rewards.judge.base_url)
    layout = Layout.from_config(loaded.config.parallel, world_size)
    if arguments.nproc > 1 and not launched():
        command = [sys.executable, "-m", "megatron_vl", "filter", *argv]
        return run_local(command, layout, beats_folder(loaded.config), stop_seconds(loaded.config))
    return filter_prompts(loaded, layout, arguments)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of ``filter``."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vl filter", description="Keep the prompts that are worth training on."
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace the file's"
    )
    parser.add_argument(
        "--out", required=True, help="folder to write; a folder that was begun is gone on with"
    )
    parser.add_argument("--samples", type=int, default=24, help="responses to each prompt (default 24)")
    parser.add_argument("--min-rate", type=float, default=0.0, help="keep above this acceptance (default 0)")
    parser.add_argument("--max-rate", type=float, default=1.0, help="keep below this acceptance (default 1)")
    parser.add_argument(
        "--needs-image",
        type=float,
        nargs="?",
        const=MARGIN,
        metavar="MARGIN",
        help=f"keep prompts with images whose mean score falls by this without them (default {MARGIN:g})",
    )
    parser.add_argument(
        "--checkable",
        action="store_true",
        help=f"keep what the judge calls checkable {PASSES} times of {PASSES}",
    )
    parser.add_argument("--nproc", type=int, default=1, help="start this many local ranks (default 1)")
    return parser.parse_intermixed_args(list(argv))


def check(arguments: argparse.Namespace, judge_url: str) -> None:
    """Raises ConfigError for numbers that keep nothing or mean nothing, and for a rule that nobody can apply."""
    if arguments.checkable and not judge_url:
        raise ConfigError(
            "--checkable needs a judge, and rl.rewards.judge.base_url is empty; name its server"
        )
    if arguments.needs_image is not None and not 0 < arguments.needs_image <= 1:
        raise ConfigError(f"--needs-image {arguments.needs_image:g}: must be above 0 and at most 1")
    if arguments.samples < 2:
        raise ConfigError(
            f"--samples {arguments.samples}: must be at least 2, or every prompt is all or nothing"
        )
    if not 0 <= arguments.min_rate < arguments.max_rate <= 1:
        raise ConfigError(
            f"--min-rate {arguments.min_rate:g} --max-rate {arguments.max_rate:g}: must be 0 <= min < max <= 1"
        )


def filter_prompts(loaded: LoadedRun, layout: Layout, arguments: argparse.Namespace) -> int:
    """Be one rank. Returns 0 at the end, 75 when it was stopped and may be started again."""

    def work(runtime: Runtime, phase: Phase, stop: StopRequest) -> None:
        from megatron_vl.rl.run import prepare

        run = prepare(loaded, runtime, phase)
        run.stop = stop
        try:
            run_filter(run, arguments)
        finally:
            run.close()

    return on_rank(loaded.config, layout, work)


def run_filter(run: RlRun, arguments: argparse.Namespace) -> None:
    """All groups that are not done, then the kept prompts and the report."""
    run.stop.defer()
    size, folder = run.config.rl.rollout.prompts_per_iteration, run.folder
    groups = range(0, len(run.prompts), size)
    done = groups_done(run, len(groups))
    for group, start in enumerate(groups):
        if group in done:
            continue
        pool = folder / "responses" / f"{iteration_name(group)}.jsonl"
        run.phase.enter("reading prompts", group, run.step_seconds)
        prompts, refused = run.prompts.read(range(start, min(start + size, len(run.prompts))))
        run.refused.add(refused)
        collected = collect(run, prompts, arguments.samples, group, folder / "journal", run.config.train.seed)
        asked = collected is not None and arguments.needs_image is not None
        blind = ask_blind(run, prompts, arguments.samples, group, folder) if asked else {}
        if collected is None or blind is None:
            run.say(
                f"stopped after {group} of {len(groups)} groups; start the same command again to continue"
            )
            return
        rules: Rules = []

        def apply(report, prompts=prompts, collected=collected, blind=blind, rules=rules) -> None:
            if arguments.needs_image is not None:
                seen = acceptance_of(collected, run.config.rl.rewards.accept_at)
                rules.append(image_decisions(seen, blind, arguments.needs_image))
            if arguments.checkable:
                rules.append(check_decisions(run, prompts))

        first_does(apply, run.runtime, run.phase, run.say)
        if run.runtime.rank == 0:
            write_group(pool, collected, arguments, run.config.rl.rewards.accept_at, rules)
        run.say(f"filter: {min(start + size, len(run.prompts))} of {len(run.prompts)} prompts")
    if run.runtime.rank == 0:
        run.say(finish(folder, len(groups)))


def groups_done(run: RlRun, groups: int) -> set[int]:
    """Groups that earlier starts have finished, as rank 0 sees them."""
    found: list = [set()]
    if run.runtime.rank == 0:
        folder = run.folder / "responses"
        found[0] = {group for group in range(groups) if (folder / f"{iteration_name(group)}.jsonl").exists()}
    dist.broadcast_object_list(found, src=0)
    return found[0]


def write_group(
    pool: Path, collected: Collected, arguments: argparse.Namespace, accept_at: float, rules: Rules
) -> None:
    """The group's kept prompts first, then its responses, whose file says that the group is done."""
    lines = {s.response.prompt_id: s for s in collected.scored}
    records = [
        prompt_record(
            lines[name],
            acceptance,
            keeps(acceptance, arguments.min_rate, arguments.max_rate),
            [decisions[name] for decisions in rules],
        )
        for name, acceptance in acceptance_of(collected, accept_at).items()
    ]
    write_lines(pool.parent.parent / "prompts" / pool.name, records)
    write_lines(
        pool, [{**rollout_record(s, {}), "tokens": list(s.response.tokens)} for s in collected.scored]
    )


def prompt_record(
    scored: Scored, acceptance: Acceptance, some_accept: bool, decisions: Sequence[Decision]
) -> dict:
    """The line of a prompt as it was, with what was found out."""
    found = {
        "class": acceptance.kind,
        "accepted": acceptance.accepted,
        "responses": len(acceptance.rewards),
        "masked": acceptance.masked,
        "mean_score": sum(acceptance.rewards) / max(len(acceptance.rewards), 1),
    }
    return {
        **json.loads(scored.prompt.line.data),
        "id": scored.response.prompt_id,
        "acceptance": found,
        "rules": {decision.reason: decision.detail for decision in decisions},
        "kept": some_accept and all(decision.keep is True for decision in decisions),
    }


def finish(folder: Path, groups: int) -> str:
    """Write kept.jsonl and report.json; the report as a line. Counts are over all groups, this start's and earlier."""
    records = [
        json.loads(line)
        for group in range(groups)
        for line in (folder / "prompts" / f"{iteration_name(group)}.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    kept = [{k: v for k, v in record.items() if k != "kept"} for record in records if record["kept"]]
    write_lines(folder / "kept.jsonl", kept)
    classes = Counter(record["acceptance"]["class"] for record in records)
    reasons = Counter(reason for record in records for reason in record["rules"])
    report = {
        "prompts": len(records),
        "kept": len(kept),
        "classes": dict(sorted(classes.items())),
        "rules": dict(sorted(reasons.items())),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    listed = ", ".join(
        f"{kind} {count}" for kind, count in (*sorted(classes.items()), *sorted(reasons.items()))
    )
    return f"kept {len(kept)} of {len(records)} prompts ({listed}); {folder / 'kept.jsonl'}"


def write_lines(path: Path, records: Sequence[dict]) -> None:
    """A JSON-lines file, complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    aside.replace(path)
