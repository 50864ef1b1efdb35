"""What the model says to held-out samples, and how its answers are scored."""
