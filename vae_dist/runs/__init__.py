"""A run's directory: checkpoints, metrics, pictures, W&B records, and what is said in the terminal."""
