"""Who turns image files into views: the contract of an image back end, and the choice of one for a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.crops import RELEASED, CropPlan, CropRule, check_limits, plan_crops
from megatron_vl.data.decode import DecodeRule, ImageHeader, load_rgb, make_views, read_header
from megatron_vl.data.fast_views import make_fast_views, pixels_of
from megatron_vl.data.image_checks import ImageSource
from megatron_vl.errors import ImageRefused, raise_if_any
from megatron_vl.plan.image_checks import check_dali, check_images


@dataclass(frozen=True)
class ImageBackend:
    """What every back end shares: headers are read and views planned without pixels, by Pillow.

    mode: `exact` gives normalised float32 pixels as the released processing does, `fast` uint8 ones that are
    not normalised. All methods raise `ImageRefused` for a bad image and nothing else, and never return made-up
    pixels.
    """

    crop_rule: CropRule = RELEASED
    decode_rule: DecodeRule = DecodeRule()
    max_crops: int | None = None
    max_aspect_ratio: float | None = None
    mode: str = "exact"

    def __post_init__(self) -> None:
        assert self.mode in ("exact", "fast"), self.mode

    @property
    def dtype(self) -> torch.dtype:
        """Of the pixels that `views` gives."""
        return torch.uint8 if self.mode == "fast" else torch.float32

    def header(self, source: ImageSource) -> ImageHeader:
        """Header of a file. Errors: as `read_header`."""
        return read_header(source, self.decode_rule)

    def plan(self, size: tuple[int, int]) -> CropPlan:
        """Plan of an upright image of `size` (width, height). Errors: as `plan_crops` and `check_limits`."""
        plan = plan_crops(*size, self.crop_rule)
        check_limits(
            plan,
            max_crops=self.max_crops,
            max_aspect_ratio=self.max_aspect_ratio,
            max_pixels=self.decode_rule.max_pixels,
        )
        return plan

    def views(
        self,
        source: ImageSource,
        plan: CropPlan,
        *,
        crops: Sequence[int] | None = None,
        with_global: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels of the views of a file, of `dtype`, on the CPU: global [1 or 0, 3, G, G], crops [n, 3, C, C].

        crops: indices of the wanted crops in the order asked for, None = all. The file is decoded even when no
        view is wanted: ranks that share out the views of an image must agree on whether it can be read.
        Errors: as `picture` and `pixels`, and `corrupt` when the size is no longer the planned one.
        """
        if self.mode == "fast":
            pixels = self.pixels(source)
            _check_size(plan, (pixels.shape[2], pixels.shape[1]))
            return make_fast_views(pixels, plan, self.crop_rule, crops=crops, with_global=with_global)
        rgb = self.picture(source)
        _check_size(plan, rgb.size)
        return make_views(rgb, plan, self.crop_rule, crops=crops, with_global=with_global)

    def picture(self, source: ImageSource) -> Image.Image:
        """Upright 8-bit RGB image of a file, for mode `exact`."""
        raise NotImplementedError

    def pixels(self, source: ImageSource) -> torch.Tensor:
        """The same as uint8 [3, height, width] on any device, for mode `fast`."""
        raise NotImplementedError

    def zeros(self, crops: int, with_global: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of an image that cannot be decoded: mean colour in mode `exact`, black in mode `fast`."""
        large, small = self.crop_rule.global_size, self.crop_rule.crop_size
        return (
            torch.zeros(int(with_global), 3, large, large, dtype=self.dtype),
            torch.zeros(crops, 3, small, small, dtype=self.dtype),
        )


@dataclass(frozen=True)
class PillowBackend(ImageBackend):
    """Decoding by Pillow on the CPU: `data.image_backend` torch."""

    def picture(self, source: ImageSource) -> Image.Image:
        """See `ImageBackend.picture`. Errors: as `load_rgb`."""
        return load_rgb(source, self.decode_rule)

    def pixels(self, source: ImageSource) -> torch.Tensor:
        """See `ImageBackend.pixels`. Errors: as `load_rgb`."""
        return pixels_of(load_rgb(source, self.decode_rule))


def _check_size(plan: CropPlan, size: tuple[int, int]) -> None:
    if size != plan.size:
        raise ImageRefused("corrupt", f"the image is {size}, it was {plan.size} when its views were planned")


def image_backend(data: DataConfig, model: ModelConfig) -> ImageBackend:
    """The back end of a run. Raises ConfigErrors when DALI is asked for what it cannot do, or is missing."""
    rules = (
        CropRule.for_model(model.vision.image_size, model.vision.crop_size, data.boundary_rule),
        DecodeRule(data.alpha, data.apply_exif, data.max_image_pixels),
        data.max_crops,
        data.max_aspect_ratio,
        data.image_mode,
    )
    if data.image_backend == "torch":
        return PillowBackend(*rules)
    raise_if_any([*check_images(data), *check_dali(data)])
    from megatron_vl.data.dali import DaliBackend  # takes seconds and is mostly not installed

    return DaliBackend(*rules, data.dali_device)
