"""A real Slurm from Debian's packages, where there is one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.slurm.local_slurm import missing_programs

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quickstart_is_preempted_and_finishes():
    """Everything else is checked by the script; its log is kept below the temporary directory when it fails."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    folder = tempfile.mkdtemp(prefix="slurm_")  # not tmp_path: a socket's path is at most 107 characters
    command = [sys.executable, "-m", "tests.slurm.preempted_quickstart", folder]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=660)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its daemons
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"no end after 11 minutes\n{output}")
    finally:
        process.kill()
    print(output)
    assert process.returncode == 0, output
