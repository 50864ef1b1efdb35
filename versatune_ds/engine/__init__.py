"""Floor 7: what a training run needs; `backend` alone knows DeepSpeed."""
