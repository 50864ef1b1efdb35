"""Held-out losses and public benchmarks of a model, compared with another."""
