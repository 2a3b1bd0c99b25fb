"""What a run comes to, as lines of text: values and origins, parameters, FLOPs, rank grid, stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_vl.config.load import LoadedRun, leaf_paths
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import LrPhase, RunConfig
from megatron_vl.plan.budget import num_microbatches, tokens_per_step, total_steps, total_tokens
from megatron_vl.plan.cost import parameters, sample_flops, tower_and_decoder, train_flops, view_flops
from megatron_vl.plan.kept import fullest_load
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.memory import PARTS, memory_of_stage, setting_of
from megatron_vl.plan.overlap import bucket_elements
from megatron_vl.plan.shares import parameters_of_stage
from megatron_vl.plan.stages import held_stages
from megatron_vl.plan.state_bytes import bytes_of_stage
from megatron_vl.plan.vision_share import CROP, GLOBAL

GRID_LINES = 16
EXAMPLE_CROPS = 6


def report(loaded: LoadedRun, world_size: int) -> list[str]:
    """The whole report of a checked run on `world_size` ranks."""
    config = loaded.config
    layout = Layout.from_config(config.parallel, world_size)
    blocks = (
        run_lines(loaded),
        parameter_lines(config.model),
        flop_lines(config),
        layout_lines(config, layout),
        stage_lines(config, layout),
        memory_lines(config, layout),
    )
    return [line for block in blocks for line in (*block, "")][:-1]


def run_lines(loaded: LoadedRun) -> list[str]:
    """Every key with its value and origin, under the name of its section."""
    rows = []
    for path in leaf_paths(RunConfig):
        value = loaded.config
        for name in path.split("."):
            value = getattr(value, name)
        section, _, name = path.rpartition(".")
        rows += [(section, *row) for row in _value_rows(name, value, loaded.origins[path])]
    widths = [max(len(row[column]) for row in rows) for column in (1, 2)]
    lines, current = ["Run"], ""
    for section, name, value, origin in rows:
        if section != current and section:
            lines.append(f"  {section}")
        current = section
        indent = "    " if section else "  "
        lines.append(f"{indent + name:<{widths[0] + 4}}  {value:<{widths[1]}}  {origin}")
    return lines


def parameter_lines(model: ModelConfig) -> list[str]:
    """Parameters by part, in the split of the released checkpoint, with the subtotals indented less."""
    counts = parameters(model)
    rows = [
        ("    conv1", "conv1"),
        ("    positional_embedding", "positional_embedding"),
        ("    ln_pre", "ln_pre"),
        (f"    {model.vision.num_layers} vision blocks", "vision_blocks"),
        ("  tower without downsamplers", "vision_without_downsamplers"),
        ("    vit_downsampler1", "vit_downsampler1"),
        ("    vit_downsampler2", "vit_downsampler2"),
        ("  vision, with downsamplers", "vision"),
        ("  projector", "projector"),
        ("    token embedding", "token_embedding"),
        (f"    {model.text.num_layers} decoder layers", "decoder_layers"),
        ("    final norm", "final_norm"),
        ("    lm_head", "lm_head"),
        ("  decoder", "decoder"),
        ("  total", "total"),
    ]
    frozen = [
        part
        for part, here in (
            ("vision", model.freeze_vision),
            ("projector", model.freeze_projector),
            ("decoder", model.freeze_decoder),
        )
        if here
    ]
    lines = ["Parameters", *(f"{label:<32}{counts[part]:>18,}" for label, part in rows)]
    if frozen:
        trained = counts["total"] - sum(counts[part] for part in frozen)
        lines.append(f"{'  trained':<32}{trained:>18,}   (frozen: {', '.join(frozen)})")
    return lines


def flop_lines(config: RunConfig) -> list[str]:
    """FLOPs of a text row, of an image sample and of single views, with the shares of tower and decoder."""
    model, length = config.model, config.data.seq_length
    kinds = [CROP] * EXAMPLE_CROPS + [GLOBAL]
    visual = EXAMPLE_CROPS * model.vision.crop_tokens + model.vision.global_tokens
    samples = (
        (f"text only, a full row of {length:,} tokens", [], length),
        (f"global view + {EXAMPLE_CROPS} crops, {visual} visual tokens", kinds, visual),
    )
    lines = [f"{'FLOPs per sample':<50}{'forward':>14}{'training':>14}{'tower':>9}{'decoder':>9}"]
    for label, views, tokens in samples:
        forward = sample_flops(model, views, [tokens])
        tower, decoder = tower_and_decoder(train_flops(model, forward))
        total = tower + decoder
        lines.append(
            f"  {label:<48}{_flops(sum(forward.values())):>14}{_flops(total):>14}"
            f"{tower / total:>9.1%}{decoder / total:>9.1%}"
        )
    vision = model.vision
    views = (
        (GLOBAL, "global view", vision.image_size, vision.global_grid),
        (CROP, "crop", vision.crop_size, vision.crop_grid),
    )
    for kind, name, side, grid in views:
        label = f"one {side} px {name}, {grid * grid:,} patches"
        forward = sum(view_flops(model, kind).values())
        training = sum(train_flops(model, view_flops(model, kind)).values())
        lines.append(f"  {label:<48}{_flops(forward):>14}{_flops(training):>14}")
    lines.append("  (2 per multiply-add; causal attention at half; training without recomputation)")
    return lines


def layout_lines(config: RunConfig, layout: Layout) -> list[str]:
    """Sizes of the axes, the batch, the length of the run, and the rank grid."""
    train = config.train
    microbatches = num_microbatches(train, layout.dp)
    lines = [
        f"Layout of {layout.world_size} rank{'s' if layout.world_size > 1 else ''}: {layout}",
        f"  step: {train.global_batch_size} rows = {layout.dp} replica{'s' if layout.dp > 1 else ''} x "
        f"{microbatches} "
        f"micro-batches x {train.micro_batch_size}, {tokens_per_step(config):,} tokens",
    ]
    steps, tokens = total_steps(config), total_tokens(config)
    if steps is not None:
        lines.append(f"  run: {steps:,} steps, {tokens:,} tokens")
    if config.schedule.warmup_tokens:
        lines.append(f"  warm-up: {config.schedule.warmup_tokens / tokens_per_step(config):,.1f} steps")
    grid = layout.grid()
    lines.append("  ranks, one [group] of tensor-parallel ranks for each context-parallel rank:")
    lines += [f"    {line}" for line in grid[:GRID_LINES]]
    if len(grid) > GRID_LINES:
        lines.append(f"    ... {len(grid) - GRID_LINES} more lines, up to rank {layout.world_size - 1}")
    return lines


def stage_lines(config: RunConfig, layout: Layout) -> list[str]:
    """Decoder layers and marks of each stage, with parameters and bytes on each of its ranks."""
    model, parallel = config.model, config.parallel
    stages = held_stages(model.text.num_layers, layout, parallel.pipeline_decoder_layers)
    weight_bytes, number_format = weight_format(config)
    bucket = bucket_elements(parallel, layout.dp * layout.cp, parallel.device == "cpu")
    lines = [f"Stages, and bytes per rank for weights ({number_format}), gradients and optimizer"]
    for chunks in stages:
        held = sum(parameters_of_stage(model, layout, chunks).values())
        memory = bytes_of_stage(
            model, layout, chunks, weight_bytes, parallel.use_distributed_optimizer, bucket
        )
        for chunk in chunks:
            number = f" vp{chunk.vp_stage}" if layout.vpp > 1 and not chunk.beside else ""
            name = f"pp{chunk.pp_rank}{number}"
            tail = f"{held:>16,} parameters {_bytes(memory.total):>10}" if chunk is chunks[0] else ""
            lines.append(f"  {name:<8}  {chunk!s:<48}{tail}".rstrip())
    return lines


def memory_lines(config: RunConfig, layout: Layout) -> list[str]:
    """Planned bytes of the fullest rank of each stage (`plan.memory`), for rows with as many views as they may hold."""
    parallel, load = config.parallel, fullest_load(config)
    stages = held_stages(config.model.text.num_layers, layout, parallel.pipeline_decoder_layers)
    setting = setting_of(config, layout, load, weight_format(config)[0], parallel.device == "cpu")
    planned = [memory_of_stage(setting, layout, chunks) for chunks in stages]
    names = [part for part in PARTS if any(memory[part] for memory in planned)]
    views = f"{load.globals // load.rows} global views and {load.crops // load.rows} crops"
    lines = [
        f"Memory per rank at the height of a step, planned for rows of {views}",
        "  " + " " * 6 + "".join(f"{name:>12}" for name in (*names, "total")),
    ]
    for rank, memory in enumerate(planned):
        cells = (*(memory[name] for name in names), sum(memory.values()))
        lines.append(f"  pp{rank:<4}" + "".join(f"{_bytes(cell):>12}" for cell in cells))
    lines.append("  (without the CUDA context, NCCL's buffers and fragmentation)")
    return lines


def weight_format(config: RunConfig) -> tuple[int, str]:
    """Bytes of a weight, and the name of its format."""
    params, on_cpu = config.precision.params, config.parallel.device == "cpu"
    return (4, "fp32") if params == "fp32" or params == "auto" and on_cpu else (2, "bf16")


def _value_rows(name: str, value: Any, origin: str) -> Iterator[tuple[str, str, str]]:
    """A key as table rows; the phases of the schedule get one row each."""
    if isinstance(value, list) and value and isinstance(value[0], LrPhase):
        for index, phase in enumerate(value):
            text = f"{phase.tokens:,} tokens, {phase.lr_start:g} -> {phase.lr_end:g}, {phase.style}"
            yield f"{name}[{index}]", text, origin
    else:
        yield name, _value(value), origin


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value) if value != "" else '""'


def _flops(count: float) -> str:
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _bytes(count: float) -> str:
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(count: float, step: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if count < step:
            return f"{count:.2f} {unit}"
        count /= step
    return f"{count:.2f} {units[-1]}"
