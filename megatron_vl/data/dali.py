"""Decoding by NVIDIA DALI: `data.image_backend` dali.

DALI decodes, nothing else: on the CPU its pixels equal Pillow's bit for bit, so everything after it (orientation,
alpha, resizes) is the code of the other back end, and both modes keep their tolerance. Its own resize is not used:
beyond the border it repeats the edge where Pillow leaves the filter's outer part out, over 10 grey levels in the
outermost rows and columns of noise (tests/data/test_dali.py), and on the CPU it takes longer than torch's.

Pillow still reads the header, so both back ends plan alike and refuse alike; in addition DALI reads no GIF, and
tells no transparency but that of RGBA. Nothing falls back to Pillow: such images are refused and counted.

Device `mixed` (nvJPEG on this rank's GPU, fast mode's resizes by torch there, views copied back to the host, since
a batch mostly comes from another process) was never run on a GPU. nvJPEG rounds otherwise than libjpeg; by how much
was not measured, hence image_mode exact is refused with it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from megatron_vl.data.decode import ImageHeader, read_header, to_rgb
from megatron_vl.data.fast_views import pixels_of
from megatron_vl.data.image_backend import ImageBackend
from megatron_vl.data.image_checks import ImageSource, open_source
from megatron_vl.errors import ImageRefused

# EXIF orientation -> (swap rows and columns, then mirror left-right, then upside down)
_TURNS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


@dataclass(frozen=True)
class DaliBackend(ImageBackend):
    """DALI on the CPU, or with `device` mixed on this rank's GPU; auto = mixed in mode fast where CUDA is available.

    Pipelines are made when the first image comes, so that a back end can be handed to a worker process.
    """

    device: str = "auto"
    _pipelines: dict[tuple[bool, bool], Pipeline] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipelines": {}}

    @property
    def on_gpu(self) -> bool:
        """Whether images are decoded on the GPU."""
        auto = self.device == "auto" and self.mode == "fast" and torch.cuda.is_available()
        return auto or self.device == "mixed"

    def header(self, source: ImageSource) -> ImageHeader:
        """Header of a file. Errors: as `read_header`; `unsupported_format`, `unsupported_mode` for DALI's limits."""
        header = read_header(source, self.decode_rule)
        if header.format == "GIF":
            raise ImageRefused(
                "unsupported_format", "DALI reads no GIF; convert it, or use data.image_backend=torch"
            )
        if self._lays_over_white(header) and header.mode != "RGBA":
            raise ImageRefused(
                "unsupported_mode",
                f"DALI does not tell the transparency of mode {header.mode}; convert the file to RGBA, or use "
                "data.alpha=drop or data.image_backend=torch",
            )
        return header

    def picture(self, source: ImageSource) -> Image.Image:
        """Upright 8-bit RGB. Errors: as `header`, and `corrupt` for whatever DALI cannot decode."""
        return Image.fromarray(np.ascontiguousarray(self._decode(source).numpy(force=True)))

    def pixels(self, source: ImageSource) -> torch.Tensor:
        """uint8 [3, height, width], upright, channels last, on the device that decoded. Errors: as `picture`."""
        return self._decode(source).permute(2, 0, 1)

    def _decode(self, source: ImageSource) -> torch.Tensor:
        """uint8 [height, width, 3], upright. It may lie in a buffer of DALI's, up to the next image."""
        header = self.header(source)
        with open_source(source) as file:
            encoded = np.frombuffer(file.read(), dtype=np.uint8)
        with_alpha = self._lays_over_white(header)
        may_be_deep = header.format in ("PNG", "TIFF")
        try:
            pipeline = self._pipeline(with_alpha, may_be_deep)
            pipeline.feed_input("encoded", [encoded])
            (decoded,) = pipeline.run()
        except RuntimeError as error:  # DALI's one type of error for whatever is wrong with a file
            self._pipelines.pop((with_alpha, may_be_deep), None)  # it calls itself invalid from here on
            text = " ".join(str(error).split())
            raise ImageRefused("corrupt", f"DALI cannot decode it: {text[:300]}") from error
        pixels = torch.from_dlpack(decoded[0])
        if may_be_deep:  # the upper byte, as Pillow; DALI's own way to 8 bits rounds
            pixels = pixels.view(torch.uint8)[..., 1::2].contiguous()
        if with_alpha:
            rgba = Image.fromarray(pixels.numpy(force=True))
            pixels = pixels_of(to_rgb(rgba, self.decode_rule.alpha)).permute(1, 2, 0).to(pixels.device)
        applied = self.decode_rule.apply_exif or header.format == "TIFF"
        return _turned(pixels, header.orientation if applied else 1)

    def _lays_over_white(self, header: ImageHeader) -> bool:
        return header.has_alpha and self.decode_rule.alpha == "white"

    def _pipeline(self, with_alpha: bool, deep: bool) -> Pipeline:
        """Bytes of one file in, [height, width, 3 or, with alpha, 4] out; made once per process.

        deep: uint16, 8-bit values times 257; else uint8.
        """
        if (with_alpha, deep) not in self._pipelines:
            # the number of this rank's GPU, as in parallel/runtime.py; worker processes inherit it
            gpu = int(os.environ.get("LOCAL_RANK", 0)) if self.on_gpu else None
            pipeline = Pipeline(
                batch_size=1, num_threads=1, device_id=gpu, exec_async=False, exec_pipelined=False
            )
            with pipeline:
                encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
                decoded = fn.decoders.image(
                    encoded,
                    device="mixed" if self.on_gpu else "cpu",
                    output_type=types.ANY_DATA if with_alpha else types.RGB,
                    dtype=types.UINT16 if deep else types.UINT8,
                    adjust_orientation=False,  # Pillow also knows EXIF in XMP and behind the pixels
                )
                pipeline.set_outputs(decoded)
            pipeline.build()
            self._pipelines[with_alpha, deep] = pipeline
        return self._pipelines[with_alpha, deep]


def _turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """[height, width, channels] made upright; the same tensor where it is."""
    if orientation not in _TURNS:
        return pixels
    swap, mirror, upside_down = _TURNS[orientation]
    turned = pixels.transpose(0, 1) if swap else pixels
    return turned.flip([axis for axis, flip in ((1, mirror), (0, upside_down)) if flip]).contiguous()
