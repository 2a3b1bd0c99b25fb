"""How many bytes of tensors are alive at most while the tower runs, forward and backward."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vl.config.schema import RunConfig
from megatron_vl.model.step3_vl import StageInputs
from megatron_vl.plan.vision_share import CROP, GLOBAL
from tests.model.on_ranks import build_parts


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made while it is on; ``peak``: most bytes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def tower_peak(config: RunConfig, num_crops: int, num_globals: int) -> dict[str, int]:
    """Bytes that the tower of one rank adds: kept = between forward and backward, peak = at most."""
    (chunk,) = build_parts(config).chunks
    inputs = random_views(config, num_crops, num_globals, torch.float32)
    chunk.train()
    chunk.zero_grad_buffer()
    with LiveBytes() as live:
        rows = chunk.module.encode_views(inputs)
        kept = live.now
        if rows.requires_grad:
            rows.backward(torch.ones_like(rows))
    return {"kept": kept, "peak": live.peak, "left": live.now - rows.nbytes, "rows": rows.nbytes}


def tower_gradients(config: RunConfig, num_crops: int, num_globals: int) -> dict[str, torch.Tensor]:
    """fp64 gradients of tower and projector for one and the same gradient of the features."""
    (chunk,) = build_parts(config).chunks
    model = chunk.module.double().train()  # which takes the weights away from DDP: gradients are in ``grad``
    rows = model.encode_views(random_views(config, num_crops, num_globals, torch.float64))
    rows.backward(torch.randn(rows.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if name.startswith(("vision_model.", "projector."))
    }


def random_views(config: RunConfig, num_crops: int, num_globals: int, dtype: torch.dtype) -> StageInputs:
    """A micro-batch of views alone."""
    generator, vision = torch.Generator().manual_seed(4), config.model.vision
    crops, wholes = (
        torch.randn(count, 3, side, side, generator=generator).to(dtype)
        for count, side in ((num_crops, vision.crop_size), (num_globals, vision.image_size))
    )
    nothing, kinds = torch.zeros(1, 1, dtype=torch.int64), [CROP] * num_crops + [GLOBAL] * num_globals
    return StageInputs(nothing, nothing, None, [1], kinds, crops, wholes, [""])
