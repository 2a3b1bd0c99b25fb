"""Where a run stands, as it is kept in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """step: steps done. tokens: row tokens consumed, which drive the schedule. data: what the sample files were.

    samples: samples consumed, over all ranks and epochs: the position in the global order, whatever DP is.
    skipped: steps among ``step`` whose update was left out because loss or gradient were not finite.
    """

    step: int
    tokens: int
    data: str = ""
    samples: int = 0
    skipped: int = 0
