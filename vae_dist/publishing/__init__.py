"""Publishing a trained VAE: a folder for inference, programs that need no vae_dist, a model card, and the Hub."""
