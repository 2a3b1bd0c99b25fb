"""Import and export: weights streamed from one kind of folder to the other, without ranks and without a GPU.

Both check everything that can be checked before a byte is written, write aside, and appear whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from megatron_vl.checkpoint.aside import Aside
from megatron_vl.checkpoint.digests import Digested, Digests, from_plain, to_plain, write_digests
from megatron_vl.checkpoint.hf_load import INDEX
from megatron_vl.checkpoint.hf_save import Shard, plan_shards, write_shards
from megatron_vl.checkpoint.meter import Figures, Meter
from megatron_vl.checkpoint.progress import Progress
from megatron_vl.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES, FLUSH_BYTES, flush_file
from megatron_vl.checkpoint.stored import FORMAT
from megatron_vl.checkpoint.templates import check_template, write_companions
from megatron_vl.checkpoint.torch_dist import Item, Written, matrix_shape, publish, sync_folder, write
from megatron_vl.checkpoint.weights import CheckpointWeights, HFWeights, Weight, total_bytes
from megatron_vl.config.dump import to_yaml
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError

# --dtype
KEEP = "keep"
ASKED = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Options:
    """threads: that read, convert and write. replace: an existing target. consume: remove each source file once its
    tensors are on the disk. digests: file for the digests of what was written (with consume, always)."""

    threads: int = 2
    dtype: str = KEEP
    replace: bool = False
    consume: bool = False
    digests: Path | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Result:
    """out: the folder. companions: files beside the weights, and where they are from. notes: worth telling."""

    out: Path
    figures: Figures
    companions: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def import_hf(source: HFWeights, out: Path, options: Options) -> Result:
    """A Hugging Face folder to a checkpoint folder.

    Raises:
        CheckpointError: nothing was written, but for an interrupted --consume, which says where the weights are.
    """
    remover = _Remover(source, options) if options.consume else None
    origin = f"imported from {source.folder}"
    return write_checkpoint(source.weights, source.model, out, options, origin, remover)


def write_checkpoint(
    weights: Mapping[str, Weight],
    model: ModelConfig,
    out: Path,
    options: Options,
    origin: str,
    remover: _Remover | None = None,
) -> Result:
    """Weights from anywhere to a checkpoint folder at step 0, without optimizer state.

    weights: exactly the model's. Digests of what is stored go into state.json.
    """
    if options.dtype != KEEP:
        weights = {name: weight.as_dtype(ASKED[options.dtype]) for name, weight in weights.items()}
    digests, written = Digests(), []
    needed = _needed(weights, options)
    with (
        Meter("import", total_bytes(list(weights.values())), quiet=options.quiet) as meter,
        Aside(out, needed, options.replace) as aside,
    ):
        for number, group in enumerate(_by_file(weights)):
            items = [item for name in group for item in _items(weights[name], digests)]
            prefix = f"__0_{number}_"
            flusher = _Flusher(aside.folder, prefix, meter)
            written.append(write(aside.folder, items, prefix, options.threads, flusher))
            flusher.flush()
            if remover is not None:
                remover.written(group, digests.collected(), aside, meter)
        state = {
            "format": FORMAT,
            "progress": asdict(Progress(0, 0)),
            "layout": None,
            "source_dtypes": {name: DTYPE_NAMES[w.spec.dtype] for name, w in sorted(weights.items())},
            "optimizer_steps": {},
            "origin": origin,
            "tensor_digests": to_plain(digests.collected()),
        }
        _finish_checkpoint(aside, written, state, model)
    if options.digests is not None:
        write_digests(options.digests, digests.collected())
    return Result(out, figures(weights, meter))


class _Flusher:
    """Called after each item: counts it, and keeps what is written from filling the page cache (`FLUSH_BYTES`)."""

    def __init__(self, folder: Path, prefix: str, meter: Meter) -> None:
        self._folder, self._prefix, self._meter, self._dirty = folder, prefix, meter, 0

    def __call__(self, item: Item) -> None:
        self._meter.add(item.nbytes)
        self._dirty += item.nbytes
        if self._dirty >= FLUSH_BYTES:
            self._dirty = 0
            self.flush()

    def flush(self) -> None:
        """The files of this prefix."""
        for path in self._folder.glob(f"{self._prefix}*"):
            flush_file(path)


def _finish_checkpoint(aside: Aside, written: Sequence[Written], state: dict, model: ModelConfig) -> None:
    config = to_yaml(RunConfig(model=model))
    aside.publish(partial(publish, aside.folder, aside.final, written, state, config))


def _by_file(weights: Mapping[str, Weight]) -> list[list[str]]:
    """Names by the source file that they lie in, so that a file is done before the next one is begun."""
    groups: dict[frozenset[str], list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault(weight.files, []).append(name)
    return list(groups.values())


def _items(weight: Weight, digests: Digests) -> list[Item]:
    """One item per block; each is digested when it is read."""
    shape = matrix_shape(weight.spec.shape)

    def resolve(first: int, count: int) -> torch.Tensor:
        values = weight.rows(first, count)
        digests.add(weight.spec, first, values)
        return values

    return [
        Item(
            f"model/{weight.spec.name}", shape, weight.spec.dtype, (first, 0), (count, shape[1]),
            partial(resolve, first, count),
        )
        for first, count in weight.blocks()
    ]  # fmt: skip


def export_hf(
    source: CheckpointWeights,
    out: Path,
    options: Options,
    template: Path | None = None,
    shard_bytes: int = 5_000_000_000,
) -> Result:
    """A checkpoint folder of any layout to a Hugging Face folder.

    template: another Hugging Face folder that the files beside the weights are copied from. Digests that an import
    has stored are compared while the values pass by.

    Raises:
        CheckpointError: as `import_hf`; also values that are not those of their stored digest.
        ConfigErrors: the template describes another model.
    """
    if template is not None:
        check_template(template, source.model)
    if options.consume:
        refuse_to_consume(source)
    weights = {name: _for_export(source, name, options.dtype) for name in source.weights}
    shards = plan_shards([weight.spec for weight in weights.values()], shard_bytes)
    remover = _Remover(source, options) if options.consume else None
    with (
        Meter("export", total_bytes(list(weights.values())), quiet=options.quiet) as meter,
        Aside(out, _needed(weights, options), options.replace) as aside,
    ):

        def after_shard(shard: Shard, digests: Digests) -> None:
            if remover is not None:
                sync_folder(aside.folder)
                remover.written(shard.names, digests.collected(), aside, meter)

        digests = write_shards(
            aside.folder, weights, shards, options.threads, meter.add, after_shard, _known(source, weights)
        )
        companions, notes = write_companions(aside.folder, source.model, template, weights)
        aside.publish()
    if options.digests is not None:
        write_digests(options.digests, digests.collected())
    return Result(out, figures(weights, meter), companions, notes)


def _for_export(source: CheckpointWeights, name: str, dtype: str) -> Weight:
    """The weight in the format asked for; wider than it is stored: from the fp32 weights of the optimizer."""
    stored = source.weights[name]
    recorded = (source.source_dtypes or {}).get(name)
    kept = DTYPES[recorded] if recorded is not None else stored.spec.dtype
    target = kept if dtype == KEEP else ASKED[dtype]
    if target.itemsize > stored.spec.dtype.itemsize:
        stored = source.finest(name)
    return stored.as_dtype(target)


def _known(source: CheckpointWeights, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Digests that the checkpoint holds of tensors which are exported as they are stored.

    Raises:
        CheckpointError: they are not in the form that an import writes.
    """
    stored = source.stored.state.get("tensor_digests")
    try:
        known = from_plain(stored) if stored is not None else {}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{source.folder}/state.json: tensor_digests cannot be read ({error!r}); import again"
        ) from error
    return {name: d.sha256 for name, d in known.items() if name in weights and weights[name].spec == d.spec}


def refuse_to_consume(source: CheckpointWeights) -> None:
    """A training checkpoint holds more than weights: it is not removed.

    Raises:
        CheckpointError: it has optimizer state.
    """
    if any(key.startswith("optimizer/") for key in source.stored.tensors):
        raise CheckpointError(
            f"--consume would destroy the optimizer state in {source.folder}; leave it out, and remove the folder "
            "yourself if you mean it"
        )


def _needed(weights: Mapping[str, Weight], options: Options) -> int:
    """Bytes of free space: everything, or with --consume what is written before the first source file goes."""
    if not options.consume:
        return total_bytes(list(weights.values()))
    groups = _by_file(weights)
    largest = max(total_bytes([weights[name] for name in group]) for group in groups)
    return 2 * largest


def figures(weights: Mapping[str, Weight], meter: Meter) -> Figures:
    """What a conversion of these weights came to."""
    elements = sum(w.spec.nbytes // w.spec.dtype.itemsize for w in weights.values())
    return Figures(len(weights), elements, total_bytes(list(weights.values())), meter.seconds, meter.peak)


class _Remover:
    """Removes a source's files, each once every tensor in it is on the disk and its digest is stored."""

    def __init__(self, source: HFWeights | CheckpointWeights, options: Options) -> None:
        assert options.digests is not None, "the tool names a digest file"
        self._source, self._digests = source, options.digests
        self._left: dict[str, set[str]] = {}
        for name, weight in source.weights.items():
            for file in weight.files:
                self._left.setdefault(file, set()).add(name)

    def written(
        self, names: Sequence[str], digests: Mapping[str, Digested], aside: Aside, meter: Meter
    ) -> None:
        """The tensors ``names`` are on the disk; their digests are stored before anything is removed."""
        sync_folder(aside.folder)
        for names_left in self._left.values():
            names_left.difference_update(names)
        finished = sorted(file for file, names_left in self._left.items() if not names_left)
        if not finished:
            return
        write_digests(self._digests, digests)
        aside.consuming()
        for file in finished:
            path = self._source.folder / file
            size = path.stat().st_size
            self._source.close(file)
            path.unlink()
            del self._left[file]
            meter.say(
                f"--consume: removed {path} ({size / 1e9:.2f} GB); its tensors are on the disk in {aside.folder}"
            )
        if not self._left:
            for name in (INDEX, "manifest.json"):  # without files they only mislead
                (self._source.folder / name).unlink(missing_ok=True)
