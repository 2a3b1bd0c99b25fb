"""The layouts that the parity check knows by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import ConfigError

ALL = (
    "1", "tp2", "tp2sp", "tp4sp", "pp2", "pp4", "pp2vpp2", "cp2", "cp4", "dp2", "tp2pp2", "tp2spcp2", "pp2cp2",
    "tp2pp2cp2sp", "dp2tp2pp2", "dp2cp2tp2sp",
)  # fmt: skip
# For packed rows against single documents: up to 8 context-parallel ranks, both exchanges of K and V.
PACKED = (
    "1", "cp2", "cp2ag", "cp4", "cp4ag", "cp8", "cp8ag", "tp2cp4", "tp2spcp4", "tp2spcp4ag", "pp2cp4", "pp2cp4ag",
    "tp2pp2cp2sp", "tp2pp2cp2spag", "pp2vpp2cp2",
)  # fmt: skip
SIZES = re.compile(r"(vpp|tp|pp|cp|dp)([1-9]\d*)|(sp|ag)")


@dataclass(frozen=True)
class NamedLayout:
    """A layout by name, e.g. ``tp2pp2cp2sp``, and how many ranks it takes."""

    name: str
    parallel: ParallelConfig
    world_size: int


def parse_layout(name: str, placement: str, device: str) -> NamedLayout:
    """``tp2pp2cp2sp`` -> sizes; parts in any order, ``1`` for a single rank, ``ag`` for K and V by all-gather.

    Raises:
        ConfigError: something in the name is no part, or a part comes twice.
    """
    sizes = {"tp": 1, "pp": 1, "cp": 1, "dp": 1, "vpp": 1, "sp": 0, "ag": 0}
    seen: list[str] = []
    position = 0
    text = "" if name == "1" else name
    while position < len(text):
        match = SIZES.match(text, position)
        key = match and (match.group(1) or match.group(3))
        if not match or key in seen:
            raise ConfigError(
                f"layout {name!r}: {text[position:]!r} is no part; use e.g. {', '.join(ALL[1:6])} or all"
            )
        sizes[key] = int(match.group(2) or 1)
        seen.append(key)
        position = match.end()
    parallel = ParallelConfig(
        tensor_model_parallel_size=sizes["tp"],
        pipeline_model_parallel_size=sizes["pp"],
        virtual_pipeline_model_parallel_size=sizes["vpp"] if sizes["vpp"] > 1 else None,
        context_parallel_size=sizes["cp"],
        cp_comm_type="all_gather" if sizes["ag"] else "p2p",
        sequence_parallel=bool(sizes["sp"]),
        vision_placement=placement,
        device=device,
    )
    return NamedLayout(name, parallel, sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes["dp"])
