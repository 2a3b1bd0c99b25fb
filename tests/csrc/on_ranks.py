"""What the parity test runs on the ranks."""

from __future__ import annotations

import os
from collections import Counter
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vl.config.schema import RunConfig
from megatron_vl.ops import library
from megatron_vl.parity.on_rank import Seen
from megatron_vl.parity.reference import Batches
from tests.model.on_ranks import gradients_on_rank


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
