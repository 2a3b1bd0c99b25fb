"""The fused head on one GPU: bf16 against whole logits, weight gradient in fp32, memory of a chunk."""

from __future__ import annotations

import pytest
import torch

from megatron_vl.ops.cross_entropy import HeadShard, Scoring, score_tokens
from megatron_vl.parity.compare import relative
from megatron_vl.plan.loss_chunk import loss_chunk_tokens

pytestmark = pytest.mark.gpu
LENGTH, WORDS, WIDTH = 8192, 18992, 1024


class Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("entropy", [False, True])
def test_bf16_equals_whole_logits_in_a_fraction_of_the_memory(entropy: bool):
    generator = torch.Generator("cuda").manual_seed(0)
    options = dict(device="cuda", generator=generator)
    hidden = torch.randn(LENGTH, 1, WIDTH, **options).bfloat16().requires_grad_()
    weight = torch.nn.Parameter((torch.randn(WORDS, WIDTH, **options) * 0.02).bfloat16())
    weight.main_grad = torch.zeros(weight.shape, device="cuda")
    labels = torch.randint(WORDS, (1, LENGTH), **options)
    labels[0, ::3] = -100
    chunk = loss_chunk_tokens(WORDS)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores = score_tokens(
        hidden, weight, labels, HeadShard(WORDS, Alone(), False, chunk), Scoring(entropy=entropy)
    )
    (scores.losses.sum() + (scores.entropy.sum() if entropy else 0)).backward()
    peak = torch.cuda.max_memory_allocated() - before
    plain_hidden = hidden.detach()[:, 0].float().requires_grad_()
    plain_weight = weight.detach().float().requires_grad_()
    logprobs = (plain_hidden @ plain_weight.t()).log_softmax(-1)[labels[0] >= 0]
    scored = labels[0][labels[0] >= 0]
    losses = -logprobs.gather(1, scored[:, None])[:, 0]
    extra = -(logprobs.exp() * logprobs).sum() if entropy else 0
    (losses.sum() + extra).backward()
    assert relative(scores.losses.detach()[labels >= 0].cpu(), losses.detach().cpu()) < 1e-2
    assert relative(hidden.grad[:, 0].float().cpu(), plain_hidden.grad.cpu()) < 2e-2
    assert weight.grad is None and relative(weight.main_grad.cpu(), plain_weight.grad.cpu()) < 2e-2
    whole, buffers = 4 * LENGTH * WORDS, 3.0 if entropy else 2.0
    assert peak < buffers * 4 * chunk * WORDS + 8 * LENGTH * WIDTH + (128 << 20)
    print(f"peak {peak / 2**20:.0f} MiB; whole fp32 logits {whole / 2**20:.0f} MiB")
