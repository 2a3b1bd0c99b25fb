"""Tensors without memory: integers have values, floats have shapes, and afterwards torch is what it was."""

import pytest
import torch
import torch.distributed as dist

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import ConfigError
from megatron_vl.parallel.fake import described_rank
from megatron_vl.parallel.runtime import choose_device
from megatron_vl.parallel.shapes import Message

PARALLEL = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)


@pytest.fixture
def rank():
    with described_rank(PARALLEL, 1, 6, 8) as given:
        yield given


def test_torch_is_what_it_was_afterwards():
    choose_device("auto")  # the adapter for CPU stays

    def patched():
        return (
            torch.tensor, torch.as_tensor, torch.Tensor.type, torch.cuda.current_device, dist.new_group,
            dist.all_to_all_single, dist.Backend.backend_capability["fake"],
        )  # fmt: skip

    with described_rank(PARALLEL, 1, 0, 8):
        pass
    before = patched()
    for number in (6, 7):  # one after the other
        with described_rank(PARALLEL, 1, number, 8) as (runtime, _):
            assert runtime.rank == number and all(x is not y for x, y in zip(patched(), before))
    assert patched() == before and not dist.is_initialized()
    assert torch.tensor([2.0]).item() == 2.0


def test_integers_have_values(rank):
    ids = torch.tensor([3, 1, 2], device="meta")
    assert ids.to("meta").tolist() == [3, 1, 2] and (ids == 1).nonzero().tolist() == [[1]]
    assert torch.arange(3, device="meta").sum().item() == 3 and torch.full((2,), 7).tolist() == [7, 7]
    assert torch.zeros(2, dtype=torch.int32, device="meta").tolist() == [0, 0]


def test_floats_have_shapes(rank):
    made = [
        torch.empty(2, 3),
        torch.tensor([1.0]),
        torch.full((4,), 0.5),
        torch.ones(2, device="meta").cpu() * 2,
    ]
    assert [x.is_meta for x in made] == [True, True, True, False]
    assert torch.arange(3).double().is_meta and made[0].long().is_meta
    assert made[0].sum().item() == 1.0 and bool(made[0].isfinite().all()) and made[1].tolist() == [1.0]
    assert torch.tensor([[made[0].sum()]]).is_meta  # reads the sum
    assert made[0].bfloat16().type() == "torch.cuda.BFloat16Tensor"


def test_shapes_that_follow_from_integers(rank):
    x = torch.empty(4, 5, requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    assert x[mask].shape == (3, 5) and x[torch.tensor([0, 0])].shape == (2, 5)
    copy = x * 1.0
    copy[mask] = 0.0
    torch.nn.functional.embedding(torch.tensor([1, 2]), x).sum().backward()
    assert x.grad.is_meta and x.grad.shape == (4, 5)


def test_shapes_are_still_checked(rank):
    for _ in range(2):
        with pytest.raises(RuntimeError):
            torch.empty(2, 3) + torch.empty(4, 3)
        assert (torch.empty(2, 3) @ torch.empty(3, 4)).shape == (2, 4)
        with pytest.raises(RuntimeError):
            torch.empty(2, 3) @ torch.empty(2, 4)
    assert (torch.empty(2, 3) + torch.empty(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_nothing_is_sent_but_it_is_written_down(rank):
    runtime, mode = rank
    x, group = torch.empty(4, 5, dtype=torch.bfloat16), runtime.groups.cp
    dist.all_reduce(x, group=runtime.groups.tp)
    dist.all_gather_into_tensor(torch.empty(8, 5, dtype=torch.bfloat16), x, group=group)
    count = torch.tensor([2])
    dist.all_reduce(count)
    assert count.tolist() == [2]
    mode.messages.clear()
    ways = [dist.P2POp(way, x, group=group, group_peer=0) for way in (dist.isend, dist.irecv)]
    for work in dist.batch_isend_irecv(ways):
        work.wait()
    sent = Message(False, group.group_name, (4, 5), torch.bfloat16)
    assert mode.messages == [sent, Message(True, group.group_name, (4, 5), torch.bfloat16)]


def test_the_place_of_the_rank(rank):
    runtime, _ = rank
    assert runtime.name == "rank 6 (dp1 pp0 cp1 tp0)" and runtime.device.type == "meta"
    groups = runtime.groups
    assert (groups.tp.size(), groups.tp.rank(), groups.dp_cp.size(), groups.dp_cp.rank()) == (2, 0, 4, 3)


def test_no_such_rank():
    told = "fake rank = 8: a layout of 8 ranks has ranks 0 to 7"
    with pytest.raises(ConfigError, match=told), described_rank(PARALLEL, 1, 8, 8):
        pass
