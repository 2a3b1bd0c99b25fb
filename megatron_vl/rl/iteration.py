"""Which prompts an iteration takes: a pure function of its number."""

from __future__ import annotations

from megatron_vl.data.order import SampleOrder


def prompts_of(iteration: int, prompts_per_iteration: int, num_prompts: int, seed: int) -> list[int]:
    """The prompts (indices) of an iteration: a fresh permutation per epoch, no prompt twice before all were taken.

    An iteration that begins in one epoch and ends in the next may meet a prompt twice; the second time it is left
    out and the next one comes, so that every prompt id is there once. prompts_per_iteration: at most num_prompts.
    """
    assert prompts_per_iteration <= num_prompts, (prompts_per_iteration, num_prompts)
    order = SampleOrder(num_prompts, seed)
    first = iteration * prompts_per_iteration
    taken = dict.fromkeys(order.index(first + offset) for offset in range(prompts_per_iteration))
    number = first + prompts_per_iteration
    while len(taken) < prompts_per_iteration:
        taken.setdefault(order.index(number))
        number += 1
    return list(taken)
