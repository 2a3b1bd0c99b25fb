"""Activations of decoder layers in host memory between forward and backward pass.

Megatron-Core 0.16.1 has an off-load of its own (``fine_grained_activation_offloading``), but only beside Transformer
Engine. Here autograd's hooks for saved tensors do it: a tensor leaves the device when a layer saves it, beside the
computation, and the one that was saved before is fetched while the backward pass uses the one behind. Never run on
CUDA; on CPU it makes copies, which is for tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SMALLEST = 1 << 20  # bytes: smaller tensors stay where they are


@dataclass
class _Away:
    """A tensor in host memory. arrived: its copy on the device, once it was fetched."""

    host: torch.Tensor
    device: torch.device
    left: torch.cuda.Event | None
    arrived: torch.Tensor | None = None
    ready: torch.cuda.Event | None = None
    used: bool = False


class Offload:
    """What one micro-batch's layers saved, in order. What is no activation, and what is small, stays.

    parameters: theirs and their views' memory is never moved. smallest: bytes.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], smallest: int = SMALLEST) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in parameters}
        self.smallest, self.bytes = smallest, 0
        self.away: list[_Away] = []

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Layers that run inside have their saved tensors moved."""
        with torch.autograd.graph.saved_tensors_hooks(self._leave, self._return):
            yield

    def _leave(self, x: torch.Tensor) -> torch.Tensor | int:
        size = x.numel() * x.element_size()
        # Leaves are weights and what layers share, like the angles of the rotary embedding.
        if size < self.smallest or x.is_leaf or x.untyped_storage().data_ptr() in self.weights:
            return x
        self.bytes += size
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        left = None
        if x.is_cuda:
            out = _stream(x.device)
            out.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(out):
                host.copy_(x, non_blocking=True)
                left = out.record_event()
            x.record_stream(out)  # its memory is not reused before it was read
        else:
            host.copy_(x)
        self.away.append(_Away(host, x.device, left))
        return len(self.away) - 1

    def _return(self, saved: torch.Tensor | int) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._fetch(saved)
        if saved > 0 and not self.away[saved - 1].used:
            self._fetch(saved - 1)  # the backward pass goes from the last to the first
        here = self.away[saved]
        if here.ready is not None:
            current = torch.cuda.current_stream(here.device)
            current.wait_event(here.ready)
            here.arrived.record_stream(current)
        x, here.arrived, here.used = here.arrived, None, True  # the host keeps it as long as the graph lives
        return x

    def _fetch(self, index: int) -> None:
        here = self.away[index]
        if here.arrived is not None:
            return
        if here.left is None:
            here.arrived = here.host.to(here.device, copy=True)
            return
        back = _stream(here.device)
        with torch.cuda.stream(back):
            back.wait_event(here.left)
            here.arrived = here.host.to(here.device, non_blocking=True)
            here.ready = back.record_event()


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device that copies run on, in both directions."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
