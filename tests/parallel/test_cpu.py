"""The adapter that runs Megatron-Core on CPU. The redirects are tried on a rank: they last for a process."""

import pytest
import torch

from megatron_vl.errors import ConfigError
from megatron_vl.parallel import cpu
from megatron_vl.parallel.runtime import choose_device, parameter_dtype
from tests.parallel.on_ranks import cpu_redirects


def test_it_refuses_beside_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    before = torch.empty
    with pytest.raises(
        ConfigError, match=r"parallel.device = cpu: 4 CUDA device\(s\) are visible.*CUDA_VISIBLE"
    ):
        cpu.install()
    with pytest.raises(ConfigError, match="would stay idle"):
        choose_device("cpu")
    assert torch.empty is before


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="parallel.device = cuda: no CUDA device is visible"):
        choose_device("cuda")


def test_more_ranks_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"local rank 2: only 2 CUDA device\(s\)"):
        choose_device("auto", 2)


def test_every_redirect(world):
    seen = world.run(1, cpu_redirects)[0]
    assert seen["devices"] == {"cpu"} and seen["by_context"] == {"meta"}
    assert seen["dtype"] == torch.float64
    assert seen["types"] == ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", torch.float64)
    assert seen["query"] is True
    assert seen["rng"], "the same state must give the same numbers, and the tracker its own"
    assert "do not measure time on CPU" in seen["timed"]
    assert seen["same"], "a second install must change nothing"


def test_parameter_dtype():
    assert parameter_dtype("auto", torch.device("cpu")) == torch.float32
    assert parameter_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert parameter_dtype("bf16", torch.device("cpu")) == torch.bfloat16
