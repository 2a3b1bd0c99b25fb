"""What the planner found, as lines of text: the ranked table, what does not fit, what is refused, the YAML block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from megatron_vl.config.dump import dump_yaml
from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.plan.candidates import Candidate, grouped
from megatron_vl.plan.devices import GIB
from megatron_vl.plan.memory import PARTS
from megatron_vl.plan.overlap import overlap_of
from megatron_vl.plan.search import IMAGE_CROPS, Answer, Planner, Question, Verdict

UNFIT_LINES = 12
LAYOUT = ("TP", "SP", "CP", "PP", "VPP", "DP", "tower", "first", "MBS", "m", "recompute")
COLUMNS = (*LAYOUT, "step s", "tok/s/rank", "MFU", "bubble", "views", "GiB", "stage")


def table_lines(planner: Planner, answer: Answer) -> list[str]:
    """One row for each (TP, CP, PP) that fits, fastest first: its best setting."""
    question = planner.question
    lines = aligned([COLUMNS, *(_row(planner, verdict) for verdict in answer.best)])
    head = f"{len(answer.best)} of the {answer.fitting} (TP, CP, PP) that fit, fastest first; predicted, not measured"
    return [*question_lines(question), f"{answer.looked_at:,} legal layouts looked at. {head}:", "", *lines]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def question_lines(question: Question) -> list[str]:
    """What was asked."""
    config, device = question.config, question.device
    vision, images = config.model.vision, question.images_per_row
    visual = images * (IMAGE_CROPS * vision.crop_tokens + vision.global_tokens)
    memory = f"{device.memory / GIB:.0f} GiB each" if device.memory else "memory not limited"
    return [
        f"{question.world_size:,} x {device.name} ({memory}, {device.reserve / GIB:.1f} of it reserved), "
        f"rows of {config.data.seq_length:,} tokens, global batch {config.train.global_batch_size:,} rows",
        f"per row {images} images of {IMAGE_CROPS} crops and a global view: {visual:,} visual tokens "
        f"({visual / config.data.seq_length:.0%}); weights of {question.element} bytes; "
        f"products at {device.matmul_flops / 1e12:.3g}, attention at {device.attention_flops / 1e12:.3g} TFLOP/s",
        _assumed(question),
    ]


def _assumed(question: Question) -> str:
    """What is taken to be used, where the configuration leaves it to the machine."""
    config, kernels = question.config, question.kernels
    backend = config.parallel.layer_backend
    if backend == "auto":
        backend = "torch" if kernels.joined_rows else "transformer_engine"
    fused = f"used, projector {kernels.projector}" if kernels.fused else "not used"
    overlap = overlap_of(config.parallel, 2, question.device.on_cpu)
    hidden = [name for name, on in (("sums", overlap.grad_reduce), ("weights", overlap.param_gather)) if on]
    fp8 = ""
    if config.precision.fp8 != "none":
        fp8 = f"; FP8 {config.precision.fp8} in {len(kernels.fp8)} of {config.model.text.num_layers} decoder layers"
        fp8 += " and the tower" * kernels.fp8_vision
    return f"taken: {backend} layers; fused kernels {fused}; overlapped: {' and '.join(hidden) or 'nothing'}{fp8}"


def layout_cells(planner: Planner, candidate: Candidate) -> tuple[str, ...]:
    """A layout under `LAYOUT`."""
    layout, recompute = candidate.layout, candidate.recompute
    return (
        str(layout.tp), "yes" if layout.sp else "-", str(layout.cp), str(layout.pp),
        str(layout.vpp) if layout.vpp > 1 else "-", str(layout.dp), layout.placement,
        str(planner.counts(candidate)[0]) if layout.pp > 1 else "-", str(candidate.micro_batch),
        str(candidate.num_microbatches), f"{recompute.decoder}/{_tower_again(recompute)}",
    )  # fmt: skip


def _row(planner: Planner, verdict: Verdict) -> tuple[str, ...]:
    candidate, question = verdict.candidate, planner.question
    step, found = verdict.time.total, planner.rates(candidate)
    tokens = question.config.train.global_batch_size * question.config.data.seq_length
    mfu = question.model_flops() / step / question.world_size / question.device.peak_flops
    balance = f"{found.tower.own / found.tower_mean:.2f}" if found.tower_mean else "-"
    return (
        *layout_cells(planner, candidate), f"{step:.2f}", f"{tokens / step / question.world_size:,.0f}", f"{mfu:.1%}",
        f"{verdict.time.bubble / step:.1%}", balance, f"{verdict.peak / GIB:.1f}", f"pp{verdict.fullest}",
    )  # fmt: skip


def _tower_again(recompute: RecomputeConfig) -> str:
    """How the tower is recomputed, in a cell."""
    if recompute.vision_chunk_views is None:
        return recompute.vision
    full = "full+" if recompute.vision == "full" else ""
    return f"{full}{recompute.vision_chunk_views}"


def unfit_lines(answer: Answer) -> list[str]:
    """(TP, CP, PP) of which no setting fits: what the nearest one lacks."""
    if not answer.unfit:
        return []
    lines = [
        "",
        f"{len(answer.unfit)} (TP, CP, PP) do not fit with any setting looked at; one of the nearest of each:",
    ]
    for verdict in sorted(answer.unfit, key=lambda one: one.peak)[:UNFIT_LINES]:
        layout = verdict.candidate.layout
        lines.append(f"  {layout!s:<52}  {verdict.reason}")
    more = len(answer.unfit) - UNFIT_LINES
    return lines + ([f"  ... {more} more need more memory than these"] if more > 0 else [])


def refused_lines(answer: Answer) -> list[str]:
    """Why layouts are illegal, by key."""
    if not answer.refused:
        return []
    lines = ["", f"{len(answer.refused):,} layouts are refused:"]
    return lines + [f"  {count:>6,}  {key}: {rule}" for count, key, rule in grouped(answer.refused)]


def verdict_lines(planner: Planner, verdict: Verdict) -> list[str]:
    """Time by part, and memory by part and stage, of one layout."""
    candidate, total = verdict.candidate, verdict.time.total
    lines = [
        f"Layout: {candidate.layout}; micro-batches {candidate.num_microbatches} x {candidate.micro_batch} rows, "
        f"recompute decoder {candidate.recompute.decoder}, vision {candidate.recompute.vision}",
        f"Predicted step: {total:.3f} s",
    ]
    for name, seconds in planner.parts(candidate).items():
        lines.append(f"  {name:<10}{seconds:>12.3f} s {seconds / total:>7.1%}")
    names = [part for part in PARTS if any(memory[part] for memory in verdict.memory.values())]
    lines += [
        "GiB on the fullest rank of each stage",
        "  stage" + "".join(f"{name:>11}" for name in (*names, "total")),
    ]
    for pp, memory in verdict.memory.items():
        values = [memory[name] / GIB for name in names]
        lines.append(
            f"  pp{pp:<4}" + "".join(f"{value:>11.3f}" for value in (*values, sum(memory.values()) / GIB))
        )
    if not verdict.limit:
        return [*lines, "The device's memory is not known."]
    return [
        *lines,
        f"Fits in {verdict.limit / GIB:.1f} GiB." if verdict.fits else f"Does not fit: {verdict.reason}.",
    ]


def figure_lines(verdict: Verdict, width: int = 60) -> list[str]:
    """Memory of each stage as a bar, one letter for each part; the bar ends where the device's memory does."""
    letters = dict(zip(PARTS, "WGOTDLPXR"))
    unit = max(verdict.limit, verdict.peak) / width
    lines = []
    for pp, memory in verdict.memory.items():
        ends = [0, *accumulate(memory[part] for part in PARTS)]  # so that the bar is as long as their sum
        bar = "".join(
            letters[part] * (round(end / unit) - round(start / unit))
            for part, (start, end) in zip(PARTS, pairwise(ends))
        )
        lines.append(f"  pp{pp:<3} {bar:<{width}}|{sum(memory.values()) / GIB:7.1f} GiB")
    key = ", ".join(f"{letter} {part}" for part, letter in letters.items())
    return [*lines, f"  {key}; one letter is {unit / GIB:.1f} GiB"]


def block(candidate: Candidate) -> str:
    """The layout as YAML for a run's file."""
    layout, recompute = candidate.layout, candidate.recompute
    parallel: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sp,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        # null where they say nothing: the file that this goes into may say something
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "pipeline_decoder_layers": None if candidate.layers is None else list(candidate.layers),
        "vision_placement": layout.placement,
    }
    sections = {
        "parallel": parallel,
        "recompute": {
            "decoder": recompute.decoder,
            "decoder_num_layers": recompute.decoder_num_layers,
            "offload": recompute.offload,
            "vision": recompute.vision,
            "vision_num_layers": recompute.vision_num_layers,
            "vision_chunk_views": recompute.vision_chunk_views,
        },
        "train": {"micro_batch_size": candidate.micro_batch},
    }
    return dump_yaml(sections)


def answer_lines(planner: Planner, answer: Answer, figure: bool = False) -> Sequence[str]:
    """Everything that the tool prints. figure: memory of the first row drawn as well."""
    if not answer.best:
        nothing = "No layout fits." if answer.looked_at else "No layout is legal."
        return [*question_lines(planner.question), nothing, *unfit_lines(answer), *refused_lines(answer)]
    best = answer.best[0]
    drawn = figure_lines(best) if figure else []
    title = f"# the first row, for {planner.question.world_size:,} ranks"
    return [
        *table_lines(planner, answer), *unfit_lines(answer), *refused_lines(answer), "",
        *verdict_lines(planner, best), *drawn, "", title, block(best.candidate).rstrip(),
    ]  # fmt: skip
