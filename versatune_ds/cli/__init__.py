"""Floor 8: one short file per verb of the `versatune-ds` command."""
