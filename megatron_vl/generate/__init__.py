"""Sampling from the training model itself: prompts, batches, KV cache, random numbers, rollouts."""
