"""The parity check: every asked layout against the reference file, one row each."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megatron_vl.checkpoint.hf_load import HFCheckpoint
from megatron_vl.config.hf_config import model_from_hf
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import (
    DataConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.world import LocalWorld, RankFailed
from megatron_vl.parity.compare import BF16, FP32, Assembled, Tolerances, distances, gradient_distances
from megatron_vl.parity.layouts import ALL, PACKED, NamedLayout, parse_layout
from megatron_vl.parity.on_rank import Job, run
from megatron_vl.parity.packed_cases import CASES, PackedCheck, PackedRow, named_cases
from megatron_vl.parity.reference import Document, Reference, arrange, documents, read_reference
from megatron_vl.plan.checks import check_layout
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.stages import plan_stages

STEP_TOLERANCE = 1e-5
PLACEMENTS = ("data", "tensor", "all")


@dataclass
class Row:
    """One line of the table. Distances are relative; None where nothing ran. ``diverged``: with --bisect."""

    layout: str
    placement: str
    format: str
    status: str
    rule: str = ""
    loss_rel: float | None = None
    logits_rel: float | None = None
    worst_output: float | None = None
    worst_output_name: str = ""
    worst_grad: float | None = None
    worst_name: str = ""
    steps_rel: float | None = None
    diverged: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """One layout, placement and row format to check."""

    named: NamedLayout
    packed: bool

    @property
    def layout(self) -> Layout:
        return Layout.from_config(self.named.parallel, self.named.world_size)

    def row(self, status: str, rule: str = "") -> Row:
        placement = self.named.parallel.vision_placement
        return Row(self.named.name, placement, "packed" if self.packed else "dense", status, rule)


@dataclass(frozen=True)
class Setting:
    """What all cases share."""

    directory: Path
    model: ModelConfig
    reference: Reference
    docs: list[Document]
    tolerances: Tolerances
    dtype: str
    steps: int
    lr: float
    bisect: bool


def refusal(case: Case, setting: Setting) -> str:
    """The rule that forbids this layout for this model, empty when none does."""
    batches = arrange(setting.docs, case.layout, case.packed)
    train = TrainConfig(micro_batch_size=1, global_batch_size=case.layout.dp * len(batches.rows[0]))
    problems = check_layout(
        setting.model,
        case.named.parallel,
        train,
        DataConfig(seq_length=batches.seq_length),
        case.named.world_size,
    )
    return "; ".join(str(p) for p in problems)


def check_case(world: LocalWorld, case: Case, setting: Setting, baseline: list[float] | None) -> Row:
    """Run one case on the world and compare it."""
    rule = refusal(case, setting)
    if rule:
        return case.row("refused", rule)
    row, begin = case.row("ok"), time.monotonic()
    layout = case.layout
    batches = arrange(setting.docs, layout, case.packed)
    config = RunConfig(
        model=setting.model,
        parallel=parallel_of(case.named, setting),
        precision=PrecisionConfig(params=setting.dtype),
        data=DataConfig(seq_length=batches.seq_length),
        optim=OptimConfig(clip_grad=1.0),
    )
    job = Job(config, str(setting.directory), batches, steps=0)
    seen = world.run(layout.world_size, run, job)
    assembled = Assembled(seen, layout, batches, setting.docs, setting.model)
    stages = plan_stages(setting.model.text.num_layers, layout.pp, layout.vpp)
    stage_of = {number: s.pp_rank for rank in stages for s in rank for number in s.layers}
    outputs = distances(assembled, setting.reference, stage_of)
    gradients = gradient_distances(assembled, setting.reference)
    judge(row, outputs, gradients, setting)
    if setting.steps:
        losses = world.run(
            layout.world_size, run, Job(config, str(setting.directory), batches, setting.steps, setting.lr)
        )
        judge_steps(row, losses[0].losses, baseline)
    row.seconds = round(time.monotonic() - begin, 2)
    return row


def parallel_of(named: NamedLayout, setting: Setting) -> ParallelConfig:
    """The layout's keys; fp32 runs on the torch layers, because Transformer Engine's fp32 products use TF32."""
    if setting.dtype == "fp32":
        return replace(named.parallel, layer_backend="torch")
    return named.parallel


def judge(row: Row, outputs: dict[str, float], gradients: dict[str, float], setting: Setting) -> None:
    """Fill the distances of a row and its status."""
    bound = setting.tolerances
    row.loss_rel = outputs.get("loss")
    row.logits_rel = max((v for n, v in outputs.items() if n.endswith(".logits")), default=None)
    # of the outputs, the one that uses up most of its own bound
    row.worst_output_name = max(outputs, key=lambda n: outputs[n] / bound.of(n))
    row.worst_output = outputs[row.worst_output_name]
    if gradients:
        row.worst_name = max(gradients, key=gradients.get)
        row.worst_grad = gradients[row.worst_name]
    over = [n for n, v in outputs.items() if not v <= bound.of(n)]
    over_gradients = [n for n, v in gradients.items() if not v <= bound.gradient]
    if over or over_gradients:
        row.status = "failed"
        listed = [f"{n} {outputs[n]:.1e}" for n in over] + [
            f"grad {n} {gradients[n]:.1e}" for n in over_gradients
        ]
        row.rule = (
            f"{len(listed)} over the bound: " + ", ".join(listed[:5]) + (" ..." if len(listed) > 5 else "")
        )
    if setting.bisect:
        row.diverged = over[0] if over else ("gradients only" if over_gradients else "nothing")


def judge_steps(row: Row, losses: list[float], baseline: list[float] | None) -> None:
    """Compare a trajectory with that of layout 1, step by step."""
    if baseline is None:
        row.steps_rel = 0.0
        return
    far = [abs(a - b) / abs(b) for a, b in zip(losses, baseline, strict=True)]
    row.steps_rel = max(far, key=lambda value: (value != value, value))  # NaN is the farthest
    if not row.steps_rel <= STEP_TOLERANCE:
        row.status = "failed"
        row.rule = (row.rule + "; " if row.rule else "") + f"loss of a step is off by {row.steps_rel:.1e}"


def trajectory(world: LocalWorld, setting: Setting, device: str) -> list[float] | None:
    """Losses of the steps in layout 1, dense: what the others are compared with."""
    if not setting.steps:
        return None
    named = parse_layout("1", "data", device)
    batches = arrange(setting.docs, Layout(), packed=False)
    config = RunConfig(
        model=setting.model,
        parallel=parallel_of(named, setting),
        precision=PrecisionConfig(params=setting.dtype),
        data=DataConfig(seq_length=batches.seq_length),
    )
    job = Job(config, str(setting.directory), batches, setting.steps, setting.lr)
    return world.run(1, run, job)[0].losses


def check_all(setting: Setting, cases: list[Case], device: str) -> Iterator[Row]:
    """All cases in turn on one world; a rank that fails ends its case, and a fresh world goes on."""
    size = max([c.named.world_size for c in cases if not refusal(c, setting)], default=1)
    world, baseline = LocalWorld(size, device), None
    try:
        baseline = trajectory(world, setting, device)
        for case in cases:
            try:
                yield check_case(world, case, setting, baseline)
            except RankFailed as error:
                yield case.row("failed", str(error).splitlines()[0])
                world.close()
                world = LocalWorld(size, device)
    finally:
        world.close()


def make_cases(layouts: str, placements: str, formats: str, device: str) -> list[Case]:
    """The cases that the command line asks for.

    Raises:
        ConfigError: an unknown layout, placement or format.
    """
    names = list(ALL) if layouts == "all" else [n for n in layouts.split(",") if n]
    for given, known, what in (
        (placements, PLACEMENTS, "placement"),
        (formats, ("dense", "packed"), "format"),
    ):
        bad = [g for g in given.split(",") if g not in known]
        if bad:
            raise ConfigError(f"{what} {bad[0]!r} is unknown; use {' or '.join(known)}")
    return [
        Case(parse_layout(name, placement, device), packed=form == "packed")
        for name in names
        for placement in placements.split(",")
        for form in formats.split(",")
    ]


def check_devices(cases: list[Case], device: str) -> None:
    """Raises ConfigError when a layout needs more CUDA devices than there are."""
    needed = max((c.named.world_size for c in cases), default=1)
    if device == "cuda" and needed > torch.cuda.device_count():
        raise ConfigError(
            f"--layouts: {needed} ranks need {needed} CUDA devices, {torch.cuda.device_count()} are visible; choose "
            "smaller layouts, or --device cpu with CUDA_VISIBLE_DEVICES=''"
        )


def parser() -> argparse.ArgumentParser:
    """The command line of tools/check_parity.py."""
    p = argparse.ArgumentParser(
        description="Load a checkpoint in each parallel layout, run the train step, and compare vision features, "
        "projector output, logits, losses and the gradient of every weight with a reference file."
    )
    p.add_argument("--hf", required=True, type=Path, help="checkpoint directory in the released layout")
    p.add_argument("--reference", type=Path, help="reference results (safetensors)")
    p.add_argument(
        "--packed-cases",
        nargs="?",
        const="all",
        help="instead of a reference: packed rows against their documents one by one on one rank, in fp32; all, or "
        + ", ".join(CASES),
    )
    p.add_argument("--layouts", default="all", help=f"all, or names separated by commas: {', '.join(ALL)}")
    p.add_argument(
        "--placements", default=",".join(PLACEMENTS), help="where the tower's work goes (default: everywhere)"
    )
    p.add_argument("--formats", default="dense,packed", help="row formats (default: both)")
    p.add_argument(
        "--dtype", default="fp32", choices=("fp32", "bf16"), help="compute dtype; sets the tolerances"
    )
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--steps", default=0, type=int, help="also compare a trajectory of this many AdamW steps")
    p.add_argument("--lr", default=1e-4, type=float, help="learning rate of --steps")
    p.add_argument("--bisect", action="store_true", help="name the first intermediate tensor that diverges")
    p.add_argument("--json", type=Path, help="write the rows to this file as JSON")
    return p


def make_setting(args: argparse.Namespace) -> Setting:
    """Read the model, the checkpoint's table of contents and the reference."""
    if args.reference is None:
        raise ConfigError(
            "--reference FILE.safetensors is missing; --packed-cases is the check that needs none"
        )
    model = model_from_hf(args.hf)
    HFCheckpoint(args.hf).check(model)
    reference = read_reference(args.reference)
    return Setting(
        args.hf, model, reference, documents(reference, model), BF16 if args.dtype == "bf16" else FP32, args.dtype,
        args.steps, args.lr, args.bisect,
    )  # fmt: skip


def check_packed(args: argparse.Namespace) -> Iterator[PackedRow]:
    """The rows of --packed-cases; ``--layouts all`` are those of `layouts.PACKED`."""
    cases = named_cases(args.packed_cases)
    layouts = list(PACKED) if args.layouts == "all" else [n for n in args.layouts.split(",") if n]
    placements = args.placements.split(",")
    model = model_from_hf(args.hf)
    HFCheckpoint(args.hf).check(model)
    wanted = make_cases(",".join(layouts), args.placements, "packed", args.device)
    check_devices(wanted, args.device)
    with LocalWorld(max((c.named.world_size for c in wanted), default=1), args.device) as world:
        for placement in placements:
            check = PackedCheck(str(args.hf), model, placement=placement, device=args.device)
            yield from check.rows(world, layouts, cases)


def write_json(path: Path, rows: list[Row] | list[PackedRow]) -> None:
    """The rows as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
