"""VAEs whose latents are an image of their own, of fewer pixels: what convolutional architectures share."""

from vae_dist.config import GridConfig
from vae_dist.models.blocks import Network
from vae_dist.models.likelihoods import LikelihoodKind
from vae_dist.models.norms import norm_groups
from vae_dist.models.tensors import Shape
from vae_dist.models.vae import VAE


class GridVAE(VAE):
    """A VAE of images of any size that its factor divides: `(C, H, W)` to latents `(c, H / factor, W / factor)`."""

    remedy = "or fewer model.channels"  # which options make the factor smaller

    def __init__(self, options: GridConfig, image_shape: Shape, likelihood: LikelihoodKind, classes: int) -> None:
        super().__init__(image_shape, likelihood, classes)
        self.options = options
        self.factor = options.factor  # torch.compile does not follow the property of a subclass
        self.groups = norm_groups(options.channels[-1])  # of each GroupNorm at the latents' resolution

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        channels, height, width = image_shape
        if channels != self.image_shape[0]:
            raise ValueError(f"images for this model have channels={self.image_shape[0]}, not {channels}")
        factor = self.factor
        if height % factor or width % factor:
            raise ValueError(
                f"images of {height} x {width} can't be encoded: use sizes that {factor} divides, {self.remedy}"
            )
        rows, columns = height // factor, width // factor
        if rows * columns * self.options.channels[-1] <= self.groups:  # less its group's mean, each value would be 0
            raise ValueError(
                f"images of {height} x {width} can't be encoded: at {rows} x {columns} no group of a GroupNorm has "
                "more than one value, so all images would have the same code: use larger images, a larger last number "
                f"in model.channels, {self.remedy}"
            )
        return ((self.options.latent_channels, rows, columns),)

    def recompute_activations(self) -> None:
        for module in self.modules():
            if isinstance(module, Network):
                module.recomputes = True
