"""Floor 10: one short file per verb of the `versatune-ds` command."""
