"""Where a rank learns who it is, and what it runs on."""

from __future__ import annotations

import pytest
import torch

from megatron_vl.errors import ConfigError
from megatron_vl.parallel.runtime import Environment, choose_device, parameter_dtype, read_environment

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Environment(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **ADDRESS}, Environment(5, 8, 1)),
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", **ADDRESS}, Environment(9, 16, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Environment(0, 1, 0)),
        # torchrun inside a Slurm job: torchrun's word counts
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", **ADDRESS}, Environment(1, 2, 0)),
    ],
)
def test_reads_the_launcher(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Environment):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_environment() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "MASTER_ADDR and MASTER_PORT must be exported"),
    ],
)
def test_an_incomplete_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        read_environment()


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device is visible"):
        choose_device("cuda")


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"local rank 1: only 1 CUDA device"):
        choose_device("cuda", 1)


def test_auto_precision_follows_the_device():
    assert parameter_dtype("auto", torch.device("cpu")) == torch.float32
    assert parameter_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert parameter_dtype("bf16", torch.device("cpu")) == torch.bfloat16
