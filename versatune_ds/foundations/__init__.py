"""Floor 1: constants, errors, logging, process groups and atomic files; knows nothing of training."""
