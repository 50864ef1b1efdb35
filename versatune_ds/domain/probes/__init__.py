"""What held-out probes of a run tell, sample by sample: who is overfitted, and whose tokens help."""
