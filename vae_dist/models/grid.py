"""VAEs whose latents are an image of their own, of fewer pixels: what convolutional architectures share."""

from vae_dist.models.blocks import Network
from vae_dist.models.likelihoods import LikelihoodKind
from vae_dist.models.tensors import Shape
from vae_dist.models.vae import VAE


class GridVAE(VAE):
    """A VAE of images of any size that its factor divides: `(C, H, W)` to latents `(c, H / factor, W / factor)`.

    Its encoder and its decoder are each a `Network`.
    """

    encoder: Network
    decoder: Network

    def __init__(
        self,
        image_shape: Shape,
        likelihood: LikelihoodKind,
        classes: int,
        *,
        factor: int,
        latent_channels: int,
        remedy: str,
    ) -> None:
        """`remedy` says which options make the factor smaller."""
        super().__init__(image_shape, likelihood, classes)
        self._factor = factor
        self._latent_channels = latent_channels
        self._remedy = remedy

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        channels, height, width = image_shape
        if channels != self.image_shape[0]:
            raise ValueError(f"images for this model have channels={self.image_shape[0]}, not {channels}")
        factor = self._factor
        if height % factor or width % factor:
            raise ValueError(
                f"images of {height} x {width} can't be encoded: use sizes that {factor} divides, {self._remedy}"
            )
        return ((self._latent_channels, height // factor, width // factor),)

    def recompute_activations(self) -> None:
        self.encoder.recomputes = self.decoder.recomputes = True
