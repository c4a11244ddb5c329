"""The loss becomes weights: steps, schedules, checkpoints and the loop of a run."""
