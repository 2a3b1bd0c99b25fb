"""Read the signatures that we rely on from Transformer Engine's wheel, without importing it, into a JSON file.

    pip download --no-deps transformer_engine==2.11.0
    python -m tests.model.te_signatures transformer_engine-2.11.0-py3-none-any.whl \
        tests/golden/transformer_engine_2_11.json

The wheel ``transformer_engine`` (0.7 MB) has the Python sources; the compiled parts are other packages.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from typing import Any

PYTORCH, RECIPE = "transformer_engine/pytorch", "transformer_engine/common/recipe/__init__.py"
# name in the JSON file: (source file, class or None, function or None for the fields of a dataclass)
WANTED: dict[str, tuple[str, str | None, str | None]] = {
    "pytorch.Linear": (f"{PYTORCH}/module/linear.py", "Linear", "__init__"),
    "pytorch.LayerNormLinear": (f"{PYTORCH}/module/layernorm_linear.py", "LayerNormLinear", "__init__"),
    "pytorch.LayerNorm": (f"{PYTORCH}/module/layernorm.py", "LayerNorm", "__init__"),
    "pytorch.RMSNorm": (f"{PYTORCH}/module/rmsnorm.py", "RMSNorm", "__init__"),
    "pytorch.DotProductAttention": (
        f"{PYTORCH}/attention/dot_product_attention/dot_product_attention.py", "DotProductAttention", "__init__",
    ),
    "pytorch.fp8_autocast": (f"{PYTORCH}/quantization.py", None, "fp8_autocast"),
    "pytorch.autocast": (f"{PYTORCH}/quantization.py", None, "autocast"),
    "pytorch.distributed.checkpoint": (f"{PYTORCH}/distributed.py", None, "checkpoint"),
    "recipe.DelayedScaling": (RECIPE, "DelayedScaling", None),
    "recipe.Float8CurrentScaling": (RECIPE, "Float8CurrentScaling", None),
    "recipe.Float8BlockScaling": (RECIPE, "Float8BlockScaling", None),
    "base.init_fp8_meta_tensors": (
        f"{PYTORCH}/module/base.py", "TransformerEngineBaseModule", "init_fp8_meta_tensors",
    ),
    "base.set_extra_state": (f"{PYTORCH}/module/base.py", "TransformerEngineBaseModule", "set_extra_state"),
}  # fmt: skip
STATE = (f"{PYTORCH}/quantization.py", "DelayedScalingRecipeState")


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters; ``**`` last where it takes any keyword."""
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return names + (["**"] if args.kwarg else [])


def fields(cls: ast.ClassDef) -> list[str]:
    """Annotated names of a class."""
    return [
        node.target.id
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def found(tree: ast.Module, cls: str | None, function: str | None) -> list[str]:
    """Parameters or fields, as in `WANTED`."""
    body: Any = tree.body
    if cls is not None:
        owner = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == cls)
        if function is None:
            return fields(owner)
        body = owner.body
    return parameters(next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == function))


def read(wheel: str) -> dict[str, Any]:
    """What the JSON file holds."""
    with zipfile.ZipFile(wheel) as file:
        trees = {path: ast.parse(file.read(path)) for path in {path for path, _, _ in WANTED.values()}}
        text = {path: file.read(path).decode() for path in trees}
    version = wheel.rpartition("/")[2].split("-")[1]
    state = next(n for n in trees[STATE[0]].body if isinstance(n, ast.ClassDef) and n.name == STATE[1])
    return {
        "version": version,
        "made_by": "python -m tests.model.te_signatures WHEEL FILE",
        "callables": {
            name: found(trees[path], cls, function) for name, (path, cls, function) in WANTED.items()
        },
        "delayed_state": fields(state),
        # dataclasses of pydantic leave keywords aside that they do not know; Megatron-Core gives them some
        "recipes_ignore_unknown_keywords": "from pydantic.dataclasses import dataclass" in text[RECIPE],
        "fp8_meta_keys": [
            k
            for k in ("recipe", "num_gemms", "scaling_fwd", "scaling_bwd")
            if f'"{k}"' in text[f"{PYTORCH}/module/base.py"]
        ],
    }


if __name__ == "__main__":
    with open(sys.argv[2], "w", encoding="utf-8") as out:
        json.dump(read(sys.argv[1]), out, indent=1)
        out.write("\n")
