"""One step, one loop, and what stands around them."""
