"""Weights in and out: the name table, Hugging Face checkpoints, saved runs."""
