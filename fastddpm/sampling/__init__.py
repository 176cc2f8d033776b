"""Sampling: the loop, the engine that runs its steps, and jobs that draw many samples into a folder."""
