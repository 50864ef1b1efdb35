"""Floor 7: the only floor that knows DeepSpeed and transformers models: model, loop, checkpoints, export."""
