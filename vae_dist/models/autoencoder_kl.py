"""The KL autoencoder of latent diffusion models (Rombach et al. 2022): the networks of diffusers' AutoencoderKL.

The networks, and the names of their weights, are diffusers' own, so that a model goes to diffusers and comes from it
without a conversion: see `diffusers_files.py`. B batch, C, H, W image, c, h, w latents.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vae_dist.config import AutoencoderKLConfig
from vae_dist.errors import UserError
from vae_dist.models.blocks import Upsample
from vae_dist.models.grid import GridVAE
from vae_dist.models.likelihoods import LikelihoodKind, LocationScaleKind
from vae_dist.models.norms import with_own_norms
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.priors import build_prior
from vae_dist.models.tensors import Shape, at_least_float32, in_gpu_order, traced_on_gpu

LOG_VARIANCES = -30.0, 20.0  # between which diffusers' DiagonalGaussianDistribution clamps them
MOST_TOKENS = 64 * 64  # whose weights, of all pairs, are 64 MiB in fp32
# diffusers' blocks of a resolution, without attention and with it.
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
ATTENDING_DOWN, ATTENDING_UP = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"


class AutoencoderKLVAE(GridVAE):
    """A VAE of images of any size that 2^(number of channels - 1) divides.

    Images are in [0, 1] outside and in [-1, 1] inside. Training and evaluation mode differ in memory formats, and so by
    rounding. Bitwise equal to diffusers is evaluation mode, in which a model is loaded.
    """

    options: AutoencoderKLConfig

    def __init__(
        self, options: AutoencoderKLConfig, image_shape: Shape, likelihood: LikelihoodKind, classes: int = 0
    ) -> None:
        """Raises ValueError for a conditional model, and for a likelihood that has no location in [0, 1]."""
        super().__init__(options, image_shape, likelihood, classes)
        self.groups = options.norm_groups
        if classes:
            raise ValueError("its networks take no labels; use model.conditional=false")
        if not isinstance(likelihood, LocationScaleKind) or likelihood.output_shape(image_shape) != image_shape:
            raise ValueError(
                f"its decoder gives a location for each pixel, which {likelihood.name} has not; use "
                "objective.reconstruction=laplace or gaussian"
            )
        latents = self.latent_dim  # refuses sizes before anything is built
        network: Any = with_own_norms(make_network(network_options(options, image_shape[0])))
        for module in network.modules():
            if getattr(module, "conv_shortcut", None) is not None:  # before which diffusers orders C, H, W
                module.conv_shortcut.register_forward_pre_hook(_in_gpu_order)
        for block in (*network.encoder.down_blocks, *network.decoder.up_blocks):
            for attention in _attentions(block):
                attention.register_forward_hook(_in_order)
        for module in network.modules():
            for attention in _attentions(module):
                if attention.heads == 1:
                    attention.set_processor(OneWideHead(attention.processor))
        self.encoder = Encoder(network)
        self.decoder = Decoder(network)
        self.p_z = build_prior(latents, options)

    def recompute_activations(self) -> None:
        networks: list[Any] = [self.encoder.encoder, self.decoder.decoder]
        for network in networks:
            network.gradient_checkpointing = True
            network._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    def posterior(self, parameters: Tensor) -> DiagonalGaussian:
        # Another bound would make another posterior of the same weights.
        return DiagonalGaussian.from_network(parameters, lambda raw: raw.clamp(*LOG_VARIANCES))


build = AutoencoderKLVAE


class Encoder(nn.Module):
    """Images `(B, C, H, W)` in [0, 1] to the moments of diffusers' posterior `(B, 2 c, h, w)`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.quant_conv = network.quant_conv
        self.encoder.mid_block.register_forward_hook(_in_order)

    def forward(self, images: Tensor) -> Tensor:
        moments: Tensor = self.encoder(2 * images - 1)
        return moments if self.quant_conv is None else self.quant_conv(moments)


class Decoder(nn.Module):
    """Latents `(B, c, h, w)` to the likelihood's locations `(B, C, H, W)`, of which images lie in [0, 1].

    They are not clamped, so that a location outside has a gradient; the likelihood clamps the means that it shows.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.post_quant_conv = network.post_quant_conv
        self.decoder = network.decoder
        self.decoder.mid_block.register_forward_hook(_in_order)
        for block in self.decoder.up_blocks:
            if block.upsamplers is not None:
                block.upsamplers = nn.ModuleList([ConvolvedUpsample(layer.conv) for layer in block.upsamplers])

    def forward(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))
        return (at_least_float32(decoded) + 1) / 2


def _attentions(block: Any) -> list[Any]:
    """Return the attentions of one of diffusers' blocks."""
    return [attention for attention in getattr(block, "attentions", ()) if attention is not None]


def _in_order(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Return attention's output in C, H, W order in training, where convolutions in its own order take longer."""
    return output.contiguous() if module.training and not traced_on_gpu(output) else output


def _in_gpu_order(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (in_gpu_order(inputs[0]),)


class ConvolvedUpsample(Upsample):
    """Repeats pixels and convolves them: `(B, c, h, w)` to `(B, c, 2 h, 2 w)`.

    It is diffusers' Upsample2D without its branches by the size of a batch, which a traced program can't have.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: None = None) -> Tensor:
        upsampled: Tensor = self.conv(super().forward(x))
        return upsampled


class OneWideHead:
    """Computes an attention of one head in matrix products where a compiler traces for a GPU; elsewhere diffusers does.

    Its 512 channels are too many for the fast kernels of attention. The one that is left took 7% of a step of kl-f8,
    but does not keep the weights of all pairs of pixels: many pixels are left to it.
    """

    def __init__(self, theirs: Callable[..., Tensor]) -> None:
        self._theirs = theirs

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The names of the arguments are those by which diffusers gives them."""
        if not traced_on_gpu(hidden_states) or hidden_states.shape[2:].numel() > MOST_TOKENS:
            return self._theirs(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return attended(attn, hidden_states)


def attended(attention: Any, x: Tensor) -> Tensor:
    """Return what diffusers' attention of one head makes of `(B, c, h, w)`. Logits and weights are fp32 at least."""
    tokens = attention.group_norm(x).flatten(2).transpose(1, 2)  # (B, h w, c)
    query, key, value = attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens)
    with torch.autocast(x.device.type, enabled=False):
        logits = at_least_float32(query) @ at_least_float32(key).transpose(1, 2)
        weights = torch.softmax(logits * query.shape[2] ** -0.5, 2)
        mixed = weights.to(value.dtype) @ value
    output = attention.to_out[0](mixed).transpose(1, 2).unflatten(2, x.shape[2:])
    result: Tensor = (x + output) / attention.rescale_output_factor
    return result


def network_options(options: AutoencoderKLConfig, channels: int) -> dict[str, Any]:
    """Return the options by which diffusers builds the network for images of so many channels."""
    levels = options.attention_levels
    return {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": tuple(ATTENDING_DOWN if attends else DOWN for attends in levels),
        "up_block_types": tuple(ATTENDING_UP if attends else UP for attends in reversed(levels)),
        "block_out_channels": tuple(options.channels),
        "layers_per_block": options.blocks,
        "latent_channels": options.latent_channels,
        "norm_num_groups": options.norm_groups,
        "mid_block_add_attention": options.mid_attention,
        "use_quant_conv": options.quant_conv,
        "use_post_quant_conv": options.quant_conv,
    }


def make_network(options: dict[str, Any]) -> nn.Module:
    """Return diffusers' AutoencoderKL. Raises UserError if diffusers is not installed."""
    network: nn.Module = network_class()(**options)
    return network


def network_class() -> Any:
    """Return the class AutoencoderKL. Raises UserError if diffusers is not installed."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            "model.architecture=autoencoder_kl needs the library of the extra `diffusers`: pip install diffusers"
        ) from error
    return AutoencoderKL


def diffusers_state(vae: AutoencoderKLVAE) -> dict[str, Tensor]:
    """Return the weights under diffusers' names: those of the two networks without their first part."""
    states = vae.encoder.state_dict(), vae.decoder.state_dict()
    return {name: tensor for state in states for name, tensor in state.items()}


@torch.no_grad()
def load_diffusers_state(vae: AutoencoderKLVAE, state: dict[str, Tensor]) -> None:
    """Copy weights under diffusers' names, whose names and shapes must be those of `diffusers_state`."""
    for name, tensor in diffusers_state(vae).items():
        tensor.copy_(state[name])
