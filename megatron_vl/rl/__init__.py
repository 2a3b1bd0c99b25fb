"""Reinforcement learning: rollouts, rewards, PPO with a critic."""
