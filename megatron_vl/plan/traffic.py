"""Memory traffic beside matrix products and attention: bytes that are read and written, counted operation by operation.

The tower's blocks: every PyTorch operation reads its inputs and writes its output once, which is what the twins of
csrc/'s kernels do in eager mode; a kernel reads and writes once for all of them (csrc/README.md has its bytes). The
counts are those that a dispatch mode sees on a CPU (tests/csrc/test_traffic.py). What of it stays in a cache is not
known, so that the twins may do better than planned. FP8: what measuring, rounding and transposing move, as
ops/fp8_product.py does it with one kernel for a rounding; Transformer Engine fuses more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_vl.config.model import TextConfig, VisionConfig, halved
from megatron_vl.plan.cost import CONV_TAPS, IMAGE_CHANNELS
from megatron_vl.plan.kernels import PACK_BYTES, WIDEST_NORM, Kernels
from megatron_vl.plan.vision_share import CROP


@dataclass(frozen=True)
class Traffic:
    """Bytes of a forward pass, and of the backward pass that belongs to it."""

    forward: float
    backward: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: float) -> Traffic:
        """So many of it."""
        return Traffic(factor * self.forward, factor * self.backward)


NOTHING = Traffic(0.0, 0.0)


@lru_cache(maxsize=4096)
def tower_traffic(vision: VisionConfig, kind: int, count: int, split: int, kernels: Kernels) -> Traffic:
    """Tower, downsamplers and pixels of `count` views of one size that are encoded together."""
    if not count:
        return NOTHING
    grid = vision.crop_grid if kind == CROP else vision.global_grid
    blocks = block_traffic(vision, grid * grid, count, split, kernels).times(vision.num_layers)
    return (
        blocks
        + pixel_traffic(vision, count * grid * grid, kernels)
        + _windows(vision, grid, count, split, kernels)
    )


def block_traffic(vision: VisionConfig, per_view: int, count: int, split: int, kernels: Kernels) -> Traffic:
    """One block of the tower for `count` views of `per_view` patches. Numbers: values read and written per channel."""
    width, inner, torch_layers = vision.hidden_size, vision.ffn_hidden_size // split, kernels.joined_rows
    joined = torch_layers and count > 1
    rotary = (6, 6) if kernels.takes(vision.head_dim) else (18 + 6 * joined, 36)
    with_norm = torch_layers and kernels.takes(width, WIDEST_NORM)
    apart = (
        (3, 3) if kernels.takes(width) else (7, 7)
    )  # a branch with bias and layer scale, added to the residual
    norm = (2, 3 + 3)  # and the sum of two gradients behind it
    middle = (4, 6) if with_norm else (apart[0] + norm[0], apart[1] + norm[1])
    activation = (2, 3) if kernels.takes(inner) else (9, 15)
    forward = width * (norm[0] + middle[0] + apart[0]) + inner * activation[0]
    backward = width * (norm[1] + middle[1] + apart[1]) + inner * activation[1]
    cut = width // split  # channels of a rank's heads
    forward += cut * (rotary[0] + 2 * joined + 6 * torch_layers)  # the output's copy; the bias of q, k, v
    backward += cut * (rotary[1] + 2 * joined + 3 * torch_layers)
    found = Traffic(forward, backward).times(count * per_view * kernels.element)
    if not kernels.fp8_vision:
        return found
    shapes = ((width, 3 * cut), (cut, width), (width, inner), (inner, width))
    return found + cast_traffic(count * per_view, shapes, kernels.element)


def pixel_traffic(vision: VisionConfig, patches: int, kernels: Kernels) -> Traffic:
    """Pixels to patches of the activations' format, without a gradient. Bytes go through fp32."""
    element, channels = kernels.element, IMAGE_CHANNELS * vision.patch_size**2
    if kernels.pixel == 1:
        fused = kernels.takes(PACK_BYTES) and vision.patch_size % 2 == 0
        bytes_of_one = 1 + element if fused else (1 + 4) + 3 * (4 + 4) + (4 + element) + 2 * element
    else:
        bytes_of_one = (4 + element) * (element != 4) + 2 * element
    return Traffic(float(patches * channels * bytes_of_one), 0.0)


def _windows(vision: VisionConfig, grid: int, count: int, split: int, kernels: Kernels) -> Traffic:
    """Both downsamplers: windows gathered twice and added up once, or weights packed for the implicit products."""
    width, found = vision.hidden_size, NOTHING
    for side, channels, out in (
        (grid, width, 2 * width // split),
        (halved(grid), 2 * width // split, 4 * width),
    ):
        if kernels.projector == "implicit":  # packed for both passes; the fp32 gradient unpacked
            weight = CONV_TAPS * channels * out
            found += Traffic(2.0 * weight, 5.0 * weight)
            continue
        tokens, windows = count * side**2 * channels, count * halved(side) ** 2 * CONV_TAPS * channels
        if kernels.projector == "gather":  # each written once and read once
            found += Traffic(2.0 * windows, 4.0 * windows)
        else:  # tokens with a border, windows through a view of them; sums over the taps in fp32
            found += Traffic(2.0 * tokens + 3 * windows, 16.0 * tokens + 5 * windows)
    return found.times(kernels.element)


def cast_traffic(rows: int, shapes: Sequence[tuple[int, int]], element: int, trained: bool = True) -> Traffic:
    """Products in FP8 of `rows` rows with weights of these (inputs, outputs): largest values, roundings, and in the
    backward pass transposed copies, since the tensor cores want both operands along the sum."""
    inputs, outputs = rows * sum(i for i, _ in shapes), rows * sum(o for _, o in shapes)
    weights = sum(i * o for i, o in shapes)
    measured, rounded, turned = element, element + 1, 2
    forward = (inputs + weights) * (measured + rounded)
    backward = outputs * (measured + rounded) + weights * (rounded + turned)
    if trained:
        backward += (inputs + outputs) * turned
    return Traffic(float(forward), float(backward))


def layer_casts(text: TextConfig, tp: int, rows: int, element: int, trained: bool) -> Traffic:
    """The casts of one decoder layer on one of `tp` ranks."""
    heads = text.num_attention_heads * text.kv_channels // tp
    mixed = heads + 2 * max(text.num_query_groups // tp, 1) * text.kv_channels
    width, inner = text.hidden_size, text.ffn_hidden_size // tp
    shapes = ((width, mixed), (heads, width), (width, 2 * inner), (inner, width))
    return cast_traffic(rows, shapes, element, trained)
