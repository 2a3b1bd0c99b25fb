"""A random checkpoint in the released layout, of any size, as fast as the disk takes it: for tests and benchmarks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_vl.checkpoint.aside import Aside
from megatron_vl.checkpoint.convert import Options, Result, figures
from megatron_vl.checkpoint.digests import write_digests
from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.checkpoint.hf_save import plan_shards, write_shards
from megatron_vl.checkpoint.meter import Meter
from megatron_vl.checkpoint.safetensors_file import TensorSpec
from megatron_vl.checkpoint.templates import write_companions
from megatron_vl.checkpoint.torch_dist import matrix_shape
from megatron_vl.checkpoint.weights import Weight, total_bytes
from megatron_vl.config.model import ModelConfig

# Sign, the two lowest bits of the exponent and the mantissa are random; the rest of the exponent is fixed. Every
# value is then finite, of a size between 2^-7 and 2^-3. Per format: integer of its width, random bits, fixed bits.
BITS = {
    torch.bfloat16: (np.uint16, 0x81FF, 0x3C00),
    torch.float32: (np.uint32, 0x81FF_FFFF, 0x3C00_0000),
}


def make_random(model: ModelConfig, out: Path, options: Options, shard_bytes: int, seed: int = 0) -> Result:
    """Write a Hugging Face folder with random weights. options.dtype: ``fp32``, anything else means bf16.

    Values are a function of seed, name and format; they are not what training starts from (see initialize.py).

    Raises:
        CheckpointError: as the other conversions.
    """
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    weights = random_weights(model, dtype, seed)
    shards = plan_shards([weight.spec for weight in weights.values()], shard_bytes)
    total = total_bytes(list(weights.values()))
    with (
        Meter("make", total, quiet=options.quiet) as meter,
        Aside(out, total, options.replace) as aside,
    ):
        digests = write_shards(
            aside.folder, weights, shards, options.threads, meter.add, lambda shard, digests: None
        )
        companions, notes = write_companions(aside.folder, model, None, weights)
        aside.publish()
    if options.digests is not None:
        write_digests(options.digests, digests.collected())
    return Result(out, figures(weights, meter), companions, notes)


def random_weights(model: ModelConfig, dtype: torch.dtype, seed: int) -> dict[str, Weight]:
    """Every tensor of the model, made block by block."""
    specs = [TensorSpec(name, dtype, shape) for name, shape in sorted(expected_tensors(model).items())]
    return {spec.name: Weight(spec, _rows(spec, seed)) for spec in specs}


def _rows(spec: TensorSpec, seed: int) -> Callable[[int, int], torch.Tensor]:
    """Reads whole blocks only, which is all that the writer asks for."""
    columns = matrix_shape(spec.shape)[1]
    integer, free, fixed = BITS[spec.dtype]

    def rows(first: int, count: int) -> torch.Tensor:
        key = hashlib.sha256(f"{seed}:{spec.name}:{first}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(np.frombuffer(key, np.uint32)))
        words = -(-count * columns * spec.dtype.itemsize // 8)
        raw = generator.integers(0, 2**64, words, dtype=np.uint64).view(integer)[: count * columns]
        raw &= integer(free)
        raw |= integer(fixed)
        return torch.from_numpy(raw).view(spec.dtype).reshape(count, columns)

    return rows
