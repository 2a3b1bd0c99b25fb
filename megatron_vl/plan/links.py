"""Links between ranks: what a collective takes over a group of them.

A ring over n ranks moves (n - 1) / n of the bytes for an all-gather or a reduce-scatter, twice that for an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.plan.devices import Device


@dataclass(frozen=True)
class Link:
    """A ring over ``size`` ranks: bytes per second of each rank, and latency of a collective."""

    size: int
    rate: float
    latency: float

    def gather(self, size_in_bytes: float) -> float:
        """Seconds of an all-gather or reduce-scatter whose whole tensor has so many bytes."""
        return (
            0.0 if self.size == 1 else (self.size - 1) / self.size * size_in_bytes / self.rate + self.latency
        )

    def reduce(self, size_in_bytes: float) -> float:
        """Seconds of an all-reduce."""
        return 2 * self.gather(size_in_bytes)


def link(device: Device, size: int, stride: int, ranks: int) -> Link:
    """The ring of a group of ``size`` ranks that are ``stride`` apart in a world of ``ranks``.

    Between nodes a group has the network shares of those of its members that sit in one node.
    """
    crowd = max(1.0, ranks / device.processors) if device.on_cpu else 1.0
    if size * stride <= device.node_ranks:
        return Link(size, device.intra_bytes / crowd, device.collective_seconds * crowd)
    members = min(size, max(1, device.node_ranks // stride))
    rate = min(device.intra_bytes, members * device.inter_bytes)
    return Link(size, rate, device.inter_seconds)
