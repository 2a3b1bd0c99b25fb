"""Memory and time of the chunked loss against the plain one, on one rank: what all logits at once would cost."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megatron_vl.bench.storage import TrackStorage
from megatron_vl.ops.cross_entropy import HeadShard, Scoring, score_tokens

HELP = "peak memory and time of the chunked cross entropy, against all logits at once"
BOUND = 1e-5  # relative difference of loss and gradients, fp32; the sums run in other orders
MIB = 1 << 20


class Alone:
    """A group of this rank only, without processes."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--tokens", type=int, default=4096, help="default: %(default)s")
    parser.add_argument(
        "--words", type=int, default=18_992, help="of this rank's head (default: 151,936 / TP8)"
    )
    parser.add_argument("--hidden", type=int, default=256, help="width (default: %(default)s)")
    parser.add_argument(
        "--chunk", type=int, default=512, help="tokens whose logits exist at once (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any], bool]:
    """The report, the same as a record, and whether both give the same loss and gradients."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, 1, options.hidden, generator=generator)
    weight = 0.05 * torch.randn(options.words, options.hidden, generator=generator)
    labels = torch.randint(options.words, (1, options.tokens), generator=generator)
    head = HeadShard(options.words, Alone(), False, options.chunk)

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((h @ w.t()).float()[:, 0], labels[0], reduction="none")

    def chunked(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return score_tokens(h, w, labels, head, Scoring()).losses

    ways = {"plain": measure(plain, hidden, weight), "chunked": measure(chunked, hidden, weight)}
    (loss, *grads), (other, *others) = (way.pop("found") for way in ways.values())
    far = max(relative(b, a) for a, b in zip((loss, *grads), (other, *others), strict=True))
    record = {"options": vars(options), "ways": ways, "relative_difference": far, "torch": torch.__version__}
    lines = [
        f"{options.tokens} tokens, {options.words} words, width {options.hidden}, chunk {options.chunk}, fp32"
    ]
    lines.append(f"{'':<10}{'peak MiB':>10}{'largest MiB':>13}{'seconds':>9}")
    for name, way in ways.items():
        lines.append(
            f"{name:<10}{way['peak'] / MIB:>10.1f}{way['largest'] / MIB:>13.1f}{way['seconds']:>9.2f}"
        )
    lines.append(
        f"loss and gradients differ by {far:.1e}; peak: storage made in forward and backward, gradients included"
    )
    return "\n".join(lines), record, far <= BOUND


def measure(loss: Callable[..., torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    """Bytes at the peak and of the largest tensor, then seconds of a second run, forward and backward."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with TrackStorage() as track:
        loss(h, w).sum().backward()
    found = (loss(h, w).detach().sum(), h.grad.clone(), w.grad.clone())
    begin = time.perf_counter()
    loss(h, w).sum().backward()
    return {
        "peak": track.peak,
        "largest": track.largest,
        "seconds": time.perf_counter() - begin,
        "found": found,
    }


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((ours - theirs).norm() / theirs.norm())
