"""What the tests of parallel/ and of attention run on the ranks."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_vl.parallel.context_parallel import global_order, local_index
from megatron_vl.parallel.feature_exchange import exchange_features
from megatron_vl.parallel.feature_plan import owners, plan_exchange
from megatron_vl.parallel.sequence_exchange import Passing, gather_rows, sum_and_scatter_rows
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.vision_share import share_views
from tests.parallel.naive import naive_attention


def fail_on_one(rank: int) -> int:
    """Raises on one rank; the others wait for it in a collective."""
    if dist.get_rank() == rank:
        raise ValueError("this one does not like its input")
    dist.barrier()
    return dist.get_rank()


def die_on_one(rank: int) -> None:
    """Kills one rank as the kernel would; the others wait for it in a collective."""
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_one(rank: int) -> None:
    """One rank does nothing; the others are done."""
    if dist.get_rank() == rank:
        time.sleep(600)


def say(word: str) -> str:
    return f"{word} {dist.get_rank()} of {dist.get_world_size()}"


def cpu_redirects() -> dict[str, Any]:
    """Each redirect of the CPU adapter once, as Megatron-Core would call it."""
    from megatron.core.tensor_parallel import random as megatron_random

    from megatron_vl.parallel import cpu

    factories = [torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device]
    cpu.install()  # a second time
    x = torch.ones(2)
    made = [
        torch.empty(2, device="cuda"), torch.zeros(2, device=torch.device("cuda", 0)),
        torch.tensor(1.0, device="cuda"),
        torch.full((2,), 1.0, device=torch.cuda.current_device()),
        torch.arange(3, device="cuda", dtype=torch.int64),
        torch.empty_like(x, device="cuda"), x.cuda(), x.to("cuda"), x.to(device="cuda"),
        x.to("cuda", torch.float64),
        torch.empty(2, pin_memory=True), x.pin_memory(), torch.nn.Linear(2, 2).cuda().weight,
    ]  # fmt: skip
    with torch.device("meta"):  # Megatron-Core's initialisation without memory, and transformers'
        named = [torch.arange(3), torch.empty(2), torch.tensor([1.0])]
    torch.cuda.synchronize()
    torch.cuda.set_device(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        event = stream.record_event()
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    again = torch.rand(3)
    megatron_random.model_parallel_cuda_manual_seed(3, tp_rank=0, ep_rank=0, etp_rank=0)
    tracker = megatron_random.get_cuda_rng_tracker()
    with tracker.fork():
        inside = torch.rand(3)
    megatron_random.model_parallel_cuda_manual_seed(3, tp_rank=0, ep_rank=0, etp_rank=0)
    with tracker.fork():
        inside_again = torch.rand(3)
    try:
        torch.cuda.Event().elapsed_time(event)
        timed = "no error"
    except RuntimeError as error:
        timed = str(error)
    return {
        "by_context": {x.device.type for x in named},
        "devices": {t.device.type for t in made},
        "dtype": made[9].dtype,
        "types": (x.type(), x.to(torch.bfloat16).type(), x.type(torch.float64).dtype),
        "query": stream.query() and event.query(),
        "rng": torch.equal(first, again)
        and torch.equal(inside, inside_again)
        and not torch.equal(first, inside),
        "timed": timed,
        "same": factories == [torch.empty, torch.Tensor.to, torch.Tensor.type, torch.cuda.current_device],
    }


def sequence_exchange(bounds: tuple[int, ...]) -> dict[str, bool]:
    """Gathered rows, and what comes back of their gradient, against the whole tensor, which every rank can make."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(bounds[-1], 3, generator=generator)
    weights = torch.randn(size, bounds[-1], 3, generator=generator)
    index, order = local_index(bounds, size, rank), global_order(bounds, size)
    gathered = gather_rows(whole[index], group)
    mine = sum_and_scatter_rows(torch.empty_like(whole).index_copy(0, order, weights[rank]), group)
    return {
        "forward": torch.equal(gathered[order], whole),
        "backward": torch.allclose(mine, weights.sum(0)[index], atol=1e-6),
    }


def ring_turn() -> list[tuple[float, float]]:
    """Two tensors at a time, one posted before the other, all the way round."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    first, second = torch.full((3,), float(rank)), torch.full((3,), float(rank + 100))
    found = []
    for _ in range(size):
        one = Passing(first, group, 0)
        two = Passing(second, group, 1)
        second, first = two.received(), one.received()
        found.append((first[0].item(), second[0].item()))
    return found


def feature_exchange(layout: Layout, kinds: list[int], bounds: list[int], first: int, trained: bool = True):
    """`exchange_features` over all ranks against the whole tensor, which every rank can make.

    The features take the positions from `first` on; crops have 2 rows, globals 5. Owners that are copies have equal
    gradients. Returns what held on this rank, and how many rows it encoded and owned.
    """
    rank, tokens, costs = dist.get_rank(), (2, 5), (2, 5)
    shares, rows = share_views(kinds, layout.vision_size, costs), [tokens[kind] for kind in kinds]
    positions = np.arange(first, first + sum(rows))
    plan = plan_exchange(kinds, shares, tokens, (positions * 0, positions), bounds, layout, rank)
    generator = torch.Generator().manual_seed(2)
    whole, weight = (torch.randn(sum(rows), 4, generator=generator) for _ in range(2))
    of_view = list(zip(whole.split(rows), weight.split(rows))) if kinds else []
    mine = shares[layout.vision_rank(Coords(rank % layout.tp, rank // layout.tp, 0, 0))]
    empty = torch.zeros(0, 4)
    features = torch.cat([empty, *(of_view[view][0] for view in mine)]).requires_grad_(trained)
    out = exchange_features(features, plan, dist.group.WORLD)
    unit, local = owners(positions, bounds, layout)
    owned = (unit == (rank if layout.sp else rank // layout.tp)).nonzero()[0]
    where = {int(position): n for n, position in enumerate(plan.slot_positions)}
    order = [where[int(local[row])] for row in owned]
    held = {"forward": torch.equal(out[order], whole[owned]) and len(out) == len(owned)}
    held["graph"] = out.requires_grad == trained
    if trained:
        scale = torch.zeros(len(owned), 4)
        scale[order] = weight[owned]
        (out * scale).sum().backward()
        expected = torch.cat([empty, *(of_view[view][1] for view in mine)])
        held["backward"] = torch.equal(features.grad, expected)
    return held, features.shape[0], len(owned)


def attention_errors(
    bounds: tuple[int, ...], packed: bool, heads: int, groups: int, causal: bool, rows: int, exchange: str
):
    """Largest differences of output and input gradients between `TorchCoreAttention` and the naive one."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_vl.model.attention import TorchCoreAttention

    size, rank, width, length = dist.get_world_size(), dist.get_rank(), 8, bounds[-1]
    config = SimpleNamespace(kv_channels=width, attention_dropout=0.0)
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    groups_of = SimpleNamespace(cp=dist.group.WORLD)
    module = TorchCoreAttention(config, 1, mask, "self", cp_comm_type=exchange, pg_collection=groups_of)
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(length, rows, n, width, generator=generator) for n in (heads, groups, groups)]
    weight = torch.randn(length, rows, heads * width, generator=generator)
    reference = [x.clone().requires_grad_() for x in whole]
    expected = naive_attention(*reference, bounds, causal)
    (expected * weight).sum().backward()
    index = local_index(bounds, size, rank)
    mine = [x[index].clone().requires_grad_() for x in whole]
    given = [x.squeeze(1) for x in mine] if packed else mine
    out = module(*given, packed_seq_params=SimpleNamespace(bounds=bounds) if packed else None)
    assert out.shape == ((len(index), heads * width) if packed else (len(index), rows, heads * width))
    out = out.unsqueeze(1) if packed else out
    (out * weight[index]).sum().backward()
    far = [(out - expected[index]).abs().max().item()]
    return far + [(a.grad - b.grad[index]).abs().max().item() for a, b in zip(mine, reference)]


_kept: list[dist.ProcessGroup] = []


def keep_groups(count: int) -> None:
    """A planted fault: groups outlive their job."""
    _kept.extend(dist.new_group() for _ in range(count))


def forget_groups() -> None:
    """Repairs it."""
    _kept.clear()
