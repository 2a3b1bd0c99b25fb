"""Which norms fill the slots, with a stand-in for Apex; the package itself cannot be installed here."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_vl.errors import ConfigError
from megatron_vl.model import backend, norm


class FusedRMSNorm(torch.nn.RMSNorm):
    """As Apex's: a weight in fp32."""


class FusedLayerNorm(torch.nn.LayerNorm):
    """As Apex's: weight and bias in fp32."""


@pytest.fixture
def apex(monkeypatch):
    """Apex as it would be found on a GPU machine."""
    package, normalization = ModuleType("apex"), ModuleType("apex.normalization")
    normalization.FusedRMSNorm, normalization.FusedLayerNorm = FusedRMSNorm, FusedLayerNorm
    package.normalization = normalization
    for name, module in (
        ("apex", package),
        ("apex.normalization", normalization),
        ("fused_layer_norm_cuda", ModuleType("fused_layer_norm_cuda")),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return package


def config(normalization: str) -> SimpleNamespace:
    return SimpleNamespace(normalization=normalization, params_dtype=torch.bfloat16, sequence_parallel=True)


def test_pytorch_fuses_the_norm_of_the_decoder_itself():
    """From 2.11 on, so auto leaves Apex alone there."""
    assert norm.torch_fuses_rms_norm()


@pytest.mark.parametrize(
    ("name", "torch_fuses", "expected"),
    [
        ("auto", True, norm.TorchNorm),
        ("auto", False, norm.ApexNorm),
        ("apex", True, norm.ApexNorm),
        ("torch", False, norm.TorchNorm),
    ],
)
def test_choice(apex, monkeypatch, name, torch_fuses, expected):
    monkeypatch.setattr(norm, "torch_fuses_rms_norm", lambda: torch_fuses)
    assert norm.choose_norm(name) is expected
    monkeypatch.setattr(backend, "have_transformer_engine", lambda: False)
    assert backend.choose_backend("auto", norms=name).norm is expected


def test_each_kind_gets_its_class_in_the_format_of_the_weights(apex):
    """Megatron-Core's FusedLayerNorm refuses RMSNorm: the trap."""
    rms, layer = (norm.ApexNorm(config(kind), 8, 1e-6) for kind in ("RMSNorm", "LayerNorm"))
    assert type(rms) is FusedRMSNorm and type(layer) is FusedLayerNorm and rms.eps == layer.eps == 1e-6
    plain = [norm.TorchNorm(config(kind), 8, 1e-6) for kind in ("RMSNorm", "LayerNorm")]
    for ours, other in zip((rms, layer), plain):
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in other.named_parameters()]
        assert all(p.dtype == torch.bfloat16 and p.sequence_parallel for p in ours.parameters())
        x = torch.randn(4, 8).bfloat16()
        assert torch.allclose(ours(x), other(x), atol=1e-2)


@pytest.mark.parametrize("missing", ["fused_layer_norm_cuda", "apex.normalization", "device"])
def test_what_cannot_be_used_is_not_there(apex, monkeypatch, missing):
    """Also the package of that name on PyPI, which has no such module."""
    if missing == "device":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    assert not norm.have_apex_norms() and norm.choose_norm("auto") is norm.TorchNorm
    with pytest.raises(ConfigError, match="parallel.norms = apex: it needs a CUDA device and NVIDIA's Apex"):
        norm.choose_norm("apex")


def test_beside_transformer_engine_it_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "have_transformer_engine", lambda: True)
    with pytest.raises(ConfigError, match="Transformer Engine's layers have norms of their own"):
        backend.choose_backend("auto", norms="apex")
