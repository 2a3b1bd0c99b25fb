"""What the parity test runs on the ranks."""

from __future__ import annotations

import os
from collections import Counter
from unittest.mock import patch

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vl.config.schema import RunConfig
from megatron_vl.ops import library
from megatron_vl.ops.rotary import rotary_table
from megatron_vl.parity.on_rank import Seen
from megatron_vl.parity.reference import Batches
from tests.model.on_ranks import build_parts, gradients_on_rank
from tests.plan.on_ranks import Kept, kept_on_rank


class Counting(TorchDispatchMode):
    """Calls of the library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "megatron_vl":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def fused_gradients_on_rank(config: RunConfig, batches: Batches, path: str) -> tuple[Seen, Counter[str]]:
    """Gradients with the library at `path`, and how often each operator of it ran."""
    with patch.dict(os.environ, {library.VARIABLE: path}), Counting() as counting:
        seen = gradients_on_rank(config, batches)
    library._in_use.clear()  # the other tests of this process have not asked for it
    return seen, counting.calls


def fused_kept_on_rank(config: RunConfig, batches: Batches, path: str) -> tuple[Kept, Counter[str]]:
    """What the forward pass keeps with the library at `path`, and how often each operator of it ran."""
    with patch.dict(os.environ, {library.VARIABLE: path}), Counting() as counting:
        kept = kept_on_rank(config, batches)
    library._in_use.clear()
    return kept, counting.calls


class Moving(TorchDispatchMode):
    """Bytes that operations read and write, by their name; without products, attention and views."""

    # copies and zeros are those of the CPU's attention, which takes one document after the other
    LEFT_OUT = ("mm", "empty", "empty_like", "copy_", "zeros")

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        written = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in read}
        is_view = (
            not func._schema.is_mutable
            and written
            and all(t.untyped_storage().data_ptr() in storages for t in written)
        )
        if not is_view and name not in self.LEFT_OUT and "attention" not in name:
            self.bytes[name] += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in [*read, *written])
        return out


def traffic_on_rank(config: RunConfig, views: int, path: str) -> dict[str, Counter[str]]:
    """Bytes that one block of the tower moves, `forward` and `backward`."""
    with patch.dict(os.environ, {library.VARIABLE: path}):
        parts = build_parts(config)
    vision, encoder = config.model.vision, parts.chunks[0].module.vision_model
    (block,), grid = encoder.transformer.layers, vision.global_grid
    table = rotary_table(grid, vision.head_dim, vision.rotary_base, torch.device("cpu"))
    shape = (grid * grid, views, vision.hidden_size)
    hidden = torch.randn(shape).to(parts.dtype).requires_grad_()
    start = hidden * 1  # no leaf: its gradient is handed on
    with Moving() as forward:
        out, _ = block(start, rotary_pos_emb=table)
    slope = torch.randn_like(out)
    with Moving() as backward:
        torch.autograd.grad(out, [start, *block.parameters()], slope)
    library._in_use.clear()
    return {"forward": forward.bytes, "backward": backward.bytes}
