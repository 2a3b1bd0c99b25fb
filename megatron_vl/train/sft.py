"""``python -m megatron_vl sft CONFIG [--nproc N] [section.key=value ...]``: supervised fine-tuning, start to end.

Step, loop, loader and checkpoints are those of pre-training. A stage of fine-tuning is one run: it takes its first
weights from a release (``train.init_from_hf``) or from the run before it (``train.init_from``), and begins a new
optimizer, schedule and data plan. What else differs is asked of the configuration (`plan/sft_checks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.plan.sft_checks import check_sft
from megatron_vl.train.pretrain import start


def main(argv: Sequence[str]) -> int:
    """``sft`` from the command line."""
    return start("sft", "Fine-tune a model on conversations.", argv, check_sft)
