"""Which layers live where."""

import pytest

from megatron_vl.errors import ConfigErrors
from megatron_vl.plan.stages import balanced_layers, check_stages, plan_stages, to_megatron_layout


@pytest.mark.parametrize(
    ("layers", "chunks", "expected"),
    [
        (4, 1, [4]),
        (4, 2, [2, 2]),
        (5, 2, [2, 3]),
        (1, 2, [0, 1]),
        (4, 3, [1, 2, 1]),
        (5, 3, [1, 2, 2]),
        (3, 4, [0, 1, 1, 1]),
        (2, 4, [0, 1, 1, 0]),
        (6, 4, [1, 2, 2, 1]),
        (7, 4, [1, 2, 2, 2]),
        (36, 8, [4, 4, 4, 5, 5, 5, 5, 4]),
    ],
)
def test_balanced(layers, chunks, expected):
    assert balanced_layers(layers, chunks) == expected
    assert check_stages(layers, chunks, 1, None) == []


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 2), (2, 4)])
@pytest.mark.parametrize("layers", [6, 7, 36])
def test_every_layer_once_and_in_order(layers, pp, vpp):
    stages = plan_stages(layers, pp, vpp)
    assert [len(chunks) for chunks in stages] == [vpp] * pp
    in_order = [stages[chunk % pp][chunk // pp] for chunk in range(pp * vpp)]
    assert [layer for stage in in_order for layer in stage.layers] == list(range(layers))
    assert [stage.has_vision for stage in in_order] == [stage.has_embedding for stage in in_order]
    assert [stage.has_embedding for stage in in_order] == [True] + [False] * (pp * vpp - 1)
    assert [stage.has_head for stage in in_order] == [False] * (pp * vpp - 1) + [True]
    assert all(
        stage.pp_rank == rank and stage.vp_stage == vp
        for rank, chunks in enumerate(stages)
        for vp, stage in enumerate(chunks)
    )


def test_explicit_layers():
    stages = plan_stages(5, 2, 2, [0, 2, 3, 0])
    assert [[stage.layers for stage in chunks] for chunks in stages] == [[(), (2, 3, 4)], [(0, 1), ()]]
    assert [str(stage) for chunks in stages for stage in chunks] == [
        "no layers + tower + embedding",
        "layers 2-4 (3)",
        "layers 0-1 (2)",
        "no layers + head",
    ]


def test_megatron_layout():
    assert to_megatron_layout(plan_stages(3, 2, 2)) == [
        ["embedding"],
        ["decoder"],
        ["decoder"],
        ["decoder", "loss"],
    ]
    assert to_megatron_layout(plan_stages(1, 1)) == [["embedding", "decoder", "loss"]]


@pytest.mark.slow  # imports Megatron-Core
@pytest.mark.parametrize(("layers", "pp", "vpp"), [(7, 2, 2), (2, 4, 1), (36, 4, 2)])
def test_megatron_core_agrees(layers, pp, vpp):
    module = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    stages = plan_stages(layers, pp, vpp)
    theirs = module.PipelineParallelLayerLayout(to_megatron_layout(stages), pp)
    theirs.validate_layer_layout(layers, None)
    for rank, chunks in enumerate(stages):
        for vp, stage in enumerate(chunks):
            kinds = [kind.name for kind in theirs.layout[rank][vp]]
            assert kinds.count("decoder") == len(stage.layers)
            assert ("embedding" in kinds, "loss" in kinds) == (stage.has_embedding, stage.has_head)


@pytest.mark.parametrize(
    ("layers", "pp", "vpp", "explicit", "rules"),
    [
        (
            1,
            4,
            1,
            None,
            [
                "too few layers for the 4 stages of pipeline_model_parallel_size 4: only the first and the "
                "last stage may go without"
            ],
        ),
        (4, 2, 1, [4], ["needs one number for each of the 2 stages of pipeline_model_parallel_size 2"]),
        (4, 2, 2, [1, 1, 1, 2], ["sums to 5, but the decoder has 4 layers"]),
        (4, 2, 1, [5, -1], ["a stage cannot hold fewer than 0 layers"]),
        (4, 3, 1, [2, 0, 2], ["a stage in the middle would hold nothing"]),
        (
            4,
            2,
            2,
            [1, 2],
            [
                "needs one number for each of the 4 stages of pipeline_model_parallel_size 2 x virtual size "
                "2",
                "sums to 3, but the decoder has 4 layers",
            ],
        ),
    ],
)
def test_refused(layers, pp, vpp, explicit, rules):
    with pytest.raises(ConfigErrors) as caught:
        plan_stages(layers, pp, vpp, explicit)
    assert [problem.rule for problem in caught.value.problems] == rules
