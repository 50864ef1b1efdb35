"""Floor 9: one short file per verb of the `versatune-ds` command."""
