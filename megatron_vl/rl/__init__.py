"""PPO with a critic: trajectories to rows, advantages, losses, updates."""
