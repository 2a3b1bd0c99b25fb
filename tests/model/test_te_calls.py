"""What goes into Transformer Engine, up to its border: fields of TransformerConfig, and the signatures of 2.11.

Nothing here imports or runs it. ``tests/golden/transformer_engine_2_11.json`` was read from its wheel
(`te_signatures.py`).
"""

import ast
import json
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.checkpoint import fp8_state
from megatron_vl.config.schema import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_vl.model.transformer_configs import Numerics, decoder_config, vision_config
from megatron_vl.plan.fp8 import transformer_config_fields
from megatron_vl.plan.stages import plan_stages
from tests.fixtures.small import SMALL
from tests.model import te_signatures

KNOWN = json.loads((Path(__file__).parents[1] / "golden/transformer_engine_2_11.json").read_text())
CORE = Path(megatron.core.__file__).parent
EXTENSION, FP8 = CORE / "extensions/transformer_engine.py", CORE / "fp8_utils.py"
BF16 = Numerics(torch.bfloat16, on_cpu=True)
# class or function of Megatron-Core, file, and what of Transformer Engine it calls there
CALLS = [
    (EXTENSION, "TENorm", "te.pytorch.LayerNorm", "pytorch.LayerNorm"),
    (EXTENSION, "TENorm", "te.pytorch.RMSNorm", "pytorch.RMSNorm"),
    (EXTENSION, "TELinear", "super().__init__", "pytorch.Linear"),
    (EXTENSION, "TELayerNormColumnParallelLinear", "super().__init__", "pytorch.LayerNormLinear"),
    (EXTENSION, "TEDotProductAttention", "super().__init__", "pytorch.DotProductAttention"),
    (EXTENSION, "TEDelayedScaling", "super().__init__", "recipe.DelayedScaling"),
    (
        FP8,
        "get_fp8_recipe",
        "transformer_engine.common.recipe.Float8CurrentScaling",
        "recipe.Float8CurrentScaling",
    ),
    (
        FP8,
        "get_fp8_recipe",
        "transformer_engine.common.recipe.Float8BlockScaling",
        "recipe.Float8BlockScaling",
    ),
    (FP8, "get_fp8_context", "transformer_engine.pytorch.fp8_autocast", "pytorch.fp8_autocast"),
]
OLD = {  # given to releases before 1.8 and 1.5 only
    "interval", "ub_split_ag", "ub_split_rs", "ub_atomic_gemm_ag", "ub_atomic_gemm_rs",
}  # fmt: skip


def keywords(path: Path, owner: str, call: str) -> set[str]:
    """Keywords of a call inside a class or function, those put into ``extra_kwargs`` there included."""
    tree = ast.parse(path.read_text())
    (node,) = (
        n
        for n in ast.walk(tree)
        if getattr(n, "name", "") == owner and (path == EXTENSION or mentions_engine(n))
    )
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == call]
    assert calls, f"{owner} does not call {call}"
    names = {keyword.arg for n in calls for keyword in n.keywords if keyword.arg}
    extra = {
        n.targets[0].slice.value
        for n in ast.walk(node)
        if isinstance(n, ast.Assign)
        and isinstance(n.targets[0], ast.Subscript)
        and ast.unparse(n.targets[0].value) == "extra_kwargs"
    }
    return names | extra


def mentions_engine(node: ast.AST) -> bool:
    """Megatron-Core defines its FP8 functions twice; those without the engine do not mention it."""
    return "transformer_engine" in ast.unparse(node)


@pytest.mark.parametrize(("path", "owner", "call", "name"), CALLS, ids=[f"{c[1]}-{c[3]}" for c in CALLS])
def test_megatron_cores_calls_fit_the_pinned_release(path, owner, call, name):
    known = KNOWN["callables"][name]
    unknown = keywords(path, owner, call) - set(known) - OLD
    if name.startswith("recipe."):
        assert KNOWN["recipes_ignore_unknown_keywords"]
        assert unknown <= {"override_linear_precision"}
    else:
        assert unknown == set() or "**" in known


def test_the_rule_about_calls_can_fail(tmp_path, monkeypatch):
    planted = tmp_path / "planted.py"
    planted.write_text("class TELinear:\n    def f(self):\n        super().__init__(in_feature=1)\n")
    monkeypatch.setattr("tests.model.test_te_calls.EXTENSION", planted)
    found = keywords(planted, "TELinear", "super().__init__")
    assert found - set(KNOWN["callables"]["pytorch.Linear"]) == {"in_feature"}


TABLE = [
    (PrecisionConfig(), {"fp8": None}),
    (PrecisionConfig(fp8="tensorwise"), {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": False}),
    (
        PrecisionConfig(fp8="tensorwise", fp8_format="e4m3", num_layers_at_start_in_bf16=1),
        {
            "fp8": "e4m3", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 0,
        },
    ),
    (
        PrecisionConfig(fp8="delayed", fp8_margin=2, fp8_amax_history_len=16, fp8_amax_compute_algo="most_recent"),
        {
            "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_margin": 2, "fp8_amax_history_len": 16,
            "fp8_amax_compute_algo": "most_recent",
        },
    ),
    (PrecisionConfig(fp8="delayed"), {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}),
    (
        PrecisionConfig(fp8="blockwise", num_layers_at_end_in_bf16=2),
        {"fp8": "hybrid", "fp8_recipe": "blockwise", "num_layers_at_end_in_bf16": 2, "num_layers_at_start_in_bf16": 0},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("precision", "expected"), TABLE, ids=lambda v: getattr(v, "fp8", ""))
def test_what_the_transformer_configs_get(precision, expected):
    """Megatron-Core's own checks of the fields included."""
    stages = plan_stages(SMALL.text.num_layers, 1)
    fields = transformer_config_fields(precision)
    config = decoder_config(SMALL, ParallelConfig(), RecomputeConfig(), BF16, stages, fields)
    assert {name: getattr(config, name) for name in expected} == expected
    assert not config.fp8_param and not config.fp8_dot_product_attention
    tower = vision_config(
        SMALL, ParallelConfig(), RecomputeConfig(), BF16, transformer_config_fields(precision, vision=True)
    )
    assert tower.fp8 is None
    if precision.fp8 != "none":
        both = PrecisionConfig(fp8=precision.fp8, fp8_format=precision.fp8_format, fp8_vision=True)
        fields = transformer_config_fields(both, vision=True)
        tower = vision_config(SMALL, ParallelConfig(), RecomputeConfig(), BF16, fields)
        assert (tower.fp8, tower.fp8_recipe) == (precision.fp8_format, precision.fp8)
        assert not tower.first_last_layers_bf16


def test_every_field_is_one_of_megatron_cores():
    names = {name for precision, _ in TABLE for name in transformer_config_fields(precision)}
    assert names and names <= set(TransformerConfig.__dataclass_fields__)


class State:
    """As ``DelayedScalingRecipeState``: what `fp8_state` reads of it."""

    def __init__(self, steps: int, tensors: int) -> None:
        self.amax_history, self.scale = torch.zeros(steps, tensors), torch.ones(tensors)


class Engine(torch.nn.Module):
    """As ``TransformerEngineBaseModule``: a linear whose state is made by ``init_fp8_meta_tensors``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))
        self.fp8_meta: dict = {}

    def init_fp8_meta_tensors(self, recipe: int) -> None:
        assert self.fp8_meta["recipe"] == recipe and self.fp8_meta["num_gemms"] == 1
        self.fp8_meta |= {"scaling_fwd": State(recipe, 3), "scaling_bwd": State(recipe, 2)}


def engine_chunk(steps: int | None) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Module()
    layer.mlp.linear_fc2, layer.mlp.norm = Engine(), torch.nn.LayerNorm(2)
    chunk = torch.nn.Module()
    chunk.language_model = torch.nn.Module()
    chunk.language_model.decoder = torch.nn.Module()
    chunk.language_model.decoder.layers = torch.nn.ModuleList([layer])
    if steps is not None:
        fp8_state.begin_engine(chunk, steps)
    return chunk


def test_the_engines_histories_are_saved_and_filled():
    (stage,) = plan_stages(1, 1)[0]
    assert list(fp8_state.histories([engine_chunk(None)], [stage])) == []  # it has not run
    one, two = engine_chunk(4), engine_chunk(3)
    saved = {h.key: h.values for h in fp8_state.histories([one], [stage])}
    name = "fp8/language_model.decoder.layers.0.mlp.linear_fc2"
    assert list(saved) == [
        f"{name}/scaling_{d}/{what}" for d in ("fwd", "bwd") for what in ("amax_history", "scale")
    ]
    for number, values in enumerate(saved.values()):
        values.copy_(torch.arange(values.numel()).view(values.shape) + number)
    for history in fp8_state.histories([two], [stage]):
        history.fill(saved[history.key])
    state = two.language_model.decoder.layers[0].mlp.linear_fc2.fp8_meta["scaling_fwd"]
    assert state.amax_history.tolist() == saved[f"{name}/scaling_fwd/amax_history"][:3].tolist()
    assert state.scale.tolist() == [1, 2, 3]


def test_the_stand_in_is_shaped_like_the_release():
    assert {"scale", "amax_history"} <= set(KNOWN["delayed_state"])
    assert KNOWN["callables"]["base.init_fp8_meta_tensors"] == ["self", "recipe"]
    assert KNOWN["fp8_meta_keys"] == ["recipe", "num_gemms", "scaling_fwd", "scaling_bwd"]
    assert KNOWN["version"] == "2.11.0" and set(KNOWN["callables"]) == set(te_signatures.WANTED)
