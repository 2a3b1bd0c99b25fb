"""Activations: the plan against the tensors that autograd has saved at the end of a forward pass."""

from dataclasses import replace

import pytest

from megatron_vl.config.mixture import PackingConfig
from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import PrecisionConfig, RecomputeConfig, RunConfig, TrainConfig
from megatron_vl.plan.fp8 import fp8_layers
from megatron_vl.plan.kept import Load, fullest_load, kept_by_chunk, layer_moved, norm_saved, step_views_kept
from megatron_vl.plan.kernels import kernels_of, kernels_of_run
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.stages import plan_stages
from megatron_vl.plan.vision_share import CROP, GLOBAL
from tests.fixtures.small import make_documents
from tests.model.on_ranks import run_of
from tests.plan.on_ranks import kept_of_step, kept_on_rank, kept_with_offload

MODEL = replace(
    STEP3_VL_TINY,
    vision=replace(STEP3_VL_TINY.vision, num_layers=2),
    text=replace(STEP3_VL_TINY.text, ffn_hidden_size=320),
)
LARGER = replace(
    STEP3_VL_TINY,
    vision=replace(
        STEP3_VL_TINY.vision, num_layers=4, image_size=224, crop_size=112, hidden_size=192,
        num_attention_heads=6, ffn_hidden_size=768,
    ),
    text=replace(
        STEP3_VL_TINY.text, hidden_size=384, num_layers=8, num_attention_heads=6, kv_channels=64, ffn_hidden_size=1024,
        vocab_size=4096,
    ),
)  # fmt: skip
FROZEN = replace(MODEL, freeze_vision=True, freeze_decoder=True)
NONE = RecomputeConfig()
SELECTIVE = RecomputeConfig(decoder="selective")
CHUNKS = RecomputeConfig(vision="full", vision_chunk_views=1)
FULL = RecomputeConfig(decoder="full", vision="full", vision_num_layers=2)

# layout, placement, packed, recompute, number format, model
CASES = [
    ("1", "data", False, NONE, "fp32", MODEL),
    ("1", "data", True, NONE, "bf16", MODEL),
    ("1", "data", False, FULL, "bf16", MODEL),
    ("1", "data", False, NONE, "fp32", FROZEN),
    ("tp2", "data", False, SELECTIVE, "fp32", MODEL),
    ("tp4sp", "tensor", False, NONE, "bf16", MODEL),
    ("cp2", "data", True, NONE, "fp32", MODEL),
    ("cp2tp2sp", "tensor", False, NONE, "bf16", MODEL),
    ("cp4", "data", False, SELECTIVE, "bf16", MODEL),
    ("pp4", "data", False, FULL, "fp32", MODEL),
    ("pp2vpp2", "data", False, NONE, "fp32", MODEL),
    ("dp2tp2pp2", "data", False, NONE, "bf16", MODEL),
    ("tp2sp", "data", False, CHUNKS, "bf16", MODEL),
    ("cp2agtp2", "tensor", True, CHUNKS, "fp32", FROZEN),
    ("cp2", "data", True, FULL, "bf16", MODEL),
]


@pytest.mark.parametrize(("name", "placement", "packed", "recompute", "dtype", "model"), CASES)
def test_live_activations(world, name, placement, packed, recompute, dtype, model):
    compare(world, name, placement, packed, recompute, dtype, model, text=60)


@pytest.mark.parametrize(
    ("name", "recompute", "model"),
    [
        ("tp2pp2", NONE, MODEL),
        ("pp2", FULL, MODEL),
        ("pp4", NONE, FROZEN),
        ("pp2", CHUNKS, MODEL),
    ],
)
def test_views_of_a_step_encoded_before_the_pipeline(world, name, recompute, model):
    """Two equal micro-batches: what every rank keeps of their views until the tower's backward pass."""
    docs = make_documents(model, [([(2, 2), (0, 0)], 60)] * 2)
    config, batches, layout = run_of(model, name, "all", docs, recompute=recompute)
    kernels = kernels_of("torch", 4, on_cpu=True)
    load = load_of(batches, 0)
    for coords, measured in world.run(layout.world_size, kept_of_step, config, batches):
        planned = step_views_kept(model, layout, kernels, load, recompute, 2, coords)
        assert planned == pytest.approx(measured, rel=0.03, abs=8000), coords


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "placement", "packed", "recompute", "dtype"),
    [
        ("1", "data", False, NONE, "bf16"),
        ("dp2tp2pp2", "data", False, NONE, "fp32"),
        ("cp2tp2sp", "tensor", True, NONE, "bf16"),
        ("pp2vpp2", "data", False, FULL, "fp32"),
    ],
)
def test_live_activations_of_a_larger_model(world, name, placement, packed, recompute, dtype):
    compare(world, name, placement, packed, recompute, dtype, LARGER, text=300)


@pytest.mark.parametrize(("name", "first"), [("1", 0), ("tp2sp", 1)])
def test_live_activations_in_fp8(world, name, first):
    """Inputs of products at a byte each. Rows are as long as products in FP8 want them."""
    docs = make_documents(MODEL, [([(2, 2)], 60), ([], 105)])
    config, batches, layout = run_of(MODEL, name, "data", docs)
    precision = PrecisionConfig(params="bf16", fp8="tensorwise", num_layers_at_start_in_bf16=first)
    layers = fp8_layers(precision, MODEL.text.num_layers)
    kernels = kernels_of("torch", 2, on_cpu=True, fp8=layers)
    stages = plan_stages(MODEL.text.num_layers, 1)
    batches = replace(batches, seq_length=-(-batches.seq_length // 16) * 16)
    for live in world.run(layout.world_size, kept_on_rank, replace(config, precision=precision), batches):
        load = load_of(batches, live.coords.dp)
        planned = kept_by_chunk(MODEL, layout, stages[0][0], kernels, load, NONE, live.coords)
        assert planned["decoder"] == pytest.approx(live.chunks[0]["decoder"], rel=0.02)
        without = kept_by_chunk(
            MODEL, layout, stages[0][0], replace(kernels, fp8=frozenset()), load, NONE, live.coords
        )
        assert planned["decoder"] < 0.97 * without["decoder"]


OFFLOAD = RecomputeConfig(offload=True)


@pytest.mark.parametrize(
    ("name", "recompute", "dtype", "fp8", "smallest"),
    [
        ("1", OFFLOAD, "fp32", False, 0),
        ("1", OFFLOAD, "bf16", False, 20_000),  # what is between keeps what it is a view of
        ("tp2sp", OFFLOAD, "bf16", True, 0),
        ("pp2", replace(OFFLOAD, decoder="full"), "fp32", False, 1000),
        ("cp2", replace(OFFLOAD, decoder="selective"), "bf16", False, 5000),
    ],
)
def test_what_offloading_leaves_on_the_device(world, name, recompute, dtype, fp8, smallest):
    docs = make_documents(MODEL, [([(2, 2)], 60), ([(1, 1)], 105)])
    config, batches, layout = run_of(MODEL, name, "data", docs, recompute=recompute)
    batches = replace(batches, seq_length=-(-batches.seq_length // 32) * 32)
    config = replace(config, precision=PrecisionConfig(params=dtype, fp8="tensorwise" if fp8 else "none"))
    kernels = kernels_of_run(config, {"fp32": 4, "bf16": 2}[dtype], on_cpu=True)
    stages = plan_stages(MODEL.text.num_layers, layout.pp)
    for live in world.run(layout.world_size, kept_with_offload, config, batches, smallest):
        load, (stage,) = load_of(batches, live.coords.dp), stages[live.coords.pp]
        planned = kept_by_chunk(MODEL, layout, stage, kernels, load, recompute, live.coords, smallest)
        without = kept_by_chunk(
            MODEL, layout, stage, kernels, load, replace(recompute, offload=False), live.coords
        )
        assert planned["decoder"] == pytest.approx(live.chunks[0]["decoder"], rel=0.02)
        assert planned["loss"] == pytest.approx(live.chunks[0]["loss"], abs=4000)
        assert planned["decoder"] < 0.6 * without["decoder"] and planned["vision"] == without["vision"]
        if recompute.decoder == "full":
            continue
        of_layer = (MODEL.text, layout, kernels, load, recompute.decoder == "selective", True, fp8)
        moved = len(stage.layers) * layer_moved(*of_layer, smallest)[1]
        norm = norm_saved(MODEL.text.hidden_size, load.tokens // layout.cp // layout.tp, kernels, True)
        assert moved + sum(one.moved(smallest) for one in norm) == pytest.approx(live.moved, rel=0.02)


def compare(world, name, placement, packed, recompute, dtype, model, text: int) -> None:
    """Every rank and chunk, by part within 3% (small parts within 8 kB) and in sum within 2%."""
    docs = make_documents(model, [([(2, 2), (0, 0)], text), ([(1, 3)], 80 + text)])
    config, batches, layout = run_of(model, name, placement, docs, packed=packed, recompute=recompute)
    config = replace(config, precision=PrecisionConfig(params=dtype))
    stages = plan_stages(model.text.num_layers, layout.pp, layout.vpp)
    kernels = kernels_of("torch", {"fp32": 4, "bf16": 2}[dtype], on_cpu=True)
    for live in world.run(layout.world_size, kept_on_rank, config, batches):
        load = load_of(batches, live.coords.dp)
        for stage, found in zip(stages[live.coords.pp], live.chunks):
            planned = kept_by_chunk(model, layout, stage, kernels, load, recompute, live.coords)
            for part, measured in found.items():
                assert planned[part] == pytest.approx(measured, rel=0.03, abs=8000), (
                    live.coords,
                    part,
                    stage,
                )
            assert sum(planned.values()) == pytest.approx(sum(found.values()), rel=0.02)


def load_of(batches, dp):
    """The first micro-batch of a replica as the plan sees it; the pieces of a packed row are padded."""
    docs = batches.rows[dp][0][0]
    kinds = [kind for doc in docs for kind in doc.kinds]
    lengths = [len(doc.ids) for doc in docs]
    views = (kinds.count(CROP), kinds.count(GLOBAL))
    if not batches.packed:
        return Load(1, batches.seq_length, *views)
    return Load(1, batches.seq_length, *views, (*lengths, batches.seq_length - sum(lengths)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_dense_rows_of_a_micro_batch(world, dtype):
    docs = make_documents(MODEL, [([(0, 0)], 150), ([(1, 2)], 120)])
    config, batches, layout = run_of(MODEL, "1", "data", docs)
    config = replace(config, precision=PrecisionConfig(params=dtype))
    rows = [[[[doc] for doc in docs]]]
    kernels = kernels_of("torch", {"fp32": 4, "bf16": 2}[dtype], on_cpu=True)
    (live,) = world.run(1, kept_on_rank, config, replace(batches, rows=rows))
    kinds = [kind for doc in docs for kind in doc.kinds]
    load = Load(2, batches.seq_length, kinds.count(CROP), kinds.count(GLOBAL))
    (stage,) = plan_stages(MODEL.text.num_layers, 1)[0]
    planned = kept_by_chunk(MODEL, layout, stage, kernels, load, NONE, live.coords)
    for part, measured in live.chunks[0].items():
        assert planned[part] == pytest.approx(measured, rel=0.03, abs=8000), part


def test_views_of_the_row_that_has_most():
    def views(seq_length=32768, rows=1, **packing):
        config = RunConfig(train=TrainConfig(micro_batch_size=rows))
        data = replace(config.data, seq_length=seq_length, packing=PackingConfig(**packing))
        load = fullest_load(replace(config, data=data))
        assert (load.rows, load.tokens) == (rows, seq_length)
        return load.globals, load.crops

    limits = dict(enabled=True, max_global_views=32, max_crops=128)
    assert views(**limits) == (32, 128)
    assert views(4096, **limits) == (0, 50)
    assert views(enabled=True, max_crops=100) == (145, 100)
    assert views(max_crops=1) == (0, 404), "dense rows know no such limit"
    assert views(4096, rows=2) == (0, 100)


def test_views_change_the_first_stage_only():
    stages = plan_stages(4, 2)
    kernels = kernels_of("torch", 2, on_cpu=False)
    layout = Layout(pp=2)
    text, image = (
        [
            kept_by_chunk(
                MODEL, layout, stages[pp][0], kernels, Load(1, 512, 0, views), NONE, Coords(0, 0, 0, pp)
            )
            for pp in range(2)
        ]
        for views in (0, 1)
    )
    assert text[0]["vision"] == 0 < image[0]["vision"]
    assert text[1] == image[1]
