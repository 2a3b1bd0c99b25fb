"""Models that take turns on the device: the others' weights and optimizer state wait in host memory.

Storages are emptied and filled again, so every view into them stays what it was: parameters into the buffers of
DDP, the distributed optimizer's fp32 shards into those, buckets. (Megatron-Core 0.16.1 has ``offload_to_cpu`` on
buffers and optimizers; moved one by one, fp32 shards would lose their tie to the parameters.) Contents of gradient
buffers are not kept: every step begins with zeros. On CUDA the copies are pinned. Never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_vl.checkpoint.live import mains
from megatron_vl.train.build import Parts


class Offload:
    """One model on this rank, on the device or in host memory."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._host: dict[int, torch.Tensor] = {}  # by place in the list of storages; kept for the next time
        self._away: list[tuple[torch.UntypedStorage, int, bool]] = []

    @property
    def on_device(self) -> bool:
        return not self._away

    @property
    def bytes_held(self) -> int:
        """Bytes of its storages on the device."""
        return sum(storage.nbytes() for storage, _ in self._storages())

    def _tensors(self) -> Iterator[tuple[torch.Tensor, bool]]:
        """Everything that takes memory, and whether its contents count."""
        for chunk in self.parts.chunks:
            for parameter in chunk.parameters():
                yield parameter, True
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data, False
        if self.parts.optimizer is None:
            return
        for main in mains(self.parts.optimizer):
            yield main.main, True
            yield from (
                (v, True) for v in main.inner.state[main.main].values() if isinstance(v, torch.Tensor)
            )

    def _storages(self) -> list[tuple[torch.UntypedStorage, bool]]:
        """Each storage once, in a fixed order."""
        found: dict[int, tuple[torch.UntypedStorage, bool]] = {}
        for tensor, counts in self._tensors():
            storage = tensor.untyped_storage()
            found.setdefault(storage._cdata, (storage, counts))
        return list(found.values())

    def release(self) -> None:
        """Copy to host memory and give the device's memory back; nothing to do when that was done."""
        if self._away:
            return
        for number, (storage, counts) in enumerate(self._storages()):
            size = storage.nbytes()
            if counts:
                self._host[number] = self._copied(number, storage)
            self._away.append((storage, size, counts))
        if self.parts.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        for storage, _, _ in self._away:
            storage.resize_(0)

    def _copied(self, number: int, storage: torch.UntypedStorage) -> torch.Tensor:
        values, host = _bytes_of(storage), self._host.get(number)
        if host is None or host.numel() != values.numel():
            host = torch.empty(values.numel(), dtype=torch.uint8, pin_memory=values.is_cuda)
        return host.copy_(values, non_blocking=True)

    def restore(self) -> None:
        """Bring everything back; gradients are zero. Nothing to do when it is here."""
        for number, (storage, size, counts) in enumerate(self._away):
            storage.resize_(size)
            if counts:
                _bytes_of(storage).copy_(self._host[number], non_blocking=True)
            else:
                _bytes_of(storage).zero_()
        self._away = []


class Turns:
    """Models by name, of which one is on the device at a time. They are in host memory until it is their turn."""

    def __init__(self) -> None:
        self.models: dict[str, Offload] = {}

    def add(self, name: str, parts: Parts) -> Parts:
        """Take a model that was just built; it leaves the device, so that the next one has room."""
        self.models[name] = Offload(parts)
        self.models[name].release()
        return parts

    def take(self, name: str) -> Parts:
        """Bring a model to the device, after the others have left it."""
        for other, model in self.models.items():
            if other != name:
                model.release()
        self.models[name].restore()
        return self.models[name].parts

    def all_here(self) -> None:
        """Bring every model to the device, to save or restore a checkpoint."""
        for model in self.models.values():
            model.restore()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """The storage as uint8 ``[n]``."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
