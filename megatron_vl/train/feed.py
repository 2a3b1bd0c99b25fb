"""Micro-batches for one step, agreed among the ranks of a data-parallel replica.

Ranks of a replica build the same rows from the same files, but only a rank that encodes an image decodes it. A
decode failure is therefore told to the others before the step, and the document loses its loss on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_vl.data.bad_samples import BadSample, BadSampleLog
from megatron_vl.data.batch import MicroBatch, mask_documents
from megatron_vl.data.loader import Loader, Place
from megatron_vl.errors import DataError
from megatron_vl.parallel.runtime import Runtime


def place_of(runtime: Runtime) -> Place:
    """Which part of the data this rank takes; ranks that encode no view decode no image."""
    layout, coords = runtime.layout, runtime.coords
    vision_rank = layout.vision_rank(coords) if layout.encodes(coords) else None
    return Place(coords.dp, layout.dp, vision_rank, layout.vision_size, layout.tower_beside)


class Feed:
    """The loader's steps, agreed; refused samples go to the log of the run."""

    def __init__(self, loader: Loader, runtime: Runtime, log: BadSampleLog | None) -> None:
        self.loader, self.runtime, self.log = loader, runtime, log

    def next_step(self) -> list[MicroBatch]:
        """Load and settle the micro-batches of the next step."""
        return self.settle(self.loader.next_step())

    def settle(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """What this rank has loaded, agreed with the other ranks; every rank calls it.

        Raises:
            DataError: the ranks of this replica have read different data; the message names the ranks' values.
        """
        batches = agree(batches, self.runtime)
        if self.log is not None:
            self._record(batches)
        return batches

    def _record(self, batches: Sequence[MicroBatch]) -> None:
        records = [r for b in batches for r in b.refused] + [f.record for b in batches for f in b.failed]
        count = torch.tensor([len(records)], device=self.runtime.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        if count.item():
            everyone: list[list[BadSample]] = [[] for _ in range(self.runtime.layout.world_size)]
            dist.all_gather_object(everyone, records)
            self.log.add(r for records in everyone for r in records)


def agree(batches: Sequence[MicroBatch], runtime: Runtime) -> list[MicroBatch]:
    """Compare fingerprints over the replica and spread decode failures: same documents masked on every rank."""
    group = runtime.groups.replica
    if group.size() == 1:
        return [mask_documents(b, {f.document for f in b.failed}) if b.failed else b for b in batches]
    seen = sum(b.fingerprint() * (i + 1) for i, b in enumerate(batches)) % (1 << 40)
    state = torch.tensor([sum(len(b.failed) for b in batches), seen, -seen], device=runtime.device)
    dist.all_reduce(state, op=dist.ReduceOp.MAX, group=group)
    failures, largest, smallest = state[0].item(), state[1].item(), -state[2].item()
    if largest != smallest:
        raise DataError(
            f"{runtime.name}: the ranks of this model replica have read different data (this rank's fingerprint "
            f"{seen}, others between {smallest} and {largest}): the data files must be the same on every node"
        )
    if not failures:
        return list(batches)
    everyone: list[list[set[int]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everyone, [{f.document for f in b.failed} for b in batches], group=group)
    failed = [set().union(*(rank[i] for rank in everyone)) for i in range(len(batches))]
    return [mask_documents(b, documents) if documents else b for b, documents in zip(batches, failed)]
