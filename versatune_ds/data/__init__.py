"""Floor 5: from raw files to packed batches: rows, encode, cache, plan, then collate and loader."""
