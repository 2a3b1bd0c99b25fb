"""Finding and choosing the library: never required, and a plain sentence where it is asked for and absent."""

import pytest
import torch

from megatron_vl.errors import ConfigError
from megatron_vl.ops import library

CPU = torch.device("cpu")


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "BUILD", tmp_path)
    return tmp_path


def test_nothing_is_needed(nothing_built):
    assert library.find_library() is None
    for choice in ("auto", "never"):
        assert library.choose_kernels(choice, CPU) == "not used"
    assert not library.uses_kernels(torch.ones(2, 8), 8)


def test_on_without_a_library_is_refused(nothing_built):
    with pytest.raises(
        ConfigError, match=r"fused_kernels = required: there is no library; run `make -C csrc host`"
    ):
        library.choose_kernels("required", CPU)
    assert not library.uses_kernels(torch.ones(2, 8), 8)


def test_a_file_that_is_not_there(nothing_built, monkeypatch):
    monkeypatch.setenv(library.VARIABLE, str(nothing_built / "none.so"))
    with pytest.raises(ConfigError, match=r"MEGATRON_VL_OPS = .*none.so: no such file"):
        library.choose_kernels("required", CPU)


def test_a_file_that_does_not_load(nothing_built, monkeypatch):
    monkeypatch.setattr(library, "_loaded", [])
    (nothing_built / library.NAMES[1]).write_text("no library")
    with pytest.raises(ConfigError, match="cannot be used .*build it again"):
        library.choose_kernels("required", CPU)


def test_other_gpus_keep_the_twins(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cuda = torch.device("cuda")
    assert library.choose_kernels("auto", cuda).startswith(
        "not used (the kernels are for compute capability 9.0"
    )
    with pytest.raises(ConfigError, match=r"this device has \(8, 0\); or set parallel.fused_kernels=auto"):
        library.choose_kernels("required", cuda)


def test_a_library_for_the_cpu_does_not_serve_a_gpu(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "was built for the CPU only" in library.choose_kernels("auto", torch.device("cuda"))


def test_the_built_library_is_found(nothing_built):
    host, cuda = (nothing_built / name for name in reversed(library.NAMES))
    host.touch()
    assert library.find_library() == host
    cuda.touch()
    assert library.find_library() == cuda
