"""A rank's live weights and optimizer state as pieces of released tensors, to be written or filled.

What belongs to whom: weights are the same on all DP x CP ranks (and over TP, when not sharded; a tower beside the
pipeline on all ranks), so one of them writes each; the distributed optimizer gives each of these ranks a range of every
flattened shard, which that rank writes. Frozen parameters have no optimizer state; one that is unfrozen later starts
with none, at step 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_vl.checkpoint import fp8_state
from megatron_vl.checkpoint.fragments import Fragment, fragments, replica_writers
from megatron_vl.checkpoint.hf_names import DECODER, Rule, global_name, rules_by_name
from megatron_vl.checkpoint.stored import Stored
from megatron_vl.checkpoint.torch_dist import Item, Pair
from megatron_vl.config.model import ModelConfig
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel.data_parallel import ChunkDataParallel
from megatron_vl.parallel.runtime import Runtime
from megatron_vl.plan.stages import Stage

WEIGHT, MAIN, MOMENTS = "model", "optimizer/main", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slot:
    """A flat piece of one parameter's values. what: ``model``, ``optimizer/main``, ``optimizer/exp_avg`` ...

    tp: (size, rank) of its sharding. start: where the piece begins in the flattened shard. writes: this rank does.
    """

    what: str
    rule: Rule
    tp: Pair
    start: int
    values: torch.Tensor
    writes: bool

    def fragments(self, model: ModelConfig) -> list[Fragment]:
        return fragments(self.rule, model, self.tp, self.start, self.start + self.values.numel())


@dataclass(frozen=True)
class Main:
    """A parameter, or the part of it that this rank's optimizer updates. inner: torch's optimizer."""

    inner: torch.optim.Optimizer
    parameter: torch.nn.Parameter
    main: torch.nn.Parameter
    start: int


def mains(optimizer: MegatronOptimizer) -> Iterator[Main]:
    """What each of Megatron-Core's optimizers updates on this rank; nothing where all is frozen."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue
        if isinstance(part, DistributedOptimizer):
            for ranges in part.gbuf_ranges:
                for buckets in ranges.values():
                    for bucket in buckets:
                        for parameter, where in bucket["param_map"].items():
                            group, order = part.model_param_group_index_map[parameter]
                            main = part.optimizer.param_groups[group]["params"][order]
                            yield Main(part.optimizer, parameter, main, where["param"].start)
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            halves = zip(part.float16_groups, part.fp32_from_float16_groups)
            for parameters, copies in halves:
                for parameter, main in zip(parameters, copies):
                    yield Main(part.optimizer, parameter, main, 0)
            for group in part.fp32_from_fp32_groups:
                yield from (Main(part.optimizer, p, p, 0) for p in group)
        else:
            for group in part.optimizer.param_groups:
                yield from (Main(part.optimizer, p, p, 0) for p in group["params"])


@dataclass
class Live:
    """The parts of a run that a checkpoint holds, on one rank. optimizer: None to keep weights only.

    prefix: before every key and step count, e.g. ``critic/``. beside: another model in the same checkpoint, so that
    the two are always of one moment; it has a prefix.
    """

    model: ModelConfig
    placement: str
    runtime: Runtime
    stages: list[Stage]
    chunks: list[ChunkDataParallel]
    optimizer: MegatronOptimizer | None
    prefix: str = ""
    beside: Live | None = None

    @cached_property
    def named(self) -> list[tuple[torch.nn.Parameter, Rule, Pair]]:
        """Every parameter of this rank with its rule and sharding."""
        rules = rules_by_name(self.model)
        coords, layout, found = self.runtime.coords, self.runtime.layout, []
        for chunk, stage in zip(self.chunks, self.stages, strict=True):
            for local, parameter in chunk.named_parameters():
                rule = rules[global_name(local, stage.layers)]
                sharded = rule.axis is not None and (rule.part == DECODER or self.placement == "tensor")
                found.append((parameter, rule, (layout.tp, coords.tp) if sharded else (1, 0)))
        return found

    @cached_property
    def writers(self) -> list[tuple[bool, bool]]:
        """Per parameter: does this rank write its values, and the range that its cut optimizer holds of the state.

        A tower beside the pipeline is whole on every rank: pipeline ranks take turns in writing its values, and its
        optimizer's state is cut over all ranks.
        """
        coords, layout = self.runtime.coords, self.runtime.layout
        copies = [self.placement == "all" and rule.part != DECODER for _, rule, _ in self.named]
        turns = accumulate(copies)
        here = [not copied or turn % layout.pp == coords.pp for copied, turn in zip(copies, turns)]
        sizes = [(p.numel() * mine, tp[0] > 1) for mine, (p, _, tp) in zip(here, self.named)]
        chosen = replica_writers(sizes, layout.tp, layout.dp * layout.cp)
        me = coords.dp * layout.cp + coords.cp
        return [
            (mine and tp in (-1, coords.tp) and copy == me, copied or tp in (-1, coords.tp))
            for mine, copied, (tp, copy) in zip(here, copies, chosen)
        ]

    def weights(self) -> list[Slot]:
        """All weights of this rank, none of them still on its way from another rank."""
        for chunk in self.chunks:
            chunk.wait_for_weights()
        return [
            Slot(WEIGHT, rule, tp, 0, flat(parameter), writes)
            for (parameter, rule, tp), (writes, _) in zip(self.named, self.writers, strict=True)
        ]

    def optimizer_state(self) -> list[Slot]:
        """Main weights and moments of what this rank updates; moments are allocated when there are none yet."""
        if self.optimizer is None:
            return []
        of = {id(parameter): (rule, tp) for parameter, rule, tp in self.named}
        writes = {id(p): who for (p, _, _), who in zip(self.named, self.writers, strict=True)}
        slots = []
        for main in mains(self.optimizer):
            rule, tp = of[id(main.parameter)]
            of_values, of_range = writes[id(main.parameter)]
            own = of_range if self.cuts_optimizer else of_values
            tensors = {f"optimizer/{name}": flat(t) for name, t in moments(main).items()}
            if main.main.dtype != main.parameter.dtype:
                tensors[MAIN] = flat(main.main)
            slots += [Slot(what, rule, tp, main.start, values, own) for what, values in tensors.items()]
        return slots

    @property
    def cuts_optimizer(self) -> bool:
        """Whether each DP x CP rank holds its own range (then every rank writes), or all hold the same."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return any(isinstance(part, DistributedOptimizer) for part in parts)

    def steps(self) -> dict[str, int]:
        """Adam's step count of what this rank updates, by released name behind the prefix."""
        of = {id(parameter): rule for parameter, rule, _ in self.named}
        counts = {} if self.beside is None else self.beside.steps()
        for main in mains(self.optimizer) if self.optimizer is not None else ():
            state = main.inner.state[main.main]
            step = state["step"] if "step" in state else group_of(main).get("step", 0)
            names = (f"{self.prefix}{name}" for name, _ in of[id(main.parameter)].hf)
            counts |= dict.fromkeys(names, int(step))
        return counts

    def items(self, stage: Callable[[torch.Tensor], torch.Tensor]) -> list[Item]:
        """What this rank writes. stage: copies live values to where they stay as they are now."""
        items = []
        for slot in [*self.weights(), *self.optimizer_state()]:
            if slot.writes:
                kept = stage(slot.values)
                items += [
                    Item(
                        f"{self.prefix}{slot.what}/{part.name}", part.shape, kept.dtype, part.offset, part.size,
                        partial(part.gather, kept),
                    )
                    for part in slot.fragments(self.model)
                ]  # fmt: skip
        coords = self.runtime.coords
        if (coords.dp, coords.cp, coords.tp) == (0, 0, 0):
            items += fp8_state.items(self.chunks, self.stages, self.prefix, stage)
        if self.beside is not None:
            items += self.beside.items(stage)
        if self.prefix:
            return items
        for name, state in rng_states(self.runtime.device).items():
            size = (state.numel(), 1)
            key = f"rng/{self.runtime.rank:05d}/{name}"
            items.append(Item(key, size, state.dtype, (0, 0), size, partial(torch.clone, state)))
        return items

    @torch.no_grad()
    def fill(self, stored: Stored) -> list[str]:
        """Load weights, optimizer state and step counts; released names that had no optimizer state are returned.

        Raises:
            CheckpointError: a tensor is missing, misshapen or damaged.
        """
        for slot in self.weights():
            self._fill(slot, stored, [MAIN, WEIGHT] if slot.values.dtype == torch.float32 else [WEIGHT])
        fresh: set[str] = set()
        steps = stored.state["optimizer_steps"]
        for slot in self.optimizer_state():
            if slot.what == MAIN:
                self._fill(slot, stored, [MAIN, WEIGHT])
            elif f"{self.prefix}{slot.what}/{slot.rule.hf[0][0]}" in stored.tensors:
                self._fill(slot, stored, [slot.what])
            else:
                slot.values.zero_()
                fresh.add(f"{self.prefix}{slot.rule.hf[0][0]}")
        fp8_state.fill(self.chunks, self.stages, self.prefix, stored)
        of = {id(parameter): rule for parameter, rule, _ in self.named}
        for main in mains(self.optimizer) if self.optimizer is not None else ():
            set_step(main, steps.get(f"{self.prefix}{of[id(main.parameter)].hf[0][0]}", 0))
        if self.beside is not None:
            fresh.update(self.beside.fill(stored))
        return sorted(fresh)

    def _fill(self, slot: Slot, stored: Stored, sources: list[str]) -> None:
        """Fill a slot from the first of ``sources`` that is stored."""
        for part in slot.fragments(self.model):
            names = [f"{self.prefix}{what}/{part.name}" for what in sources]
            keys = [name for name in names if name in stored.tensors]
            if not keys:
                raise CheckpointError(
                    f"{stored.folder}: has no {names[-1]}: saved for another model than this run's"
                )
            if stored.tensors[keys[0]].shape != part.shape:
                raise CheckpointError(
                    f"{stored.folder}: {keys[0]} is {list(stored.tensors[keys[0]].shape)}, this run's model wants "
                    f"{list(part.shape)}; use another run_dir, or the model in its config.yaml"
                )
            part.scatter(stored.read_box(keys[0], part.offset, part.size), slot.values)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The live values as one axis, sharing memory."""
    return tensor.detach().view(-1)


def moments(main: Main) -> dict[str, torch.Tensor]:
    """Adam's two averages of a parameter, allocated as zeros before the first step."""
    state = main.inner.state[main.main]
    if MOMENTS[0] not in state:
        state |= {name: torch.zeros_like(main.main) for name in MOMENTS}
        set_step(main, 0)
    return {name: state[name] for name in MOMENTS}


def group_of(main: Main) -> dict:
    """The parameter group that a main weight is in."""
    return next(g for g in main.inner.param_groups if any(p is main.main for p in g["params"]))


def set_step(main: Main, step: int) -> None:
    """Adam's step count: torch keeps one per parameter, the fused optimizers of TE and Apex one per group.

    Raises:
        CheckpointError: the fused kind, and parameters of one group differ (one was frozen before).
    """
    if isinstance(main.inner, torch.optim.Optimizer) and type(main.inner).__module__.startswith("torch."):
        main.inner.state[main.main]["step"] = torch.tensor(float(step))
        return
    group = group_of(main)
    if group.setdefault("step", step) != step:
        raise CheckpointError(
            f"optimizer steps {group['step']} and {step} in one parameter group: {type(main.inner).__name__} keeps "
            "one count per group; unfreeze with parallel.layer_backend=torch, or start from the weights with "
            "train.init_from"
        )


def rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The generators of this rank as flat byte tensors."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    tracker = get_cuda_rng_tracker().get_states()
    return states | {f"tracker/{name}": state.view(-1) for name, state in tracker.items()}


def set_rng_states(stored: Stored, rank: int, device: torch.device) -> None:
    """Continue this rank's random streams; only meaningful in the layout that the checkpoint was saved in."""
    prefix = f"rng/{rank:05d}/"
    states = {
        key.removeprefix(prefix): stored.read(key).view(-1).clone()
        for key in stored.tensors
        if key.startswith(prefix)
    }
    torch.set_rng_state(states.pop("torch"))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states.pop("cuda"), device)
    trackers = {key.removeprefix("tracker/"): s for key, s in states.items() if key.startswith("tracker/")}
    get_cuda_rng_tracker().set_states(trackers)
