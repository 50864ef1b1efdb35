"""What held-out probes of a run tell, sample by sample: which domains are overfitted, and where tokens help."""
