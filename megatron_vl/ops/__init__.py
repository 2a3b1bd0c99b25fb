"""Element-wise and fused operations, each with its PyTorch form."""
