"""Which samples a step trains on, and in which packs."""
