"""Pictures of images and of the latent space."""
