"""A run's directory: checkpoints, metrics, pictures and W&B records."""
