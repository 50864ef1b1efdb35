"""Floor 5: from raw files to packed batches: readers, schemas, templates, cache, planner, loader."""
