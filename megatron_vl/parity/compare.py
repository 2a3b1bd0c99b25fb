"""Put the ranks' parts together again and compare them with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vl.checkpoint.hf_names import rules_by_name, to_hf, unshard
from megatron_vl.config.model import ModelConfig
from megatron_vl.parallel.context_parallel import global_order
from megatron_vl.parity.on_rank import Seen
from megatron_vl.parity.reference import Batches, Document, Reference
from megatron_vl.plan.cost import view_costs
from megatron_vl.plan.layout import Coords, Layout
from megatron_vl.plan.sequence import row_multiple
from megatron_vl.plan.vision_share import CROP, share_step


@dataclass(frozen=True)
class Tolerances:
    """Accepted relative L2 distances (golden/README.md)."""

    vision: float
    hidden: float
    ce: float
    loss: float
    gradient: float

    def of(self, name: str) -> float:
        """The bound of one output, by its name in the reference file."""
        if name.startswith("vision.") or name.endswith("embeds"):
            return self.vision
        if name == "loss":
            return self.loss
        return self.ce if name.endswith(".ce") else self.hidden


FP32 = Tolerances(vision=1e-5, hidden=2e-5, ce=1e-5, loss=2e-6, gradient=5e-5)
BF16 = Tolerances(vision=3e-2, hidden=5e-2, ce=2e-2, loss=1e-2, gradient=0.2)


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """||ours - reference|| / ||reference|| in fp64; the plain norm of ours where the reference is zero.

    NaN and infinities give infinity, a shape that differs gives infinity: neither can pass.
    """
    if ours.shape != reference.shape:
        return float("inf")
    a, b = ours.double(), reference.double()
    distance, size = (a - b).norm().item(), b.norm().item()
    value = distance / size if size > 0 else distance
    return value if value == value else float("inf")


class Assembled:
    """The whole tensors of one layout's run, in the reference's shapes."""

    def __init__(
        self,
        seen: Sequence[Seen],
        layout: Layout,
        batches: Batches,
        docs: Sequence[Document],
        model: ModelConfig,
    ):
        self.seen = {s.rank: s for s in seen}
        self.layout, self.batches, self.docs, self.model = layout, batches, docs, model

    def _at(self, **coords: int) -> Seen:
        return self.seen[self.layout.rank(Coords(**coords))]

    @property
    def losses(self) -> list[float]:
        return self.seen[0].losses

    def bounds(self, dp: int, micro_batch: int) -> tuple[int, ...]:
        """Document boundaries that the row was cut by."""
        if not self.batches.packed:
            return (0, self.batches.seq_length)
        multiple = row_multiple(self.layout.tp, self.layout.cp, self.layout.sp)
        edges = [0]
        for doc in self.batches.rows[dp][micro_batch][0]:
            edges.append(edges[-1] + -(-len(doc.ids) // multiple) * multiple)
        return tuple(edges) if edges[-1] == self.batches.seq_length else (*edges, self.batches.seq_length)

    def view_tensor(self, kind: int, name: str) -> torch.Tensor | None:
        """``[views of this kind, tokens, channels]`` over all samples in order; None when the file has no such view."""
        parts: dict[int, list[torch.Tensor]] = {}
        for place in self.batches.placed:
            kinds = self._kinds(place.dp)[place.micro_batch]
            whole = self._views_of(place.dp, place.micro_batch, kind, name)
            views = range(place.first_view, place.first_view + len(self.docs[place.number].kinds))
            parts[place.number] = [whole[v] for v in views if kinds[v] == kind]
        tensors = [t for number in sorted(parts) for t in parts[number]]
        return torch.stack(tensors) if tensors else None

    def _kinds(self, dp: int) -> list[list[int]]:
        """Of the views of each micro-batch."""
        return [[k for doc in groups[0] for k in doc.kinds] for groups in self.batches.rows[dp]]

    def _views_of(self, dp: int, micro_batch: int, kind: int, name: str) -> dict[int, torch.Tensor]:
        found, layout, of_step = {}, self.layout, self._kinds(dp)
        shares = share_step(of_step, layout.vision_size, view_costs(self.model), layout.tower_beside)
        for vision_rank, views in enumerate(shares[micro_batch]):
            mine = [v for v in views if of_step[micro_batch][v] == kind]
            if not mine:
                continue
            ranks = [
                self.seen[layout.rank(at)]
                for at in map(layout.coords, range(layout.world_size))
                if at.dp == dp and layout.encodes(at) and layout.vision_rank(at) == vision_rank
            ]
            shards = [r.views[micro_batch, kind, name] for r in ranks]
            value = torch.cat(shards, dim=-1) if name == "down1" else shards[0]
            found.update(zip(mine, value))
        return found

    def sample_tensor(self, number: int, name: str, pp: int) -> torch.Tensor:
        """``[S, channels]`` of one sample (``ce``: ``[S]``), found on pipeline rank ``pp``."""
        place = next(p for p in self.batches.placed if p.number == number)
        per_cp = []
        for cp in range(self.layout.cp):
            ranks = [self._at(dp=place.dp, pp=pp, cp=cp, tp=t) for t in range(self.layout.tp)]
            shards = [r.rows[place.micro_batch, name] for r in ranks]
            if name == "ce":
                per_cp.append(shards[0].transpose(0, 1))
            elif name == "logits":
                per_cp.append(torch.cat(shards, dim=-1)[..., : self.model.text.vocab_size])
            else:
                per_cp.append(torch.cat(shards) if self.layout.sp else shards[0])
        order = global_order(self.bounds(place.dp, place.micro_batch), self.layout.cp)
        row = torch.cat(per_cp)[order][:, place.row]
        return row[place.start : place.start + place.length]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients under released names, in the checkpoint's shapes."""
        out = {}
        for rule in rules_by_name(self.model).values():
            sharded = self.layout.tp if rule.part == "decoder" or self.layout.placement == "tensor" else 1
            holders = [
                [self._at(dp=0, pp=pp, cp=0, tp=t).gradients.get(rule.ours) for t in range(sharded)]
                for pp in range(self.layout.pp)
            ]
            shards = next((h for h in holders if h[0] is not None), None)
            if shards is not None:
                out.update(to_hf(rule, unshard(rule, shards), self.model))
        return out


def distances(assembled: Assembled, reference: Reference, stage_of: dict[int, int]) -> dict[str, float]:
    """Relative distance of every output that the reference file holds, in the order of computation.

    stage_of: decoder layer -> pipeline rank. ``ce`` compares scored positions only (the file holds 0 elsewhere).
    """
    model, t = assembled.model, reference.tensors
    names = [
        "embed",
        *(f"block{i}" for i in range(model.vision.num_layers)),
        "tower",
        "down1",
        "down2",
        "projected",
    ]
    found: dict[str, float] = {}

    def compare(name: str, make) -> None:
        if f"outputs.{name}" in t and t[f"outputs.{name}"].numel():
            ours = make()
            found[name] = float("inf") if ours is None else relative(ours, t[f"outputs.{name}"])

    for name in names:
        for kind, word in ((CROP, "crop"), (1 - CROP, "global")):
            compare(f"vision.{word}.{name}", lambda: assembled.view_tensor(kind, name))
    last = assembled.layout.pp - 1
    rows = [
        ("embeds", 0),
        *((f"hidden{i}", stage_of[i]) for i in range(model.text.num_layers)),
        ("logits", last),
    ]
    for name, pp in rows:
        for number in range(reference.samples):
            compare(f"sample{number}.{name}", lambda: assembled.sample_tensor(number, name, pp))
    for number in range(reference.samples):
        scored = (t[f"inputs.sample{number}.targets"] != -100).float()
        compare(f"sample{number}.ce", lambda: assembled.sample_tensor(number, "ce", last) * scored)
    compare("loss", lambda: torch.tensor(assembled.losses[0], dtype=torch.float64))
    return found


def gradient_distances(assembled: Assembled, reference: Reference) -> dict[str, float]:
    """Relative distance of every gradient in the file; a gradient that we do not have counts as infinite."""
    ours = assembled.gradients()
    found = {}
    for name in reference.names("grad."):
        found[name] = (
            relative(ours[name], reference.tensors[f"grad.{name}"]) if name in ours else float("inf")
        )
    found.update({f"{name} (not in the reference)": float("inf") for name in ours if name not in found})
    return found
