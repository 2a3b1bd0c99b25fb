"""Which rank does what: the rank grid in Megatron's order `tp-cp-ep-dp-pp`, tensor fastest."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.schema import ParallelConfig


@dataclass(frozen=True)
class Coords:
    """The place of a rank on each axis."""

    tp: int
    cp: int
    dp: int
    pp: int

    def __str__(self) -> str:
        return f"dp{self.dp} pp{self.pp} cp{self.cp} tp{self.tp}"


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. sp: sequence parallelism. placement of the tower: `data`, `tensor` or `all`."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    vpp: int = 1
    sp: bool = False
    placement: str = "data"

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """The layout of `world_size` ranks; the data-parallel size is what is left. Asserts divisibility."""
        assert world_size % parallel.model_parallel_size == 0, "check_layout comes first"
        return cls(
            tp=parallel.tensor_model_parallel_size,
            cp=parallel.context_parallel_size,
            dp=world_size // parallel.model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            vpp=parallel.chunks_per_stage,
            sp=parallel.sequence_parallel,
            placement=parallel.vision_placement,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def num_chunks(self) -> int:
        """Virtual pipeline stages over all ranks."""
        return self.pp * self.vpp

    def coords(self, rank: int) -> Coords:
        """Coordinates of a global rank. Raises ValueError outside the world."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank = {rank}: the layout has ranks 0 to {self.world_size - 1}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coords(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, coords: Coords) -> int:
        """Global rank at `coords`."""
        return coords.tp + self.tp * (coords.cp + self.cp * (coords.dp + self.dp * coords.pp))

    def describe(self, rank: int) -> str:
        """`rank 5 (dp0 pp1 cp0 tp1)`."""
        return f"rank {rank} ({self.coords(rank)})"

    @property
    def tower_beside(self) -> bool:
        """Placement `all`: every rank holds the tower beside its part of the pipeline, and views are shared by step."""
        return self.placement == "all"

    @property
    def vision_size(self) -> int:
        """Over how many ranks of a replica views are shared out: of its first stage, or (`all`) of every one."""
        if self.placement == "tensor":
            return self.cp
        return self.tp * self.cp * (self.pp if self.tower_beside else 1)

    def encodes(self, coords: Coords) -> bool:
        """Whether the rank encodes views."""
        return coords.pp == 0 or self.tower_beside

    def vision_rank(self, coords: Coords) -> int:
        """Which share of the views belongs to `coords`, which encodes; in placement `all` its place in the replica."""
        if self.placement == "tensor":
            return coords.cp
        return coords.tp + self.tp * (coords.cp + (self.cp * coords.pp if self.tower_beside else 0))

    def grid(self) -> list[str]:
        """The rank grid as lines to print: one per data-parallel replica and pipeline stage."""
        lines = []
        for dp, pp in ((dp, pp) for dp in range(self.dp) for pp in range(self.pp)):
            groups = [
                "[" + " ".join(str(self.rank(Coords(tp, cp, dp, pp))) for tp in range(self.tp)) + "]"
                for cp in range(self.cp)
            ]
            lines.append(f"dp{dp} pp{pp}  " + " ".join(groups))
        return lines

    def __str__(self) -> str:
        axes = f"TP{self.tp} CP{self.cp} DP{self.dp} PP{self.pp}"
        interleaved = f" VPP{self.vpp}" if self.vpp > 1 else ""
        return f"{axes}{interleaved}{' SP' if self.sp else ''}, vision placement {self.placement}"
