"""`versatune-ds evidence`: is it right on this machine, how fast, and against what; in minutes."""
