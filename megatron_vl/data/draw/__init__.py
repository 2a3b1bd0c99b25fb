"""Pictures of what the model sees: one sample, or one row with its owners."""
