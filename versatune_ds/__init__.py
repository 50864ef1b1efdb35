"""versatune_ds: supervised fine-tuning on many domains, with live domain weights (arXiv 2411.11266)."""

__version__ = "0.1.0"
