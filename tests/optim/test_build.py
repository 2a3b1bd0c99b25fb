"""Parameter groups of the real optimizer on a tiny model."""

from __future__ import annotations

from megatron_vl.config.presets import STEP3_VL_TINY
from megatron_vl.config.schema import OptimConfig, ParallelConfig, RunConfig


def groups_on_rank(optim: OptimConfig, distributed: bool) -> dict[str, tuple[float, float]]:
    """Build on one rank, set lr 0.5 and weight decay 0.1; what each parameter got (lr, weight decay)."""
    from megatron_vl.checkpoint.initialize import FreshWeights
    from megatron_vl.optim.build import set_learning_rate
    from megatron_vl.parallel.runtime import choose_device, start
    from megatron_vl.train.build import build

    parallel = ParallelConfig(use_distributed_optimizer=distributed)
    config = RunConfig(model=STEP3_VL_TINY, parallel=parallel, optim=optim)
    runtime = start(parallel, 1, choose_device("cpu"))
    parts = build(config, runtime, FreshWeights(config.model, 1))
    set_learning_rate(parts.optimizer, 0.5, 0.1)
    names = {id(p): n for n, p in parts.chunks[0].module.named_parameters()}
    if distributed:
        inner = parts.optimizer.chained_optimizers[0]
        found = {}
        for models, group in zip(inner.model_fp32_groups, inner.optimizer.param_groups):
            found.update({names[id(p)]: (group["lr"], group["weight_decay"]) for p in models})
        return found
    groups = parts.optimizer.param_groups
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_vectors_do_not_decay_and_parts_have_their_rate(world):
    optim = OptimConfig(vision_lr_scale=0.4, projector_lr_scale=2.0)
    for distributed in (False, True):
        found = world.run(1, groups_on_rank, optim, distributed)[0]
        assert len(found) == len(set(found)) > 50
        for name, (lr, decay) in found.items():
            scale = 0.4 if name.startswith("vision_model.") else 2.0 if name.startswith("projector.") else 1.0
            vector = name.endswith(("bias", "gamma", "norm.weight", "ln_pre.weight"))
            assert (lr, decay) == (0.5 * scale, 0.0 if vector else 0.1), name
