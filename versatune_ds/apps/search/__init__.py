"""Floor 9: `versatune-ds search`, a good fixed mixture before the run."""
