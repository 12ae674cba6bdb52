"""A run's directory: checkpoints, metrics, pictures, W&B records, and the terminal's output."""
