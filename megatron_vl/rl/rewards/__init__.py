"""Rewards: what a response is worth, decided by verifiers that say when they cannot tell (docs/rewards.md).

`task.py` says what is asked, `score.py` gives the verdict (`verdict.py`), `compose.py` makes a reward of it and
`tally.py` counts an iteration and stops the run when too many verdicts are missing.
"""
