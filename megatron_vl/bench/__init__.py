"""Measurements: subcommands of `tools/benchmark_throughput.py`, and the trials of `tools/plan_parallelism.py`."""
