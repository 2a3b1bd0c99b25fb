"""`python -m tests.train.asleep RANK CONFIG ...`: `pretrain` whose RANK falls asleep in its third step, in Python."""

import sys
import time

from megatron_vl import __main__ as command
from megatron_vl.parallel.launch import launched, read_environment
from megatron_vl.train import pretrain


def fall_asleep(rank: int) -> None:
    """Make the third step of ``rank`` last for ever."""
    from megatron_vl.train import loop

    plain, steps = loop.train_step, [0]

    def train_step(*args):
        steps[0] += 1
        if steps[0] == 3 and read_environment().rank == rank:
            time.sleep(3600)
        return plain(*args)

    loop.train_step = train_step


if __name__ == "__main__":
    if launched():
        fall_asleep(int(sys.argv[1]))
    else:
        plain_run = pretrain.run_local

        def run_local(start, *rest):
            own = [sys.executable, "-m", "tests.train.asleep", sys.argv[1]]
            return plain_run([*own, *start[4:]], *rest)

        pretrain.run_local = run_local
    sys.exit(command.main(["pretrain", *sys.argv[2:]]))
