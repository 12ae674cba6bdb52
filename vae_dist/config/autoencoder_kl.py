"""Options of diffusers' AutoencoderKL."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from vae_dist.config.fields import option
from vae_dist.config.networks import ATTENTION, CHANNELS, AttentionConfig, ModelConfig
from vae_dist.errors import UserError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class AutoencoderKLConfig(AttentionConfig):
    SIZES: ClassVar[Sequence[str]] = (
        "channels", "blocks", "latent_channels", "norm_groups", "attention", "mid_attention", "quant_conv",
    )  # fmt: skip  # those that the folder in init_from decides
    architecture: str = "autoencoder_kl"
    channels: list[int] = option(
        [128, 256, 512, 512],
        f"{CHANNELS} (diffusers' block_out_channels)",
        at_least=1,
        at_most=2**16,
    )
    blocks: int = option(
        2, "residual blocks at each resolution, one more in the decoder (layers_per_block)", at_least=1, at_most=2**10
    )
    latent_channels: int = option(4, "channels of the latents", at_least=1, at_most=2**16)
    norm_groups: int = option(32, "groups of each GroupNorm (norm_num_groups)", at_least=1)
    attention: list[int] = option(
        [], f"{ATTENTION} (AttnDownEncoderBlock2D, AttnUpDecoderBlock2D)", at_least=1, at_most=2**16
    )
    mid_attention: bool = option(
        True,
        "attention between the two blocks in the middle, at the lowest resolution of encoder and decoder "
        "(mid_block_add_attention)",
    )
    quant_conv: bool = option(
        True,
        "1x1 convolutions between the encoder and the latents, and between these and the decoder (use_quant_conv, "
        "use_post_quant_conv)",
    )
    init_from: str | None = option(
        None,
        "folder of a diffusers AutoencoderKL whose weights the run starts from; its sizes become the model's; null: "
        "random weights",
    )
    init_sha256: str | None = option(
        None, "sha256 of the weights' file in model.init_from; null: found when the run starts"
    )

    def resumed(self, stored: ModelConfig) -> ModelConfig:
        if not isinstance(stored, AutoencoderKLConfig) or self.init_from is None or stored.init_from != self.init_from:
            return self
        usual = AutoencoderKLConfig()
        resolved = [key for key in (*self.SIZES, "init_sha256") if getattr(self, key) == getattr(usual, key)]
        return replace(self, **{key: getattr(stored, key) for key in resolved})

    def check(self) -> None:
        super().check()
        if self.init_from is None or self.init_sha256 is not None:  # a folder's sizes are checked when it has been read
            self.check_attention()
            if bad := [size for size in self.channels if size % self.norm_groups]:
                raise UserError(
                    f"model.norm_groups={self.norm_groups} does not divide {bad[0]} of model.channels: use a number "
                    "that divides all of them"
                )
        if self.init_sha256 is not None and (self.init_from is None or not _SHA256.fullmatch(self.init_sha256)):
            raise UserError("model.init_sha256 is the sha256 of weights in model.init_from: 64 digits of 0-9 and a-f")
