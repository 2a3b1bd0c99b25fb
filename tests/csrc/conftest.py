"""The library, built once per session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vl.ops import library
from tests.csrc.building import build_host


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_host(tmp_path_factory.mktemp("csrc"))


@pytest.fixture
def kernels(host_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operations on CPU tensors go through the library. What operators leave unwritten is NaN."""
    monkeypatch.setenv(library.VARIABLE, str(host_library))
    assert library.choose_kernels("required", torch.device("cpu")) == "used"
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)
    library.choose_kernels("never", torch.device("cpu"))
