"""Floor 3: domains, their loss statistics and the rules that move their weights; numpy only, no model."""
