"""Image features computed once per image by all ranks together, for the sampler, the actor and the critic.

The cache on disk is also how ranks hand features to each other, so its folder must be one that all nodes share, like
the run folder. Keys contain a digest of tower and projector: where these are trained, every update makes new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vl.data.crops import CropPlan
from megatron_vl.data.image_backend import ImageBackend
from megatron_vl.data.image_checks import ImageSource
from megatron_vl.errors import DataError, ImageRefused
from megatron_vl.generate.feature_cache import DamagedFeatures, FeatureCache, feature_key
from megatron_vl.generate.weight_version import vision_version
from megatron_vl.train.build import Parts

VIEWS_AT_ONCE = 8


@dataclass(frozen=True)
class PromptImage:
    """An image of a prompt. name: for messages. digest: sha256 of the file's bytes."""

    name: str
    digest: str
    source: ImageSource
    plan: CropPlan


@dataclass
class FeatureCounts:
    """Of all ranks, since the store was made. found: were in the cache. computed: were not, or were damaged."""

    found: int = 0
    computed: int = 0
    damaged: int = 0

    def add(self, other: FeatureCounts) -> None:
        self.found += other.found
        self.computed += other.computed
        self.damaged += other.damaged


class FeatureStore:
    """Features by content digest. images: how files become pixels, part of the key."""

    def __init__(self, parts: Parts, images: ImageBackend, folder: str | Path) -> None:
        self.parts, self.images = parts, images
        self.cache = FeatureCache(folder)
        self.counts = FeatureCounts()
        self.rule = f"{images.crop_rule} {images.decode_rule} {images.mode} {type(images).__name__}"
        self._frozen = parts.config.model.freeze_vision and parts.config.model.freeze_projector
        self._weights: str | None = None
        self._rows: dict[str, int] = {}

    def ensure(self, images: Sequence[PromptImage]) -> None:
        """Compute what the cache lacks; every rank calls it with the same images, before the first use of them and
        again after an update of tower or projector.

        Raises:
            DataError: an image cannot be decoded, or features cannot be stored; on every rank, with the image's name.
        """
        if self._weights is None or not self._frozen:
            self._weights = vision_version(self.parts)
        wanted = {image.digest: image for image in images}
        vision = self.parts.config.model.vision
        for digest, image in wanted.items():
            self._rows[digest] = image.plan.num_crops * vision.crop_tokens + vision.global_tokens
        counts, problems = FeatureCounts(), []
        if self.parts.runtime.layout.encodes(self.parts.runtime.coords):
            problems = self._work(wanted, counts)
        self._settle(counts, problems)

    def features(self, images: Sequence[str]) -> torch.Tensor:
        """``[rows, h]`` on the device: the features of these images, one behind the other, as `ensure` left them.

        Raises:
            DataError: an image was not ensured, or its entry has been damaged or removed since.
        """
        device, found = self.parts.runtime.device, {}
        for digest in dict.fromkeys(images):
            try:
                rows = self._read(digest) if digest in self._rows else None
            except DamagedFeatures as error:
                raise DataError(self._lost(digest, f"is damaged ({error})")) from error
            if rows is None:
                raise DataError(self._lost(digest, "is not there"))
            found[digest] = rows.to(device, non_blocking=True)
        return torch.cat([found[digest] for digest in images])

    def _lost(self, digest: str, what: str) -> str:
        return (
            f"features of image {digest[:12]}: the entry in {self.cache.folder} {what}; every image is computed before "
            "it is used, and the folder must be shared by all nodes and left alone while the run lasts; start again"
        )

    def _read(self, digest: str) -> torch.Tensor | None:
        width = self.parts.config.model.text.hidden_size
        return self.cache.read(self._key(digest), self._rows[digest], width, self.parts.dtype)

    def _key(self, digest: str) -> str:
        return feature_key(digest, self._weights, self.rule)

    def _work(self, wanted: Mapping[str, PromptImage], counts: FeatureCounts) -> list[str]:
        """This rank's share. In placement ``tensor`` the ranks of a tensor-parallel group work on the same images."""
        layout, coords, groups = (
            self.parts.runtime.layout,
            self.parts.runtime.coords,
            self.parts.runtime.groups,
        )
        together = layout.placement == "tensor"
        number = coords.dp * layout.vision_size + layout.vision_rank(coords)
        mine = sorted(wanted)[number :: layout.dp * layout.vision_size]
        leads = not together or coords.tp == 0
        missing = [self._missing(mine, counts) if leads else []]
        if together and layout.tp > 1:
            dist.broadcast_object_list(missing, src=dist.get_global_rank(groups.tp, 0), group=groups.tp)
        problems = []
        for digest in missing[0]:
            image = wanted[digest]
            try:
                whole, crops = self.images.views(image.source, image.plan)
            except ImageRefused as refusal:
                problems.append(f"image {image.name}: {refusal}")
                continue
            rows = encode(self.parts, crops, whole)
            if leads:
                counts.computed += 1
                try:
                    self.cache.write(self._key(digest), rows)
                except OSError as error:
                    problems.append(str(error))
        return problems

    def _missing(self, digests: Sequence[str], counts: FeatureCounts) -> list[str]:
        missing = []
        for digest in digests:
            try:
                if self._read(digest) is not None:
                    counts.found += 1
                    continue
            except DamagedFeatures:
                counts.damaged += 1
            missing.append(digest)
        return missing

    def _settle(self, counts: FeatureCounts, problems: list[str]) -> None:
        """Wait for all ranks; the same counts and the same error everywhere."""
        world = self.parts.runtime.layout.world_size
        everyone: list[tuple[tuple, list[str]]] = [((), [])] * world
        dist.all_gather_object(everyone, (astuple(counts), problems))
        for theirs, _ in everyone:
            self.counts.add(FeatureCounts(*theirs))
        told = list(dict.fromkeys(problem for _, theirs in everyone for problem in theirs))
        if told:
            raise DataError("\n".join(["image features:", *(f"  {line}" for line in told)]))


@torch.no_grad()
def encode(parts: Parts, crops: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Projected features ``[rows, h]`` of one image: its crops ``[n, 3, C, C]`` one by one, then the global view
    ``[1, 3, G, G]``. On ranks that hold the tower.
    """
    chunk = (parts.tower or parts.chunks[0]).module
    found = []
    for pixels in (*crops.split(VIEWS_AT_ONCE), whole):
        if len(pixels):
            made = chunk.projector(chunk.vision_model(pixels.to(parts.runtime.device)))
            found.append(made.transpose(0, 1).flatten(0, 1))
    return torch.cat(found).to(parts.dtype)
