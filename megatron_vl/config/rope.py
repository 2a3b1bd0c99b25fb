"""How the decoder's rotary embedding reaches beyond the length that it was trained for.

The released STEP3-VL configuration has theta 1e6, 65,536 positions and no scaling, while SFT ran at 128k and inference
doubles the length with YaRN (spec: recipe 2, rl): the rule for 128k is not published, so it is a choice of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vl.config.convert import FAILED, to_type
from megatron_vl.config.key import Limits, key
from megatron_vl.errors import Problem

PATH = "text_config"
# Released name -> our name, for what YaRN reads. `mscale` and `mscale_all_dim` become an attention factor.
YARN_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
KNOWN = {
    *YARN_FIELDS,
    "rope_type",
    "type",
    "rope_theta",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
}


@dataclass(frozen=True)
class RopeScaling:
    """Extension of the rotary embedding. YaRN: Peng et al., arXiv 2309.00071."""

    kind: str = key(
        "none; theta = another base; yarn = slow frequencies stretched, fast ones kept",
        "none",
        choices=("none", "theta", "yarn"),
    )
    theta: float | None = key("with theta: the base that takes the place of text.rotary_base", None, above=1)
    factor: float = key("with yarn: how many times longer contexts become", 1.0, at_least=1)
    original_max_position_embeddings: int | None = key(
        "with yarn: length that the frequencies were trained for", None, at_least=1
    )
    beta_fast: float = key(
        "with yarn: frequencies of more turns than this in that length are kept", 32.0, above=0
    )
    beta_slow: float = key("with yarn: those of fewer turns are divided by factor", 1.0, above=0)
    attention_factor: float | None = key(
        "with yarn: factor of rotated queries and keys; none = 0.1 ln(factor) + 1", None, above=0
    )


def rope_scaling_from_hf(text: Mapping[str, Any], max_positions: int, problems: list[Problem]) -> RopeScaling:
    """What `rope_scaling` (older files) or `rope_parameters` (newer ones) of a `text_config` ask for.

    max_positions: `max_position_embeddings`, which transformers takes for a missing original length. The base of the
    embedding is not read here. Whatever is not implemented is added to `problems`.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name in ("rope_scaling", "rope_parameters"):
        value = text.get(name) or {}
        if not isinstance(value, Mapping):
            problems.append(Problem(f"{PATH}.{name}", value, "must be an object", "correct the file"))
        elif value.get("rope_type", value.get("type", "default")) != "default":
            found.append((f"{PATH}.{name}", value))
    if not found:
        return RopeScaling()
    path, rope = found[-1]
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "yarn":
        rule = 'only "default" and "yarn" are implemented'
        problems.append(Problem(f"{path}.rope_type", kind, rule, "use a checkpoint with one of the two"))
        return RopeScaling()
    if len(found) > 1 and _without_base(found[0][1]) != _without_base(rope):
        rule = f"differs from {found[0][0]} = {dict(found[0][1])}"
        problems.append(Problem(path, dict(rope), rule, "remove one of the two"))
    _refuse_others(path, rope, problems)
    return _yarn(path, rope, max_positions, problems)


def rope_scaling_to_hf(rotary_base: float, scaling: RopeScaling) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a `text_config`, in the older form that every reader of the release knows."""
    if scaling.kind == "theta":
        return {"rope_theta": scaling.theta, "rope_scaling": None}
    if scaling.kind == "none":
        return {"rope_theta": rotary_base, "rope_scaling": None}
    values = {theirs: getattr(scaling, ours) for theirs, ours in YARN_FIELDS.items()}
    given = {name: value for name, value in values.items() if value is not None}
    return {"rope_theta": rotary_base, "rope_scaling": {"rope_type": "yarn", **given}}


def _without_base(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type"))
    return {"rope_type": kind} | {
        n: v for n, v in rope.items() if n not in ("rope_theta", "type", "rope_type")
    }


def _refuse_others(path: str, rope: Mapping[str, Any], problems: list[Problem]) -> None:
    """Fields that would change the frequencies in a way that is not implemented."""
    for name, implemented in (("truncate", True), ("partial_rotary_factor", 1.0)):
        if rope.get(name) not in (None, implemented):
            rule = f"only {json.dumps(implemented)} is implemented"
            problems.append(Problem(f"{path}.{name}", rope[name], rule, "use a checkpoint without it"))
    for name in rope:
        if name not in KNOWN:
            rule = f"is no field of YaRN; known are {', '.join(sorted(KNOWN))}"
            problems.append(Problem(f"{path}.{name}", rope[name], rule, "remove it"))


def _yarn(path: str, rope: Mapping[str, Any], max_positions: int, problems: list[Problem]) -> RopeScaling:
    def number(name: str, hint: type, default: Any, limits: Limits) -> Any:
        if rope.get(name) is None:
            return default
        value = to_type(hint, rope[name], f"{path}.{name}", limits, problems)
        return default if value is FAILED else value

    original = number("original_max_position_embeddings", int, max_positions, Limits(at_least=1))
    factor = number("factor", float, max(max_positions / original, 1.0), Limits(at_least=1))
    if factor == 1 and rope.get("factor") in (None, 1):  # otherwise noted by its own rule
        rule = "YaRN needs a factor greater than 1, or an original length below max_position_embeddings"
        problems.append(Problem(f"{path}.factor", rope.get("factor"), rule, 'give one or use "default"'))
    attention = number("attention_factor", float, None, Limits(above=0))
    mscale, all_dims = (number(name, float, 0.0, Limits(at_least=0)) for name in ("mscale", "mscale_all_dim"))
    if attention is None and mscale and all_dims:
        attention = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all_dims)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=number("beta_fast", float, 32.0, Limits(above=0)),
        beta_slow=number("beta_slow", float, 1.0, Limits(above=0)),
        attention_factor=attention,
    )


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """``0.1 weight ln(factor) + 1``, the paper's square root of the softmax temperature, inverted."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
