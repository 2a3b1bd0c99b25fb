"""What a resume may lose, planted on the ranks after it."""

from __future__ import annotations

import torch

from megatron_vl.checkpoint.live import mains, moments, set_step


def lost_step(run) -> None:
    """Adam begins to count again, as Megatron-Core 0.16.1 does without Transformer Engine."""
    for main in mains(run.parts.optimizer):
        set_step(main, 1)


def lost_first_moment(run) -> None:
    for main in mains(run.parts.optimizer):
        moments(main)["exp_avg"].zero_()


def lost_second_moment_of_the_last_weight(run) -> None:
    *_, last = mains(run.parts.optimizer)
    moments(last)["exp_avg_sq"].zero_()


def shifted_samples(run) -> None:
    run.feed.loader.seek(run.feed.loader.step + 1)


def swapped_gate_and_up(run) -> None:
    """A wrong rectangle: the two halves of the first MLP change places."""
    weight = next(p for n, p in run.parts.chunks[0].named_parameters() if n.endswith("mlp.linear_fc1.weight"))
    with torch.no_grad():
        weight.copy_(torch.cat(list(reversed(weight.chunk(2)))))
