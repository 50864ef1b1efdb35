"""The reading half of observability: recorded runs as tables, figures and pages."""
