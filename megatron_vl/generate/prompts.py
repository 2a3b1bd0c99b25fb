"""From a conversation to a prompt as ids, and the images whose features it needs."""

from __future__ import annotations

import hashlib

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig
from megatron_vl.data.bad_samples import SampleRefused
from megatron_vl.data.image_checks import ImageSource, open_source, resolve_under
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.sample import ImagePart, Sample
from megatron_vl.data.sources.locator import LocatedImage
from megatron_vl.errors import ImageRefused
from megatron_vl.generate.features import PromptImage
from megatron_vl.generate.request import Prompt


class PromptBuilder:
    """Builds prompts under the rules of a run, with the training rows' tokenizer, template and image rules."""

    def __init__(self, data: DataConfig, model: ModelConfig, open_thinking: bool = False) -> None:
        """open_thinking: see `Template.render_prompt`."""
        self.data, self.open_thinking = data, open_thinking
        rows = RowBuilder(data, model)
        self.template, self.images = rows.template, rows.images

    def build(self, sample: Sample) -> tuple[Prompt, list[PromptImage]]:
        """The prompt of a conversation whose next turn is the assistant's, and its images in order.

        Image files are read once here, for their digests. Raises SampleRefused: the reasons of the template, of image
        headers, and of files that cannot be read.
        """
        images = []
        for part in sample.images:
            try:
                images.append(self._image(part))
            except ImageRefused as refusal:
                detail = refusal.detail if part.path in refusal.detail else f"{part.path}: {refusal.detail}"
                raise SampleRefused(refusal.reason, detail, sample.id) from refusal
        ids = self.template.render_prompt(sample, [image.plan for image in images], self.open_thinking)
        kinds = [kind for image in images for kind in image.plan.view_kinds]
        digests = tuple(image.digest for image in images)
        return Prompt(sample.id, tuple(ids.tolist()), tuple(kinds), digests), images

    def text(self, tokens: tuple[int, ...] | list[int]) -> str:
        """What a response says; special ids as their spelling."""
        return self.template.tokenizer.decode(tokens, self.template.tokens)

    def _image(self, part: ImagePart) -> PromptImage:
        located = isinstance(part, LocatedImage)
        source: ImageSource = part.bytes_at if located else resolve_under(self.data.data_root, part.path)
        plan = self.images.plan(self.images.header(source).size)
        return PromptImage(part.path, content_digest(source), source, plan)


def content_digest(source: ImageSource) -> str:
    """sha256 of an image file's bytes, 64 hexadecimal digits. Raises ImageRefused as `open_source`, `unreadable`."""
    try:
        with open_source(source) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageRefused("unreadable", f"{source}: {error.strerror or error}") from error
