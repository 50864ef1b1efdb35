"""Checkpoints: when, how and where, and the export."""
