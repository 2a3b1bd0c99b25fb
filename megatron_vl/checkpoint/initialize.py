"""Fresh weights as a function of seed and released name, hence equal in every parallel layout."""

from __future__ import annotations

import hashlib
import math

import torch

from megatron_vl.checkpoint.hf_names import expected_tensors
from megatron_vl.config.model import ModelConfig


class FreshWeights:
    """Callable ``released name -> whole fp32 tensor``.

    Standard deviations. Decoder: init_method_std, output projections divided by sqrt(2 * layers) as in Megatron.
    Tower and projector: 1 / sqrt(fan_in); position table 0.5, the size of what the patch embedding makes of a
    normalised picture (smaller tables leave "where" questions at chance for hundreds of steps). Norms one, biases
    zero, layer scales their configured value. How downsamplers and projector were drawn is not published.
    """

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.model, self.seed, self.shapes = model, seed, expected_tensors(model)

    def __call__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if name.endswith(".gamma"):
            return torch.full(shape, self.model.vision.layer_scale_init)
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator) * self._std(name, shape)

    def _std(self, name: str, shape: tuple[int, ...]) -> float:
        text = self.model.text
        if name.startswith(("model.", "lm_head")):
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            return text.init_method_std / (math.sqrt(2 * text.num_layers) if output else 1.0)
        if name.endswith("positional_embedding"):
            return 0.5
        return 1.0 / math.sqrt(math.prod(shape[1:]))
