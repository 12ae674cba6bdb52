"""The options of each architecture, by name.

A new architecture is a dataclass and an entry of ARCHITECTURES here, and a file of its name in `vae_dist/models/`.
"""

from vae_dist.config.autoencoder_kl import AutoencoderKLConfig
from vae_dist.config.networks import ConvConfig, LadderConfig, MLPConfig, ModelConfig, ResNetConfig

ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "mlp": MLPConfig,
    "conv": ConvConfig,
    "ladder": LadderConfig,
    "resnet": ResNetConfig,
    "autoencoder_kl": AutoencoderKLConfig,
}
