"""Settings every test shares.

Tests that start ranks do so in one gloo world per session, several processes on few cores: each process
keeps to one thread, and megatron-core's fused functions run as written, since compiling them costs
seconds per process and changes nothing that is tested here.  Both variables must be set before torch is
imported, and are inherited by the ranks.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# No test may reach out for tokenizers, models or data.
os.environ["HF_HUB_OFFLINE"] = "1"

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell's background job: programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests.fixtures.world import KeptWorld  # noqa: E402

CRASHES = pytest.StashKey[list[str]]()


def has_cuda() -> bool:
    """Whether a CUDA device can be used; torch is imported only when a test marked ``gpu`` was collected."""
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no device, also when they are named explicitly."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Ranks that native code ended: their jobs were done again, which nobody should overlook."""
    for crash in config.stash.get(CRASHES, []):
        terminalreporter.section("a rank was ended by native code; its job was done once more", red=True)
        terminalreporter.line(crash)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout the tests run from: tools/ and examples/ are not part of the installed package."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world(pytestconfig: pytest.Config) -> Iterator[KeptWorld]:
    """Eight spawned gloo ranks that all tests share: started by the first job, again after a breakdown."""
    kept = KeptWorld()
    pytestconfig.stash[CRASHES] = kept.crashes
    yield kept
    kept.close()
