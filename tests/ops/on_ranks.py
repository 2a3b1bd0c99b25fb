"""The fused head on tensor-parallel ranks, against fp64 on whole logits and against Megatron-Core's own head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.ops.cross_entropy import HeadShard, Scoring, score_tokens
from megatron_vl.parallel.runtime import choose_device, start
from megatron_vl.parity.compare import relative
from tests.ops.plain import make_case, plain_scores


def distances(
    parallel: ParallelConfig, heads: Sequence[tuple[int, int, float]], dtype: torch.dtype
) -> list[dict[str, float]]:
    """What `_distances` says of each (vocabulary, chunk, share of scored tokens), on this rank."""
    tp = start(parallel, 1, choose_device("cpu")).groups.tp
    return [_distances(parallel, tp, *head, dtype) for head in heads]


def _distances(parallel: ParallelConfig, tp, vocab: int, chunk: int, share: float, dtype) -> dict[str, float]:
    """Relative distances of the fused head from fp64, and from Megatron-Core's head.

    A rank looks at its own slice of the hidden states (sequence parallelism) and of the weight.
    """
    sp = parallel.sequence_parallel
    case = make_case(length=12, batch=2, vocab=vocab, share=share)
    case.hidden, case.weight = (t.to(dtype).float() for t in (case.hidden, case.weight))
    expected = plain_scores(case, temperature=0.7)
    padded = torch.zeros(-(-vocab // tp.size()) * tp.size(), case.weight.shape[1])
    padded[:vocab] = case.weight
    hidden = (
        (case.hidden.chunk(tp.size())[tp.rank()] if sp else case.hidden).to(dtype).clone().requires_grad_()
    )
    weight = torch.nn.Parameter(padded.chunk(tp.size())[tp.rank()].to(dtype).clone())
    head = HeadShard(vocab, tp, sp, chunk)
    scores = score_tokens(hidden, weight, case.labels, head, Scoring(0.7, entropy=True, best=True))
    (scores.losses * case.of_loss + scores.entropy * case.of_entropy).sum().backward()
    rows = torch.zeros(padded.shape, dtype=torch.float64)
    rows[:vocab] = expected.grad_weight
    grad_hidden = expected.grad_hidden.chunk(tp.size())[tp.rank()] if sp else expected.grad_hidden
    found = {
        "losses": relative(scores.losses.detach(), expected.losses),
        "entropy": relative(scores.entropy.detach(), expected.entropy),
        "best": (scores.best != expected.best).float().mean().item(),
        "grad hidden": relative(hidden.grad, grad_hidden),
        "grad weight": relative(weight.grad, rows.chunk(tp.size())[tp.rank()]),
        "zero rows": weight.grad[max(vocab - tp.rank() * weight.shape[0], 0) :].abs().sum().item(),
    }
    return found | _from_megatron(parallel, tp, head, case, hidden.detach(), weight.detach())


def _from_megatron(parallel, tp, head: HeadShard, case, hidden, weight) -> dict[str, float]:
    config = TransformerConfig(
        num_layers=1, hidden_size=weight.shape[1], num_attention_heads=4, use_cpu_initialization=True,
        perform_initialization=False, tensor_model_parallel_size=tp.size(), gradient_accumulation_fusion=False,
        sequence_parallel=parallel.sequence_parallel, params_dtype=weight.dtype,
    )  # fmt: skip
    rows = weight.shape[0] * tp.size()
    layer = ColumnParallelLinear(
        weight.shape[1], rows, config=config, init_method=torch.nn.init.zeros_, bias=False, tp_group=tp
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
    plain = hidden.clone().requires_grad_()
    logits = layer(plain)[0]
    words = torch.arange(weight.shape[0]) + tp.rank() * weight.shape[0]
    logits = logits.masked_fill(words >= head.vocab_size, float("-inf"))
    losses = vocab_parallel_cross_entropy(logits, case.labels.clamp(min=0).t().contiguous()).t()
    losses = losses * (case.labels >= 0)
    (losses * case.of_loss).sum().backward()
    fused, own = hidden.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
    scores = score_tokens(fused, own, case.labels, head, Scoring())
    (scores.losses * case.of_loss).sum().backward()
    return {
        "losses, Megatron": relative(scores.losses.detach(), losses.detach()),
        "grad hidden, Megatron": relative(fused.grad, plain.grad),
        "grad weight, Megatron": relative(own.grad, layer.weight.grad),
    }
