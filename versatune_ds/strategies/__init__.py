"""Floor 2: how domain weights may move: points of the simplex, and a rule for each strategy; numpy only."""
