"""The description of a STEP3-VL model. Defaults are those of the released 10B checkpoint.

Sources of the values: the technical report (arXiv 2601.09668, section 2.1) and the released configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.key import key
from megatron_vl.config.rope import RopeScaling

# Mean and deviation of R, G, B in 0 ... 1 that pixels are normalised by (CLIP's, as released)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """Perception-Encoder tower with its two stride-2 downsamplers. Lengths of views are in pixels."""

    image_size: int = key("side of the global view", 728, at_least=1)
    crop_size: int = key("side of a local crop", 504, at_least=1)
    patch_size: int = key("side of a ViT patch", 14, at_least=1)
    hidden_size: int = key("width of the tower", 1536, at_least=1)
    num_layers: int = key("blocks of the tower", 47, at_least=1)
    num_attention_heads: int = key("attention heads of the tower", 16, at_least=1)
    ffn_hidden_size: int = key("inner width of the tower's MLP", 8960, at_least=1)
    layernorm_epsilon: float = key("epsilon of the layer norms", 1e-5, above=0)
    rotary_base: float = key("theta of the two-dimensional rotary embedding", 10000.0, above=0)
    layer_scale_init: float = key("initial value of the layer scales", 0.1)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def global_grid(self) -> int:
        """Patches per side of the global view (52)."""
        return self.image_size // self.patch_size

    @property
    def crop_grid(self) -> int:
        """Patches per side of a crop (36)."""
        return self.crop_size // self.patch_size

    @property
    def global_grid_downsampled(self) -> int:
        """Tokens per side of the global view after both stride-2 convolutions (13)."""
        return halved(halved(self.global_grid))

    @property
    def crop_grid_downsampled(self) -> int:
        """Tokens per side of a crop after both stride-2 convolutions (9)."""
        return halved(halved(self.crop_grid))

    @property
    def global_tokens(self) -> int:
        """Decoder tokens of a global view (169)."""
        return self.global_grid_downsampled**2

    @property
    def crop_tokens(self) -> int:
        """Decoder tokens of a crop (81)."""
        return self.crop_grid_downsampled**2

    @property
    def output_size(self) -> int:
        """Channels after the downsamplers, each of which doubles them."""
        return 4 * self.hidden_size


@dataclass(frozen=True)
class TextConfig:
    """Qwen3 decoder: RMSNorm, SwiGLU, grouped queries, per-head q/k norm, no biases, untied."""

    hidden_size: int = key("width of the decoder", 4096, at_least=1)
    num_layers: int = key("decoder layers", 36, at_least=1)
    num_attention_heads: int = key("query heads", 32, at_least=1)
    num_query_groups: int = key("key/value heads", 8, at_least=1)
    kv_channels: int = key("channels of one head", 128, at_least=2)
    ffn_hidden_size: int = key("inner width of the SwiGLU MLP", 12288, at_least=1)
    vocab_size: int = key("rows of the embedding and of the head", 151936, at_least=1)
    rotary_base: float = key("theta of the rotary embedding", 1_000_000.0, above=0)
    rope_scaling: RopeScaling = key("extension of the rotary embedding", factory=RopeScaling)
    layernorm_epsilon: float = key("epsilon of the RMS norms", 1e-6, above=0)
    max_position_embeddings: int = key("longest position that the model is meant for", 65536, at_least=1)
    init_method_std: float = key("standard deviation of fresh weights", 0.02, above=0)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that have a meaning to the template and to image fusion."""

    endoftext: int = key("<|endoftext|>", 151643, at_least=0)
    chat_start: int = key("<|im_start|> of ChatML", 151644, at_least=0)
    chat_end: int = key("<|im_end|> of ChatML", 151645, at_least=0)
    think_start: int = key("<think>", 151667, at_least=0)
    think_end: int = key("</think>", 151668, at_least=0)
    im_patch: int = key("<im_patch>, the slot of one visual feature", 151679, at_least=0)
    im_start: int = key("<im_start>, opens a global view", 151680, at_least=0)
    im_end: int = key("<im_end>, closes a global view", 151681, at_least=0)
    patch_start: int = key("<patch_start>, opens a crop", 151689, at_least=0)
    patch_end: int = key("<patch_end>, closes a crop", 151690, at_least=0)
    patch_newline: int = key("<patch_newline>, ends a row of crops", 151691, at_least=0)


@dataclass(frozen=True)
class ModelConfig:
    """Tower, decoder, token ids, and which of the three trainable parts are frozen.

    Vision part: patch convolution, positions, ln_pre, blocks, downsamplers. Projector: the linear layer into
    the decoder. Decoder: everything else.
    """

    vision: VisionConfig = key("vision tower", factory=VisionConfig)
    text: TextConfig = key("decoder", factory=TextConfig)
    tokens: SpecialTokens = key("token ids", factory=SpecialTokens)
    freeze_vision: bool = key("do not train the vision part", False)
    freeze_projector: bool = key("do not train the projector", False)
    freeze_decoder: bool = key("do not train the decoder", False)


def halved(grid: int) -> int:
    """Side of a grid after a convolution of kernel 3, stride 2, padding 1: ceil(grid / 2)."""
    return (grid + 1) // 2
