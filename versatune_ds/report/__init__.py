"""Floor 8: the reading half of observability: recorded runs as tables, figures and pages."""
