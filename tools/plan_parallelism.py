#!/usr/bin/env python3
"""Ranks the legal layouts of a run by predicted step time, says what does not fit and why, prints the best as YAML.

    plan_parallelism.py examples/pretrain/step3_vl_10b.yaml --gpu H100 --gpus 512
    plan_parallelism.py RUN.yaml --gpu H200 --gpus 64 data.seq_length=131072 --visual-share 0.1 --top 20

Nothing is started and no GPU is needed. `--calibrate FILE` puts measured rates in place of the nominal ones
(docs/parallelism.md). Exit code: 0, 1 when nothing fits, 2 for a mistake in what was asked.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_vl.errors import MegatronVLError  # noqa: E402
from megatron_vl.plan.plan_command import search_main  # noqa: E402

if __name__ == "__main__":
    try:
        sys.exit(search_main(sys.argv[1:]))
    except MegatronVLError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
