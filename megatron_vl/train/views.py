"""Placement ``all``: the views of a whole step, encoded before the pipeline by all ranks of the replica.

Features travel to the first stage and enter its micro-batches as leaves; the gradients that the pipeline's backward
passes leave there travel back, and the tower's own backward pass runs on them, before gradients are summed over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from megatron_vl.data.batch import MicroBatch
from megatron_vl.model.fusion import image_slots
from megatron_vl.model.step3_vl import OwnFeatures
from megatron_vl.parallel.feature_exchange import return_gradients, send_features
from megatron_vl.parallel.feature_plan import ExchangePlan, plan_exchange
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.kept import wave_size
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_step
from megatron_vl.train.build import Parts


@dataclass(frozen=True)
class Fed:
    """A micro-batch as the pipeline takes it. own: features of this rank's positions that were encoded before."""

    batch: MicroBatch
    own: OwnFeatures | None = None

    @property
    def input_ids(self) -> torch.Tensor:
        """``[b, S]``."""
        return self.batch.input_ids


@dataclass
class _Wave:
    """Views of one size that are encoded together. rows: their place among this rank's features; kept: the features
    with what their backward pass needs, None where they are computed again."""

    pixels: list[torch.Tensor]
    rows: slice
    kept: torch.Tensor | None = None


class StepViews:
    """The views of one step. Every rank of the replica makes one, with its own pixels, and calls what follows alike.

    A wave is `recompute.vision_chunk_views` views, which are computed again for the backward pass; without that key as
    many as this rank has per micro-batch, which are kept.
    """

    def __init__(self, parts: Parts, batches: Sequence[MicroBatch], train: bool) -> None:
        """train: a backward pass follows. The tower must be trained then, or its projector."""
        self.parts, self.batches, self.train = parts, batches, train
        model, runtime = parts.config.model, parts.runtime
        self.tokens = (model.vision.crop_tokens, model.vision.global_tokens)
        chunk = parts.config.recompute.vision_chunk_views
        self.again = train and chunk is not None and not model.freeze_vision
        kinds = [batch.view_kinds for batch in batches]
        shares = share_step(kinds, runtime.layout.vision_size, view_costs(model), runtime.layout.tower_beside)
        rank = runtime.layout.vision_rank(runtime.coords)
        mine = [[k[view] for view in share[rank]] for k, share in zip(kinds, shares)]
        for batch, have in zip(batches, mine):
            found = (len(batch.crop_pixels), len(batch.global_pixels))
            assert found == (have.count(CROP), have.count(GLOBAL)), "pixels of another share than this rank's"
        self.counts = [(have.count(CROP), have.count(GLOBAL)) for have in mine]
        self.waves = self._waves(chunk)
        self.plans = [self._plan(batch, share) for batch, share in zip(batches, shares)]
        self.leaves: list[torch.Tensor | None] = []

    def _waves(self, chunk: int | None) -> list[_Wave]:
        """Crops of all micro-batches in order, then global views."""
        waves, first = [], 0
        for kind in (CROP, GLOBAL):
            of_batches = [(batch.crop_pixels, batch.global_pixels)[kind] for batch in self.batches]
            views = [view for pixels in of_batches for view in pixels]
            size = wave_size(len(views), chunk, len(self.batches))
            for start in range(0, len(views), size):
                pixels = views[start : start + size]
                behind = first + len(pixels) * self.tokens[kind]
                waves.append(_Wave(pixels, slice(first, behind)))
                first = behind
        return waves

    def _plan(self, batch: MicroBatch, shares: Sequence[Sequence[int]]) -> ExchangePlan | None:
        """Which feature rows of a micro-batch go where; None when it has none. Raises DataError as `image_slots`."""
        im_patch, kinds = self.parts.config.model.tokens.im_patch, batch.view_kinds
        rows = sum(self.tokens[kind] for kind in kinds)
        slots = image_slots(batch.input_ids, im_patch, rows, batch.sample_ids)
        if not kinds:
            return None
        runtime = self.parts.runtime
        bounds = batch.cu_seqlens or [0, batch.input_ids.shape[1]]
        rank = runtime.layout.vision_rank(runtime.coords)
        return plan_exchange(kinds, shares, self.tokens, slots, bounds, runtime.layout, rank)

    def _blocks(self) -> list[tuple[slice, slice]]:
        """Per micro-batch where its crops' and its global views' rows are among this rank's features."""
        crops = list(accumulate((c * self.tokens[CROP] for c, _ in self.counts), initial=0))
        wholes = list(accumulate((g * self.tokens[GLOBAL] for _, g in self.counts), initial=crops[-1]))
        return [(slice(*crops[m : m + 2]), slice(*wholes[m : m + 2])) for m in range(len(self.batches))]

    def encode(self, tick: Callable[[], None]) -> list[Fed]:
        """Encode this rank's share and hand every feature to the rank that holds its position. tick: called before
        each wave. The result is what the pipeline is fed with."""
        features, group = self._features(tick), self.parts.runtime.groups.replica
        first, fed = self.parts.runtime.is_first_stage, []
        for batch, plan, (crops, wholes) in zip(self.batches, self.plans, self._blocks()):
            own = leaf = None
            if plan is not None:
                leaf = send_features(torch.cat([features[crops], features[wholes]]), plan, group)
                leaf.requires_grad_(self.train)
                own = OwnFeatures(leaf, plan.slot_rows, plan.slot_positions) if first else None
            self.leaves.append(leaf)
            nothing = dict(crop_pixels=batch.crop_pixels[:0], global_pixels=batch.global_pixels[:0])
            fed.append(Fed(replace(batch, **nothing), own))
        return fed

    def _features(self, tick: Callable[[], None]) -> torch.Tensor:
        """``[rows, h]`` of this rank's views, cut off from what made them."""
        rows = self.waves[-1].rows.stop if self.waves else 0
        shape = (rows, self.parts.config.model.text.hidden_size)
        features = torch.empty(shape, dtype=self.parts.dtype, device=self.parts.runtime.device)
        for wave in self.waves:
            tick()
            with torch.set_grad_enabled(self.train and not self.again):
                made = self._project(wave)
            features[wave.rows] = made.detach()
            if self.train and not self.again:
                wave.kept, wave.pixels = made, []
        return features

    def _project(self, wave: _Wave) -> torch.Tensor:
        """Only the pixels of one wave are on the device."""
        pixels = torch.stack(wave.pixels).to(self.parts.runtime.device, non_blocking=True)
        return self.parts.tower.module(pixels)

    def backward(self, tick: Callable[[], None]) -> None:
        """Take up the gradients that the pipeline has left at the features, and run the tower's backward pass, wave by
        wave: each adds to the weights' fp32 gradients by itself."""
        if not self.train:
            return
        group, rows = self.parts.runtime.groups.replica, self.waves[-1].rows.stop if self.waves else 0
        gradient = None
        for plan, leaf, (crops, wholes) in zip(self.plans, self.leaves, self._blocks()):
            if plan is None:
                continue
            arrived = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            back = return_gradients(arrived, plan, group)
            if gradient is None:
                gradient = back.new_empty((rows, back.shape[1]))
            here = crops.stop - crops.start
            gradient[crops], gradient[wholes] = back[:here], back[here:]
        self.leaves = []
        for wave in self.waves:
            tick()
            with torch.enable_grad():
                made = self._project(wave) if self.again else wave.kept
            torch.autograd.backward(made, gradient[wave.rows])
            wave.kept = None


def feed_pipeline(
    parts: Parts, batches: Sequence[MicroBatch], train: bool, tick: Callable[[], None]
) -> tuple[list[Fed], StepViews | None]:
    """What the pipeline is fed with, and what is left to do after it. train: a backward pass follows."""
    if parts.tower is None:
        return [Fed(batch) for batch in batches], None
    views = StepViews(parts, batches, train and parts.tower.module.trained)
    return views.encode(tick), views
