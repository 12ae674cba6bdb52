"""The latents of a data set in files: shards, their index, statistics."""
