"""Trials of layouts: one process tree each, with a limit of time, so that none can take another or the whole down."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_vl.bench.measured import WARM_UP, Measured, Trial
from megatron_vl.bench.synthetic import shape_of
from megatron_vl.config.dump import to_yaml
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.launch import launched
from megatron_vl.plan.candidates import Candidate
from megatron_vl.plan.search import Planner, Question, Verdict

OF_RANK = re.compile(r"^\[\w+\]:")  # torch's mark of whose line it is
NO_MEMORY = re.compile(
    r"out of memory|OutOfMemory|can.t allocate memory|cannot allocate memory|bad_alloc", re.I
)
MISTAKE = re.compile(r"^benchmark_throughput\.py: (.+)")
RAISED = re.compile(r"^[\w.]*(?:Error|Exception|Failed)\b.*")
ENDED = re.compile(r"^.*(?: was killed by | ended with exit code ).*?(?=; stopping|$)")
LONGEST = 160  # letters of a reason


def check_possible(planner: Planner, verdicts: Sequence[Verdict]) -> None:
    """Raises ConfigError: fewer GPUs here than ranks, ranks of another launcher, or rows too short for an image."""
    question = planner.question
    if launched():
        raise ConfigError(
            "--measure: starts its own ranks; run it once on one node, not under torchrun or srun"
        )
    if not question.device.on_cpu:
        here = torch.cuda.device_count()
        if here < question.world_size:
            remedy = f"use --gpus {here} or fewer, or" if here else "use --gpu CPU for a small model, or"
            raise ConfigError(
                f"--measure: {question.world_size:,} x {question.device.name} are asked for, and this machine has "
                f"{here} CUDA device(s); {remedy} leave --measure out"
            )
    for verdict in verdicts:
        candidate = verdict.candidate
        shape_of(
            candidate.run(question.config), candidate.layout, question.visual_share, document_tokens(question)
        )


def tried(
    planner: Planner, verdicts: Sequence[Verdict], benchmark: Sequence[str], options: argparse.Namespace
) -> list[Trial]:
    """One trial after another, in `RUN_DIR/measured/PLACE`; a line for each on stderr."""
    question, trials = planner.question, []
    for place, verdict in enumerate(verdicts, 1):
        folder = Path(question.config.run_dir) / "measured" / str(place)
        found = taken(question, verdict.candidate, folder, benchmark, options)
        trials.append(Trial(place, verdict, found))
        told = f"{found.seconds:.4g} s" if isinstance(found, Measured) else found
        print(
            f"trial {place} of {len(verdicts)}: {verdict.candidate.layout}: {told}",
            file=sys.stderr,
            flush=True,
        )
    return trials


def taken(
    question: Question,
    candidate: Candidate,
    folder: Path,
    benchmark: Sequence[str],
    options: argparse.Namespace,
) -> Measured | str:
    """What one layout took, or why nothing is known. The run, its output and its record stay in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    run, record, log = folder / "run.yaml", folder / "step.json", folder / "log"
    record.unlink(missing_ok=True)
    run.write_text(to_yaml(trial_config(question, candidate, folder)), encoding="utf-8")
    command = [
        *benchmark, "step", str(run), "--synthetic", "--nproc", str(question.world_size), "--warmup", str(WARM_UP),
        "--steps", str(options.measure_steps), "--visual-share", str(question.visual_share), "--json", str(record),
    ]  # fmt: skip
    if document_tokens(question):
        command += ["--document-tokens", str(document_tokens(question))]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if question.device.on_cpu else {}
    with log.open("wb") as output:
        code = ended(command, {**os.environ, **hidden}, output, options.measure_seconds)
    if code is None:
        return f"no end within {options.measure_seconds:g} s; see {log}"
    if code == 0 and record.exists():
        return measured_of(json.loads(record.read_text(encoding="utf-8")))
    return f"{reason_of(code, log.read_text(encoding='utf-8', errors='replace'), record.exists())}; see {log}"


def trial_config(question: Question, candidate: Candidate, folder: Path) -> RunConfig:
    """The run in a layout, with weights made up and in a folder of its own: nothing of the run is read or written."""
    run = candidate.run(question.config)
    device = "cpu" if question.device.on_cpu else "cuda"
    return replace(
        run,
        run_dir=str(folder / "run"),
        parallel=replace(run.parallel, device=device),
        train=replace(run.train, init_from_hf=None, init_from=None),
    )


def document_tokens(question: Question) -> int | None:
    """Of packed rows; where the planner takes one document a row, so does the trial."""
    data = question.config.data
    return (question.document_tokens or data.seq_length) if data.packing.enabled else None


def ended(command: Sequence[str], environment: dict[str, str], output: Any, seconds: float) -> int | None:
    """Exit code, None where the time was up. Nothing that the command has started outlives this call."""
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measured_of(record: dict[str, Any]) -> Measured:
    """From what `benchmark_throughput.py step` has written."""
    seconds, machine = record["step_seconds"], record["machine"]
    return Measured(
        seconds["median"], seconds["min"], seconds["max"], record["processor_seconds"], record["memory_bytes"],
        f"{machine['device']} with torch {machine['torch']}", record["data"],
    )  # fmt: skip


def reason_of(code: int, output: str, finished: bool) -> str:
    """Why a trial failed, from its output: memory first, which everything else follows from, then what was raised."""
    if finished:
        return "a loss was not finite"
    lines = [OF_RANK.sub("", line).strip() for line in output.splitlines()]
    without = next((line for line in lines if NO_MEMORY.search(line)), None)
    if without:
        return f"out of memory: {without[:LONGEST]}"
    for pattern in (MISTAKE, RAISED, ENDED):
        found = [match for match in map(pattern.match, lines) if match]
        if found:
            return found[0].group(found[0].lastindex or 0)[:LONGEST]
    return f"exit code {code}"
