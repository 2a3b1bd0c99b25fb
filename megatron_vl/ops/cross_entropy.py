"""Vocabulary-parallel cross entropy straight from hidden states, a chunk of tokens at a time.

The output projection, the softmax and the loss are one autograd function, so that the fp32 logits of the whole row
(80 GB for 131,072 tokens and 151,936 words) never exist: only those of one chunk do, forward and backward.

The backward pass computes each chunk's logits again. The other way, forming the gradient in the forward pass, needs
the factor of every token's loss beforehand, which RL does not have, and would hold a weight gradient per micro-batch
in flight. The price is one more product with the head per scored token.

Tokens that are not scored take no part: their loss and entropy are 0 and their hidden states get no gradient.
Labels are equal on all tensor-parallel ranks, and so is the number of collectives, which does not depend on the
number of chunks: two small reductions per call (three with ``best``), besides those of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

LOWEST = torch.finfo(torch.float32).min  # stands for the maximum over no words
PRODUCT_BYTES = 64 << 20  # fp32 buffer through which a gradient of another format reaches the fp32 sum


@dataclass(frozen=True)
class Scoring:
    """What is computed beside the losses, and how.

    temperature: logits are divided by it (not those of ``best``, which it does not change). entropy: of the
    predicted distribution, in nats. best: the most probable token.
    """

    temperature: float = 1.0
    entropy: bool = False
    best: bool = False


@dataclass(frozen=True)
class TokenScores:
    """Per token ``[b, S / cp]``; what was not asked for is None.

    losses: fp32, minus the log-probability of the label, 0 where not scored. entropy: fp32, 0 where not scored.
    best: int64, -1 where not scored. Losses and entropy are differentiable.
    """

    losses: torch.Tensor
    entropy: torch.Tensor | None
    best: torch.Tensor | None

    @property
    def logprobs(self) -> torch.Tensor:
        """Log-probabilities of the labels, fp32 ``[b, S / cp]``, 0 where not scored."""
        return -self.losses


@dataclass(frozen=True)
class HeadShard:
    """What does not change from call to call.

    vocab_size: real words over all ranks; rows of the head beyond it only pad and have probability 0. tp: the ranks
    that share the head. sequence_parallel: hidden states come cut over ``tp``. chunk_tokens: tokens whose logits
    exist at once.
    """

    vocab_size: int
    tp: dist.ProcessGroup
    sequence_parallel: bool
    chunk_tokens: int

    def words(self, weight: torch.Tensor) -> tuple[int, int]:
        """(first word, number of real words) of this rank's shard of the head."""
        first = self.tp.rank() * weight.shape[0]
        return first, min(max(self.vocab_size - first, 0), weight.shape[0])

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of all tokens, ``[S / cp * b, h]``."""
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        if not self.sequence_parallel or self.tp.size() == 1:
            return flat
        whole = flat.new_empty((flat.shape[0] * self.tp.size(), flat.shape[1]))
        dist.all_gather_into_tensor(whole, flat, group=self.tp)
        return whole

    def reduce(self, gradient: torch.Tensor) -> torch.Tensor:
        """Sum of the ranks' gradients of ``gather``'s result, of the tokens that this rank put in."""
        if self.tp.size() == 1:
            return gradient
        if not self.sequence_parallel:
            dist.all_reduce(gradient, group=self.tp)
            return gradient
        mine = gradient.new_empty((gradient.shape[0] // self.tp.size(), gradient.shape[1]))
        dist.reduce_scatter_tensor(mine, gradient, group=self.tp)
        return mine

    def chunks(self, rows: torch.Tensor) -> Iterator[slice]:
        """Slices of the scored tokens."""
        for start in range(0, rows.shape[0], self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, rows.shape[0]))


def score_tokens(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: HeadShard, scoring: Scoring
) -> TokenScores:
    """Losses and what else is asked for, from the hidden states of the last layer.

    hidden: ``[S / cp, b, h]``, with sequence parallelism ``[S / cp / tp, b, h]``, in the format of the weight.
    weight: this rank's rows of the head, ``[V / tp, h]``. labels: int64 ``[b, S / cp]``, already shifted, negative
    = not scored. A label that is no real word has infinite loss.

    The gradient of the weight is added chunk by chunk to ``weight.main_grad`` where Megatron-Core's DDP has put one
    (fp32), and autograd gets none (stock DDP would refuse that under ``overlap_grad_reduce``, ours does not:
    ``parallel/data_parallel.py``); elsewhere it is summed in fp32 and handed to autograd.
    """
    batch, length = labels.shape
    flat = labels.t().reshape(-1)
    rows = (flat >= 0).nonzero().squeeze(1)
    losses, entropy, best = _Scores.apply(hidden, weight, rows, flat[rows], head, scoring)

    def spread(values: torch.Tensor | None, fill: int) -> torch.Tensor | None:
        if values is None:
            return None
        whole = torch.full((length * batch,), fill, dtype=values.dtype, device=values.device)
        return whole.index_copy(0, rows, values).view(length, batch).t().contiguous()

    return TokenScores(spread(losses, 0), spread(entropy, 0), spread(best, -1))


class _Scores(torch.autograd.Function):
    """(losses, entropy, best) of ``n`` scored tokens, each ``[n]``."""

    @staticmethod
    def forward(ctx, hidden, weight, rows, targets, head: HeadShard, scoring: Scoring):
        first, count = head.words(weight)
        whole = head.gather(hidden)
        shards = [
            _shard_statistics(
                _logits(whole[rows[part]], weight[:count], scoring), targets[part] - first, scoring
            )
            for part in head.chunks(rows)
        ]
        empty = torch.zeros(0, dtype=torch.float32, device=hidden.device)
        top, target, total, weighted, best = (
            (torch.cat(values) if values else empty) for values in (zip(*shards) if shards else [()] * 5)
        )
        top, target, total, weighted, best = _over_ranks(
            top, target, total, weighted, best.long() + first, head.tp, scoring
        )
        losses = total.log() - (target - top)
        entropy = total.log() - weighted / total if scoring.entropy else None
        ctx.save_for_backward(hidden, weight, rows, targets, top, total, entropy)
        ctx.head, ctx.scoring, ctx.main_grad = head, scoring, getattr(weight, "main_grad", None)
        ctx.set_materialize_grads(False)
        if scoring.best:
            ctx.mark_non_differentiable(best)
        return losses, entropy, best if scoring.best else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, grad_entropy, _):
        hidden, weight, rows, targets, top, total, entropy = ctx.saved_tensors
        head, scoring = ctx.head, ctx.scoring
        first, count = head.words(weight)
        whole = head.gather(hidden)
        grad_whole = torch.zeros_like(whole) if ctx.needs_input_grad[0] else None
        summed = None
        if ctx.needs_input_grad[1]:
            summed = ctx.main_grad
            if summed is None:
                summed = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        factors = [None if g is None else g / scoring.temperature for g in (grad_losses, grad_entropy)]
        for part in head.chunks(rows):  # a chunk's buffers are gone before the next one's are made
            tokens = whole[rows[part]]
            some = [None if x is None else x[part] for x in (*factors, top, total, entropy)]
            logits = _logits(tokens, weight[:count], scoring)
            gradient = _logit_gradient(logits, targets[part] - first, *some).to(weight.dtype)
            del logits
            if grad_whole is not None:
                grad_whole.index_copy_(0, rows[part], gradient @ weight[:count])
            if summed is not None:
                _add_product(summed[:count], gradient, tokens)
            del gradient
        grad_hidden = None if grad_whole is None else head.reduce(grad_whole).view(hidden.shape)
        to_autograd = summed is not None and ctx.main_grad is None
        return grad_hidden, summed.to(weight.dtype) if to_autograd else None, None, None, None, None


def _logits(tokens: torch.Tensor, words: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """fp32 ``[c, words]``, rounded to the format of the weight before, as Megatron-Core's head does."""
    logits = torch.matmul(tokens, words.t()).float()
    return logits if scoring.temperature == 1.0 else logits.div_(scoring.temperature)


def _shard_statistics(logits: torch.Tensor, targets: torch.Tensor, scoring: Scoring) -> tuple:
    """What this rank's words say of a chunk; the logits ``[c, words]`` are overwritten.

    targets: ids counted from this rank's first word. Returns fp32 ``[c]`` each: the maximum; the target's logit, -inf
    where another rank has the target; with ``s`` = logits less the maximum: the sum of ``exp(s)``; the sum of
    ``exp(s) s`` (0 when no entropy is asked for); the place of the maximum.
    """
    count = logits.shape[1]
    if count == 0:
        nothing = logits.new_zeros(logits.shape[0])
        return nothing + LOWEST, nothing - torch.inf, nothing, nothing, nothing
    if scoring.best:
        top, best = logits.max(dim=-1)
    else:
        top = logits.amax(dim=-1)
        best = torch.zeros_like(top)
    owned = (targets >= 0) & (targets < count)
    target = logits.gather(1, targets.clamp(0, count - 1).unsqueeze(1)).squeeze(1)
    target = target.masked_fill(~owned, -torch.inf)
    logits.sub_(top.unsqueeze(1))
    if not scoring.entropy:
        return top, target, logits.exp_().sum(dim=-1), torch.zeros_like(top), best
    powers = logits.exp()
    return top, target, powers.sum(dim=-1), powers.mul_(logits).sum(dim=-1), best


def _over_ranks(top, target, total, weighted, best, tp: dist.ProcessGroup, scoring: Scoring) -> tuple:
    """The statistics of ``_shard_statistics`` over the words of all ranks."""
    if tp.size() == 1 or top.shape[0] == 0:
        return top, target, total, weighted, best
    highest = torch.stack([top, target])
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp)
    below = top - highest[0]
    sums = torch.stack([total, weighted + total * below]) * below.exp()
    dist.all_reduce(sums, group=tp)
    if scoring.best:
        best = best.masked_fill(top != highest[0], torch.iinfo(best.dtype).max)
        dist.all_reduce(best, op=dist.ReduceOp.MIN, group=tp)
    return highest[0], highest[1], sums[0], sums[1], best


def _logit_gradient(logits, targets, of_loss, of_entropy, top, total, entropy) -> torch.Tensor:
    """Gradient of this rank's logits ``[c, words]``, in their memory unless the entropy has a part in it.

    of_loss, of_entropy: fp32 ``[c]`` or None, the gradients of the results. With ``p`` the probabilities, a loss gives
    ``p - 1[target]`` and an entropy ``H`` gives ``-p (log p + H)``.
    """
    logits.sub_(top.unsqueeze(1))
    count = logits.shape[1]
    if of_loss is None:
        of_loss = torch.zeros_like(top)
    if of_entropy is None:
        gradient = logits.exp_().mul_((of_loss / total).unsqueeze(1))
    else:
        gradient = logits.exp().div_(total.unsqueeze(1))
        shift = entropy - total.log()
        gradient.mul_(
            logits.add_(shift.unsqueeze(1)).mul_(-of_entropy.unsqueeze(1)).add_(of_loss.unsqueeze(1))
        )
    owned = (targets >= 0) & (targets < count)
    if count:
        gradient.scatter_add_(
            1,
            targets.clamp(0, count - 1).unsqueeze(1),
            torch.where(owned, -of_loss, torch.zeros_like(of_loss)).unsqueeze(1),
        )
    return gradient


def _add_product(summed: torch.Tensor, gradient: torch.Tensor, tokens: torch.Tensor) -> None:
    """``summed += gradient^T tokens``: ``[v, h] += [c, v]^T [c, h]``, added up in the format of ``summed``."""
    if summed.dtype == gradient.dtype:
        summed.addmm_(gradient.t(), tokens)
        return
    block = max(1, PRODUCT_BYTES // (4 * summed.shape[1]))
    for start in range(0, summed.shape[0], block):
        part = gradient[:, start : start + block].t()
        if summed.is_cuda:
            product = torch.mm(part, tokens, out_dtype=summed.dtype)
        else:
            product = torch.mm(part.to(summed.dtype), tokens.to(summed.dtype))
        summed[start : start + block].add_(product)
