"""The CPU adapter: what it redirects, and when it refuses."""

from __future__ import annotations

import pytest
import torch

from megatron_vl.errors import ConfigError
from megatron_vl.parallel import cpu


def test_refuses_beside_a_cuda_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"2 CUDA device\(s\) are visible .* parallel.device=cuda"):
        cpu.install()


def observed() -> dict[str, object]:
    """Run on a rank, where the adapter is installed: what each redirect answers."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    cpu.install()  # a second time: nothing happens
    value = torch.ones(3)
    found = {
        "factories": {
            str(t.device)
            for t in (
                torch.empty(1, device="cuda"),
                torch.zeros(1, device=torch.device("cuda", 0)),
                torch.tensor([1], device="cuda", pin_memory=True),
                torch.arange(3, device=torch.cuda.current_device()),
                torch.full((1,), 2.0, device="cuda"),
                torch.zeros_like(value, device="cuda"),
                value.to("cuda"),
                value.to(device="cuda:0", dtype=torch.float64),
                value.cuda(),
            )
        },
        "to_dtype": value.to(device="cuda", dtype=torch.float64).dtype,
        "to_cpu": str(value.to("cpu").device),
        "module": str(next(torch.nn.Linear(1, 1).cuda().parameters()).device),
        "types": [value.type(), value.bfloat16().type(), value.type(torch.float64).dtype],
        "synchronize": torch.cuda.synchronize(),
        "event": torch.cuda.current_stream().record_event().query(),
        "installed": cpu.installed(),
    }
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.Event().record()
    model_parallel_cuda_manual_seed(7, tp_rank=0, ep_rank=0, etp_rank=0)
    outside = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(4)
    found["fork restores"] = torch.equal(outside, torch.get_rng_state())
    with get_cuda_rng_tracker().fork():
        second = torch.rand(4)
    found["fork goes on"] = not torch.equal(first, second)
    saved = torch.cuda.get_rng_state()
    draw = torch.rand(2)
    torch.cuda.set_rng_state(saved)
    found["rng state"] = torch.equal(draw, torch.rand(2))
    return found


def test_redirects(world):
    found = world.run(1, observed_in_layout)[0]
    assert found == {
        "factories": {"cpu"},
        "to_dtype": torch.float64,
        "to_cpu": "cpu",
        "module": "cpu",
        "types": ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", torch.float64],
        "synchronize": None,
        "event": True,
        "installed": True,
        "fork restores": True,
        "fork goes on": True,
        "rng state": True,
    }


def observed_in_layout() -> dict[str, object]:
    """`observed` inside process groups, which the RNG tracker's seeding asks for."""
    from megatron_vl.config.schema import ParallelConfig
    from megatron_vl.parallel.runtime import choose_device, start

    start(ParallelConfig(), 1, choose_device("cpu"))
    return observed()


def test_events_do_not_pretend_to_measure():
    with pytest.raises(RuntimeError, match="perf_counter"):
        cpu.InertStream().elapsed_time(cpu.InertStream())
