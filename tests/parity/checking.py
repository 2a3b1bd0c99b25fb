"""Run rows of the parity check on the session's world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vl.parity.check import Row, Setting, check_case, make_cases, make_setting, parser


def setting_of(folder: Path, *options: str, reference: Path | None = None) -> Setting:
    """What `tools/check_parity.py` would make of these arguments."""
    reference = reference or folder / "reference.safetensors"
    return make_setting(parser().parse_args(["--hf", str(folder), "--reference", str(reference), *options]))


def check(world: Any, setting: Setting, layout: str, placement: str, form: str, baseline=None) -> Row:
    """One row."""
    (case,) = make_cases(layout, placement, form, "cpu")
    return check_case(world, case, setting, baseline)
