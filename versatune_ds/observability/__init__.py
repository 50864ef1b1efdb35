"""Floor 6: what a run writes down: metrics, progress, throughput."""
