"""A Slurm of two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmd, no services.

Needs Debian's ``slurm-wlm`` and ``munge`` and nothing of their configuration: key, socket, slurm.conf, state, spool
and logs lie in the folder, and every process is ended with ``stop``. By hand, until Ctrl-C::

    python -m tests.slurm.local_slurm FOLDER
"""

from __future__ import annotations

import ctypes
import functools
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SBIN = "/usr/sbin"  # not on everybody's PATH
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
LIBC = ctypes.CDLL(None)
MAX_SOCKET_PATH = 107

# Names that resolve on every machine: scripts take the first one as MASTER_ADDR.
NODES = ("127.0.0.1", "127.0.0.2")

CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job starts only when the credentials of its last start have expired: 2 minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire={cred_expire}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
JobRequeue=1
ReturnToService=2
KillWait=30
SlurmdTimeout=60
SlurmctldDebug=debug
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SlurmdParameters=config_overrides
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def missing_programs() -> list[str]:
    """Those of Slurm and munge that are not installed."""
    return [name for name in PROGRAMS if find(name) is None]


def find(program: str) -> str | None:
    """The program's path, also where /usr/sbin is not on PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}{os.pathsep}{SBIN}")


class LocalSlurm:
    """Two nodes with ``cpus`` processors each, whatever the machine has.

    Args:
        folder: an absolute, short path (munge's socket lies in it); made if missing.
        cred_expire: seconds before a requeued job may start again.
    """

    def __init__(self, folder: Path, cpus: int = 4, cred_expire: int = 10) -> None:
        if len(str(folder / "munge.socket")) > MAX_SOCKET_PATH:
            raise ValueError(f"{folder} is too long a path for a socket in it; use a shorter one")
        self.folder = folder
        self.environment = {**self.clean_environment(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        for name in ("", "state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # munge wants to be reachable
        ports = free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeAddr={name} NodeHostname={socket.gethostname()} Port={port} CPUs={cpus} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:])
        ]
        config = CONFIG.format(
            host=socket.gethostname(), ports=ports, user=getpass.getuser(), folder=folder, cred_expire=cred_expire,
            nodes="\n".join(nodes),
        )  # fmt: skip
        (folder / "slurm.conf").write_text(config)

    @staticmethod
    def clean_environment() -> dict[str, str]:
        """This process's variables without those of another Slurm or a torchrun."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "PYTEST_", "TORCHELASTIC_")
        single = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
        return {k: v for k, v in os.environ.items() if not k.startswith(foreign) and k not in single}

    def start(self, seconds: float = 30) -> None:
        """Start all daemons and wait until both nodes are idle.

        Raises:
            RuntimeError: a daemon ended or the nodes did not come up in time, with the ends of the logs.
        """
        # Job steps detach from slurmd: they become ours, so that `stop` finds what a broken job left behind.
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        self._await("munge's socket", lambda: (self.folder / "munge.socket").exists(), seconds)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._await("two idle nodes", self._all_idle, seconds)

    def run(self, *command: str, folder: Path | None = None, seconds: float = 30) -> str:
        """What a client command (``sbatch``, ``squeue``, ``scontrol``) prints, started in ``folder``.

        Raises:
            RuntimeError: it failed, with what it said.
        """
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of ``scontrol show job``: JobState, Restarts, ExitCode, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def log(self, daemon: str) -> str:
        """The whole log of ``munged``, ``slurmctld``, ``slurmd-127.0.0.1``, ..."""
        return (self.folder / f"{daemon}.log").read_text(errors="replace")

    def logs(self, lines: int = 40) -> str:
        """The ends of all daemons' logs."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts.append("\n".join([f"--- {path.name}", *self.log(path.stem).splitlines()[-lines:]]))
        return "\n".join(parts)

    def stop(self) -> list[str]:
        """Cancel the jobs, end the daemons and whatever they started; the commands that had to be killed."""
        try:
            self.run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
            time.sleep(1)
        except (RuntimeError, subprocess.TimeoutExpired, FileNotFoundError) as error:
            print(f"slurm: {error}", file=sys.stderr)
        for daemon in reversed(self._daemons):
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        return end_descendants()

    def _daemon(self, program: str, *arguments: str) -> None:
        path = find(program)
        if path is None:
            raise RuntimeError(f"{program} is not installed: apt-get install slurm-wlm munge")
        log = self.folder / f"{program}{f'-{arguments[-1]}' if '-N' in arguments else ''}.log"
        with log.open("ab") as output:
            # A session of its own: Ctrl-C ends the daemons through `stop`, in order. SIGTERM when we are killed.
            daemon = subprocess.Popen(
                [path, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=functools.partial(LIBC.prctl, PR_SET_PDEATHSIG, signal.SIGTERM),
            )  # fmt: skip
        self._daemons.append(daemon)

    def _all_idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        except RuntimeError:  # slurmctld is not listening yet
            return False
        return states == ["idle"] * len(NODES)

    def _await(self, what: str, ready: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            ended = [d.args[0] for d in self._daemons if d.poll() is not None]
            if ended or time.monotonic() > deadline:
                why = f"{ended[0]} ended" if ended else f"no {what} after {seconds:.0f} s"
                raise RuntimeError(f"{why}\n{self.logs()}")
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def end_descendants() -> list[str]:
    """Kill every process below this one; their command lines."""
    left = psutil.Process().children(recursive=True)
    named = []
    for process in left:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                named.append(" ".join(process.cmdline()) or process.name())
                process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)
    return named


def main() -> None:
    """Start, say how to use it, wait for Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    slurm = LocalSlurm(Path(sys.argv[1]).resolve())
    try:
        slurm.start()
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("slurm: ending")
    finally:
        for command in slurm.stop():
            print(f"slurm: had to kill {command}")


if __name__ == "__main__":
    main()
