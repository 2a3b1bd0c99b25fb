"""The forms of variable-length attention against the definition, in parts and whole; CUDA as far as a CPU goes."""

import math
from unittest.mock import patch

import pytest
import torch

from megatron_vl.errors import ConfigError
from megatron_vl.ops.varlen_attention import (
    BLOCKS,
    FLASH,
    PLAIN,
    kernel_of,
    merge,
    use_flash_attention,
)
from megatron_vl.plan.attention_calls import Call, whole_call
from tests.ops.flash_stand_in import StandIn

LENGTHS = {  # (queries, keys) of each sequence
    "whole": [(7, 7), (7, 7), (3, 3), (1, 1)],
    "full": [(5, 9), (5, 9), (9, 4), (2, 1)],
    "late queries": [(4, 12), (4, 4), (3, 20)],
}
SCALE = 0.3


def call_of(name: str) -> Call:
    lengths = LENGTHS[name]
    at = [[sum(pair[side] for pair in lengths[:i]) for i in range(len(lengths) + 1)] for side in (0, 1)]
    queries, keys = (tuple(zip(edges, edges[1:])) for edges in at)
    return Call(queries, keys, causal=name != "full")


def tensors(call: Call, heads: int, groups: int, width: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(call.cu_queries[-1], heads), (call.cu_keys[-1], groups), (call.cu_keys[-1], groups)]
    sizes.append(sizes[0])
    return [torch.randn(rows, n, width, generator=generator) for rows, n in sizes]  # q, k, v, gradient


def by_definition(q, k, v, grad, call: Call):
    """Output, sums and gradients by autograd in fp64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    repeats, outs, sums = q.shape[1] // k.shape[1], [], []
    for (a, b), (c, d) in zip(call.queries, call.keys):
        scores = torch.einsum("qnd,knd->nqk", q[a:b], k[c:d].repeat_interleave(repeats, 1)) * SCALE
        if call.causal:
            visible = torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
            scores = scores.masked_fill(~visible, -math.inf)
        outs.append(torch.einsum("nqk,knd->qnd", scores.softmax(-1), v[c:d].repeat_interleave(repeats, 1)))
        sums.append(scores.logsumexp(-1))
    out = torch.cat(outs)
    out.backward(grad.double())
    return out.detach(), torch.cat(sums, 1).detach(), q.grad, k.grad, v.grad


def far(found, expected) -> float:
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max((a.double() - b).abs().max().item() for a, b in zip(found, expected))


def compute(kernel, q, k, v, grad, call):
    out, lse = kernel.forward(q, k, v, call, SCALE)
    assert out.dtype == q.dtype and lse.dtype == torch.promote_types(q.dtype, torch.float32)
    return out, lse, *kernel.backward(grad, q, k, v, out, lse, call, SCALE)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("kernel", [BLOCKS, PLAIN], ids=["blocks", "plain"])
def test_forward_sums_and_gradients(kernel, heads, groups, name):
    call = call_of(name)
    given = tensors(call, heads, groups)
    assert far(compute(kernel, *given, call), by_definition(*given, call)) < 5e-6


@pytest.mark.parametrize("kernel", [BLOCKS, PLAIN], ids=["blocks", "plain"])
def test_bf16_and_keys_that_lie_apart(kernel):
    call = call_of("late queries")
    q, k, v, grad = (x.bfloat16() for x in tensors(call, 4, 2))
    keys, values = torch.cat([k, v], dim=-1).split(8, dim=-1)  # as they come from an all-gather
    expected = by_definition(q, k, v, grad, call)
    assert far(compute(kernel, q, keys, values, grad, call), expected) < 0.06


def test_few_queries_at_a_time(monkeypatch):
    call = call_of("late queries")
    given = tensors(call, 4, 2)
    monkeypatch.setattr("megatron_vl.ops.varlen_attention.PLAIN_SCORES", 4 * 20 * 2)
    assert far(compute(PLAIN, *given, call), by_definition(*given, call)) < 5e-6


@pytest.mark.parametrize("kernel", [BLOCKS, PLAIN], ids=["blocks", "plain"])
def test_parts_of_the_keys_merge_to_the_whole(kernel):
    """A document of 12: its last 4 queries against keys 0..7, all visible, and 8..11, along the diagonal."""
    whole = Call(((0, 4),), ((0, 12),), True)
    q, k, v, grad = tensors(whole, 4, 2)
    parts = [
        (slice(0, 8), Call(((0, 4),), ((0, 8),), False)),
        (slice(8, 12), Call(((0, 4),), ((0, 4),), True)),
    ]
    found = [kernel.forward(q, k[rows], v[rows], call, SCALE) for rows, call in parts]
    out, lse = merge(*found[0], *found[1])
    expected = by_definition(q, k, v, grad, whole)
    gradients = [kernel.backward(grad, q, k[rows], v[rows], out, lse, call, SCALE) for rows, call in parts]
    dq = gradients[0][0] + gradients[1][0]
    dk, dv = (torch.cat([gradients[0][i], gradients[1][i]]) for i in (1, 2))
    assert far((out, lse, dq, dk, dv), expected) < 5e-6
    assert far((found[0][0],), expected[:1]) > 1e-2, "the second part makes no difference"


# --- CUDA, as far as a CPU goes


@pytest.mark.parametrize("name", LENGTHS)
def test_the_cuda_form_on_a_stand_in_with_equal_arguments(name):
    """The operators' arguments are read as their documentation says: int32 edges, causal from the last key."""
    call = call_of(name)
    given = tensors(call, 4, 2)
    stand_in = StandIn()
    with (
        patch.object(torch.ops.aten, "_flash_attention_forward", stand_in.forward),
        patch.object(torch.ops.aten, "_flash_attention_backward", stand_in.backward),
    ):
        found = compute(FLASH, *given, call)
    assert far(found, by_definition(*given, call)) < 5e-6
    assert stand_in.calls == 2


def test_the_cuda_form_fits_the_installed_operators():
    """Shapes on the meta device: the real operators accept the arguments and promise these shapes and formats."""
    call = call_of("late queries")
    q, k, v, grad = (x.bfloat16().to("meta") for x in tensors(call, 4, 2, width=16))
    out, lse = FLASH.forward(q, k, v, call, SCALE)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (4, call.cu_queries[-1]) and lse.dtype == torch.float32
    gradients = FLASH.backward(grad, q, k, v, out, lse, call, SCALE)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_the_operators_have_the_arguments_that_are_given():
    for operator, names in (
        (torch.ops.aten._flash_attention_forward, StandIn.FORWARD),
        (torch.ops.aten._flash_attention_backward, StandIn.BACKWARD),
    ):
        assert [a.name for a in operator.default._schema.arguments][: len(names)] == names


class OnCuda:
    """What `kernel_of` looks at."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.dtype, self.shape = dtype, (1, 1, width)


def test_which_form_is_taken():
    assert kernel_of(torch.zeros(1, 1, 8)) is BLOCKS
    assert kernel_of(OnCuda(torch.bfloat16, 128)) is FLASH and kernel_of(OnCuda(torch.float16, 96)) is FLASH
    for dtype, width in ((torch.float32, 128), (torch.bfloat16, 12), (torch.bfloat16, 512)):
        assert kernel_of(OnCuda(dtype, width)) is PLAIN


def test_flash_attention_that_is_not_installed_is_refused():
    use_flash_attention("built_in")
    with pytest.raises(ConfigError, match="flash_attention = fa3: PyTorch cannot use it.*install flash-attn"):
        use_flash_attention("fa3")


def test_nothing_is_as_large_as_the_pairs():
    """A row of two documents: what a call makes is of the order of its rows."""
    call = whole_call((0, 3000, 4000), causal=True)
    q, k, v, grad = tensors(call, 2, 2)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(found) if torch.is_tensor(x))
            return found

    with Watch():
        compute(BLOCKS, q, k, v, grad, call)
    assert 0 < max(sizes) <= q.numel() + k.numel()
