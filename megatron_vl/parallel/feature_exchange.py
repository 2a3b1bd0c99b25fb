"""The exchange of image features from the ranks that encode to those that own the positions, and of gradients back.

`exchange_features` is one differentiable step. Where encoding and use are apart in time (placement ``all``), the two
halves are called by themselves.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_vl.parallel.feature_plan import ExchangePlan


def send_features(features: torch.Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> torch.Tensor:
    """``[rows encoded here, h] -> [rows owned here, h]``, in the order of the plan's slots; every rank calls it."""
    assert features.shape[0] == len(plan.returned), "the local feature rows do not match the plan"
    return _all_to_all(features, plan.send, plan.send_counts, plan.receive_counts, group)


def return_gradients(grad: torch.Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> torch.Tensor:
    """``[rows owned here, h] -> [rows encoded here, h]``: the gradient of each row goes the way back, once."""
    back = _all_to_all(grad, plan.give_back, plan.give_counts, plan.get_counts, group)
    out = torch.empty_like(back)
    out[torch.from_numpy(plan.returned).to(grad.device)] = back
    return out


class _Exchange(torch.autograd.Function):
    """All-to-all of rows of unequal counts; the gradient of each row goes the way back, once.

    ``torch.distributed.nn.functional.all_to_all_single`` is not used: its backward sends back what came, and here
    owners may hold copies, of whose equal gradients only one may return.
    """

    @staticmethod
    def forward(ctx, features: torch.Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.plan, ctx.group, ctx.rows = plan, group, features.shape[0]
        return send_features(features, plan, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        back = return_gradients(grad, ctx.plan, ctx.group)
        assert ctx.rows == back.shape[0], "each feature row has one position, so one gradient"
        return back, None, None


def exchange_features(features: torch.Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> torch.Tensor:
    """``[rows encoded here, h] -> [rows owned here, h]``, in the order of the plan's slots; differentiable.

    group: the ranks of the plan. Every rank of it calls this, and its backward too when any rank's runs:
    a rank that encodes nothing hands in zero rows that require a gradient like the others'.
    """
    return _Exchange.apply(features, plan, group)


def _all_to_all(rows: torch.Tensor, order, send_counts: list[int], receive_counts: list[int], group):
    """The rows of each rank in the order of the ranks; ``order``: which local rows leave (numpy int64)."""
    leaving = rows.index_select(0, torch.from_numpy(order).to(rows.device, non_blocking=True))
    if group.size() == 1:
        return leaving
    arriving = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    dist.all_to_all_single(arriving, leaving, receive_counts, send_counts, group=group)
    return arriving
