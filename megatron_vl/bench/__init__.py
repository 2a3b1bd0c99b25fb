"""Measurements: each module is one subcommand of `tools/benchmark_throughput.py`."""
