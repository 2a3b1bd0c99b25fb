"""Tests of megatron_vl/data/curate."""
