"""Made-up batches have the shape that was asked for, alike on all ranks of a replica."""

from dataclasses import replace

import pytest
import torch

from megatron_vl.bench.synthetic import image_tokens, micro_batches, shape_of
from megatron_vl.config.mixture import MixturePhase, PackingConfig
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import DataConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_vl.errors import ConfigError
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.vision_share import CROP, GLOBAL

RUN = RunConfig(
    model=STEP3_VL_TINY,
    data=DataConfig(seq_length=256),
    train=TrainConfig(micro_batch_size=2, global_batch_size=8),
)
PACKED = replace(
    RUN,
    data=replace(RUN.data, packing=PackingConfig(enabled=True)),
    train=TrainConfig(micro_batch_size=1, global_batch_size=4),
)


def test_a_share_becomes_whole_images():
    size = image_tokens(STEP3_VL_TINY)
    assert size == 6 * 1 + 4
    shape = shape_of(RUN, Layout(), visual_share=0.5)
    assert shape.documents == (256,) and sum(shape.images) == round(0.5 * 256 / size)
    assert shape_of(RUN, Layout(), visual_share=0.0).images == (0,)
    assert sum(shape_of(RUN, Layout()).images) == round(0.3 * 256 / size)
    text = replace(RUN, data=replace(RUN.data, mixture=[MixturePhase(text_share=0.5)]))
    assert sum(shape_of(text, Layout()).images) == round(0.15 * 256 / size)


def test_packed_rows_are_full_and_spread_their_images():
    shape = shape_of(PACKED, Layout(cp=2), visual_share=0.4, document_tokens=48)
    assert shape.documents == (48,) * 5 + (16,) and sum(shape.documents) == 256
    assert sum(shape.images) == 10 and max(shape.images) - min(shape.images[:5]) <= 1
    (batch,) = micro_batches(PACKED, Layout(dp=4, cp=2), 0, shape)
    assert batch.cu_seqlens[-1] == 256 and batch.num_tokens == 256


def test_the_ranks_of_a_replica_see_the_same_rows_and_share_the_views():
    layout = Layout(tp=2, dp=2)
    shape = shape_of(RUN, layout)
    ranks = [micro_batches(RUN, layout, rank, shape) for rank in range(4)]
    assert [len(batches) for batches in ranks] == [2] * 4
    for first, second in ((0, 1), (2, 3)):
        for one, other in zip(ranks[first], ranks[second]):
            assert one.fingerprint() == other.fingerprint()
            crops = len(one.crop_pixels) + len(other.crop_pixels)
            assert crops == one.view_kinds.count(CROP) > 0
            assert not torch.equal(one.crop_pixels[0], other.crop_pixels[0])
    assert ranks[0][0].fingerprint() != ranks[0][1].fingerprint() != ranks[2][0].fingerprint()
    whole = [micro_batches(RUN, Layout(tp=2, dp=2, placement="tensor"), rank, shape)[0] for rank in (0, 1)]
    assert torch.equal(whole[0].global_pixels, whole[1].global_pixels)
    batch = ranks[0][0]
    slots = (batch.input_ids == STEP3_VL_TINY.tokens.im_patch).sum().item()
    vision = STEP3_VL_TINY.vision
    tokens = (vision.crop_tokens, vision.global_tokens)
    assert slots == sum(tokens[kind] for kind in batch.view_kinds)
    assert batch.view_kinds.count(GLOBAL) == 2 * sum(shape.images)


def test_before_a_pipeline_its_ranks_share_the_views_of_a_step():
    """Placement `all`: every view of the step on one rank, and no rank without."""
    layout = Layout(pp=2, placement="all")
    ranks = [micro_batches(RUN, layout, rank, shape_of(RUN, layout)) for rank in (0, 1)]
    for name, kind in (("crop_pixels", CROP), ("global_pixels", GLOBAL)):
        have = [[view for batch in of_rank for view in getattr(batch, name)] for of_rank in ranks]
        assert min(map(len, have)) > 0
        assert sum(map(len, have)) == sum(batch.view_kinds.count(kind) for batch in ranks[0])
        assert len({view.sum().item() for views in have for view in views}) == sum(map(len, have))


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ConfigError, match="visual share"):
        shape_of(RUN, Layout(), visual_share=share)


def test_an_image_that_fits_nowhere_is_refused():
    with pytest.raises(ConfigError, match="does not fit a document of 8"):
        shape_of(PACKED, Layout(), visual_share=0.3, document_tokens=8)


def test_a_later_stage_has_no_pixels():
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    run, layout = replace(RUN, parallel=parallel), Layout(pp=2)
    assert len(micro_batches(run, layout, 1, shape_of(run, layout))[0].crop_pixels) == 0
