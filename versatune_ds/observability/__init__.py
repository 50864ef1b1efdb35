"""Floor 6: what a run records and how people look at it: metrics, progress, plots, report."""
