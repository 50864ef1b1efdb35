"""Floor 4: domains, their loss statistics, and how a run moves their weights; numpy only, no model."""
