"""What follows from a configuration, as pure functions: layout, stages, sharing of views, cost. No torch."""
