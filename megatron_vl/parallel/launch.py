"""``--nproc N``: start N local ranks of a command, watch them, name the one that fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from megatron_vl.plan.layout import Layout

GRACE_SECONDS = 15.0


def launched() -> bool:
    """Whether this process is already a rank of a launcher."""
    return "RANK" in os.environ or (
        "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    )


def run_local(command: Sequence[str], layout: Layout) -> int:
    """Run ``command`` once per rank of ``layout`` on this machine; the first failing exit code, else 0.

    When a rank fails its coordinates are printed, the others get GRACE_SECONDS to end by themselves (they print
    their own view of the failure) and are killed then. SIGINT and SIGTERM end all of them: code 130.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(layout.world_size),
    }  # fmt: skip
    base.setdefault("OMP_NUM_THREADS", "1")
    processes = [
        subprocess.Popen(command, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(layout.world_size)
    ]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _watch(processes, layout)
    except KeyboardInterrupt:
        for process in processes:
            process.send_signal(signal.SIGINT)
        return 130
    finally:
        _end(processes)
        signal.signal(signal.SIGTERM, before)


def _watch(processes: list[subprocess.Popen], layout: Layout) -> int:
    while True:
        codes = [p.poll() for p in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            # the others fail because of the one that was killed, sometimes before we look again
            rank, code = min(failed, key=lambda item: (item[1] > 0 or item[1] == -signal.SIGABRT, item[0]))
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            print(f"{layout.describe(rank)} {how}; stopping the other ranks", file=sys.stderr, flush=True)
            return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _end(processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
