"""Builds of ``csrc/`` in temporary folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"


def need(*programs: str) -> None:
    """Skip the test where a program is missing."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on this machine")


def make(*arguments: str, sources: Path = SOURCES) -> subprocess.CompletedProcess:
    """`make -C csrc` against the torch of these tests."""
    command = ["make", "-j2", "-C", str(sources), f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def build_host(folder: Path) -> Path:
    """The library for the CPU, in `folder`."""
    need("make", "g++")
    done = make("host", f"BUILD={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libmegatron_vl_ops_host.so"
