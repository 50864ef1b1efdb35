"""Benchmarks: the trainer, the planner, and `prepare`."""
