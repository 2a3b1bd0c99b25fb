#!/usr/bin/env python3
"""Ranks the legal layouts of a run by predicted step time, says what does not fit and why, prints the best as YAML.

    plan_parallelism.py examples/pretrain/step3_vl_10b.yaml --gpu H100 --gpus 512
    plan_parallelism.py RUN.yaml --gpu H200 --gpus 64 data.seq_length=131072 --visual-share 0.1 --top 20
    plan_parallelism.py RUN.yaml --gpu CPU --gpus 4 --measure 5      then tries the first five here, ranks them anew

Without `--measure` nothing is started and no GPU is needed. `--calibrate FILE` puts measured rates in place of the
nominal ones (docs/parallelism.md). Exit code: 0; 1 when nothing fits, or no trial came to its end; 2 for a mistake in
what was asked.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from megatron_vl.bench.measured import main  # noqa: E402
from megatron_vl.errors import MegatronVLError  # noqa: E402

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], [sys.executable, str(HERE / "benchmark_throughput.py")]))
    except MegatronVLError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
