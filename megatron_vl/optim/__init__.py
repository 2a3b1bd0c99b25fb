"""Optimizer, parameter groups, learning rate by tokens."""
