"""What a run would need: memory, time and disk, from formulas."""
