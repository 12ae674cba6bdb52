"""The Python API: a trained VAE as an object. `vae_dist` exports what is public here."""
