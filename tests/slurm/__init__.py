"""Batch files: what they start, and one of them on a real Slurm."""
