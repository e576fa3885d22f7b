"""Fast-weight language models: states, layers, checkpoints, generation. Knows nothing of training or HTTP."""
