"""Settings of other trainers as ours (`versatune-ds import-config`)."""
