"""Floor 5: what a run records and how people look at it: metrics, progress, plots, report."""
