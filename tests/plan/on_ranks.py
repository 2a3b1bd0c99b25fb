"""What the planner's tests build on the ranks of the shared world, to hold the plan against."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.model import step3_vl
from megatron_vl.model.offload import Offload
from megatron_vl.model.step3_vl import StageInputs
from megatron_vl.parity.reference import Batches, micro_batches
from megatron_vl.plan.layout import Coords
from megatron_vl.train.build import Parts
from megatron_vl.train.step import no_tick, stage_inputs, train_step, update
from megatron_vl.train.views import StepViews
from tests.model.on_ranks import build_parts


@dataclass(frozen=True)
class Held:
    """What one rank holds: names and elements of its weights by chunk, and bytes."""

    coords: Coords
    weights: list[list[tuple[str, int]]]
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def held_on_rank(config: RunConfig) -> Held:
    """Bytes of weights, gradients and optimizer after one step with zero gradients."""
    return held_of(build_parts(config, with_optimizer=True))


def held_of(parts: Parts) -> Held:
    """The same of a rank that is built, whose gradients are zero."""
    update(parts, 0.0)
    chunks = [chunk.module for chunk in parts.chunks]
    buffers = [buffer for chunk in parts.chunks for buffer in chunk.buffers]
    return Held(
        parts.runtime.coords,
        [[(name, p.numel()) for name, p in chunk.named_parameters()] for chunk in chunks],
        storages([p for chunk in chunks for p in chunk.parameters()]),
        storages(buffer.grad_data for buffer in buffers),
        storages(optimizer_tensors(parts)) - shared(parts),
    )


def optimizer_tensors(parts: Parts) -> list[torch.Tensor]:
    """Weights that the optimizer steps, and its state."""
    found = []
    for part in getattr(parts.optimizer, "chained_optimizers", [parts.optimizer]):
        found += [p for group in part.optimizer.param_groups for p in group["params"]]
        found += [t for state in part.optimizer.state.values() for t in state.values()]
    return found


def shared(parts: Parts) -> int:
    """Bytes of those storages of the optimizer that are the model's own."""
    own = {p.untyped_storage().data_ptr() for chunk in parts.chunks for p in chunk.module.parameters()}
    return storages(t for t in optimizer_tensors(parts) if t.untyped_storage().data_ptr() in own)


def storages(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes behind the tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass(frozen=True)
class Kept:
    """Bytes that the forward pass of one micro-batch keeps on a rank, by chunk and part. moved: to host memory."""

    coords: Coords
    chunks: list[dict[str, int]]
    moved: int = 0


watching: list[Callable[[torch.Tensor], _Saved]] = []  # who counts what is saved just now


class _Saved:
    """Stands for a tensor that autograd has saved; gone when the graph lets go of it.

    Detached: an operation that saves its own output would keep itself, and with it weights, groups and their threads.
    """

    def __init__(self, tensor: torch.Tensor, part: str) -> None:
        self.tensor, self.part = tensor.detach(), part


def kept_on_rank(config: RunConfig, batches: Batches) -> Kept:
    """Run every chunk forward once, alone; stages behind the first get random hidden states."""
    return kept_of(build_parts(config), batches)


def kept_of(parts: Parts, batches: Batches) -> Kept:
    """The same of a rank that is built."""
    batch = micro_batches(batches, parts.config.model, parts.runtime.layout, parts.runtime.rank)[0]
    inputs = stage_inputs(batch, parts.runtime.device)
    return Kept(parts.runtime.coords, [kept_by_chunk(parts, chunk.module, inputs) for chunk in parts.chunks])


def kept_with_offload(config: RunConfig, batches: Batches, smallest: int) -> Kept:
    """The same with `recompute.offload`, which moves tensors from ``smallest`` bytes on; those do not count as kept."""
    made: list[Watched] = []

    class Watched(Offload):
        """Tells of what it leaves alone."""

        def _leave(self, x: torch.Tensor):
            left = super()._leave(x)
            return watching[-1](x) if isinstance(left, torch.Tensor) else left

    def offload(parameters: Iterable[torch.nn.Parameter]) -> Watched:
        made.append(Watched(parameters, smallest))
        return made[-1]

    with patch.object(step3_vl, "Offload", offload):
        kept = kept_on_rank(config, batches)
    return replace(kept, moved=sum(one.bytes for one in made))


def held_and_kept(config: RunConfig, batches: Batches) -> tuple[Held, Kept]:
    """Both, of one rank that is built once."""
    parts = build_parts(config, with_optimizer=True)
    return held_of(parts), kept_of(parts, batches)


def kept_of_step(config: RunConfig, batches: Batches) -> tuple[Coords, int]:
    """Bytes that the views of a whole step keep while the pipeline runs, in placement `all`: what autograd has saved,
    features that wait for their gradient, and on the first stage those of its positions, with their gradients."""
    parts = build_parts(config)
    feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
    views = StepViews(parts, feed, parts.tower.module.trained)
    own = {p.untyped_storage().data_ptr() for p in parts.tower.module.parameters()}
    living: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor, "vision")
        living.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        views.encode(no_tick)
    tensors = [saved.tensor for saved in living] + [
        wave.kept for wave in views.waves if wave.kept is not None
    ]
    kept = storages(t for t in tensors if t.untyped_storage().data_ptr() not in own)
    leaves = storages(leaf for leaf in views.leaves if leaf is not None)
    return parts.runtime.coords, kept + leaves * (1 + views.train)


def kept_by_chunk(parts: Parts, net: torch.nn.Module, inputs: StageInputs) -> dict[str, int]:
    """Bytes of the saved tensors still alive at the end, each storage once, without weights."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    living: weakref.WeakSet[_Saved] = weakref.WeakSet()
    part = ["decoder"]

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor, part[-1])
        living.add(saved)
        return saved

    if not net.pre_process:
        layout, width = parts.runtime.layout, parts.config.model.text.hidden_size
        tokens = inputs.input_ids.shape[1] // layout.cp // (layout.tp if layout.sp else 1)
        shape = (tokens, inputs.input_ids.shape[0], width)
        net.set_input_tensor(torch.randn(shape, dtype=parts.dtype).requires_grad_())
    else:
        plain = net.encode_views

        def encode(given: StageInputs) -> torch.Tensor | None:
            part.append("vision")
            return plain(given)

        net.encode_views = encode
        net.language_model.register_forward_pre_hook(lambda module, args: part.append("decoder"))
    if net.post_process:
        net.language_model.decoder.final_layernorm.register_forward_pre_hook(
            lambda module, args: part.append("loss")
        )
    net.train()
    watching.append(pack)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        out = net(inputs)
    found: dict[int, tuple[str, int]] = {}
    for saved in living:
        storage = saved.tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (saved.part, storage.nbytes())
    assert out.requires_grad
    watching.pop()
    return {
        name: sum(size for other, size in found.values() if other == name)
        for name in ("vision", "decoder", "loss")
    }


class _Count:
    """Bytes behind saved tensors that are alive, each storage once, and the most there ever were."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.now, self.most = own, 0, 0
        self._living: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> _Counted:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.own:
            self.now += 0 if self._living.get(place) else storage.nbytes()
            self.most = max(self.most, self.now)
            self._living[place] = self._living.get(place, 0) + 1
        return _Counted(tensor, self)

    def gone(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.own:
            self._living[place] -= 1
            self.now -= 0 if self._living[place] else storage.nbytes()


class _Counted:
    """A tensor that autograd has saved, for as long as it keeps it."""

    def __init__(self, tensor: torch.Tensor, count: _Count) -> None:
        self.tensor, self._count = tensor, count

    def __del__(self) -> None:
        self._count.gone(self.tensor)


def peak_of_step(config: RunConfig, batches: Batches) -> tuple[Coords, int, int]:
    """Of a whole training step: the most bytes of saved tensors, without weights, and those left at its end."""
    parts = build_parts(config, with_optimizer=True)
    feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
    modules = [chunk.module for chunk in parts.chunks]
    if parts.tower is not None:
        modules.append(parts.tower.module)
    count = _Count({p.untyped_storage().data_ptr() for module in modules for p in module.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda saved: saved.tensor):
        train_step(parts, feed, 1e-3)
    return parts.runtime.coords, count.most, count.now


def one_step(config: RunConfig, batches: Batches) -> tuple[float, float]:
    """(loss, gradient norm) of one optimizer step."""
    parts = build_parts(config, with_optimizer=True)
    feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
    result = train_step(parts, feed, 1e-3)
    return result.loss, result.grad_norm


def build_error(config: RunConfig) -> str:
    """What building raises on this rank, "" for nothing."""
    try:
        build_parts(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def step_seconds(config: RunConfig, batches: Batches, steps: int) -> list[tuple[float, float]]:
    """(wall seconds, processor seconds of this rank) of each step, behind one that warms up."""
    parts = build_parts(config, with_optimizer=True)
    feed = micro_batches(batches, config.model, parts.runtime.layout, parts.runtime.rank)
    train_step(parts, feed, 1e-3)
    taken = []
    for _ in range(steps):
        parts.runtime.groups.replica.barrier().wait()
        wall, own = time.perf_counter(), time.process_time()
        train_step(parts, feed, 1e-3)
        taken.append((time.perf_counter() - wall, time.process_time() - own))
    return taken
