"""The model: any causal LM of transformers that takes packs and gives its loss."""
