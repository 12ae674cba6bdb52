"""Images of a source, and their labels, as the inputs of a model. n images, C, H, W image."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vae_dist.data.source import Source, as_indices, read
from vae_dist.errors import UserError
from vae_dist.models.labels import require_in_range
from vae_dist.models.tensors import ShapeError
from vae_dist.models.vae import VAE, Inference
from vae_dist.plan import FIXED_SEED, Stream, standard_normal

Indices = range | Sequence[int] | Tensor


class Inputs(NamedTuple):
    """The arguments of `VAE.infer`."""

    images: Tensor  # (n, C, H, W) in [0, 1], on the model's device and of its dtype
    labels: Tensor | None  # (n,) int64, on its device; None if the model is not conditional

    def rows(self, chunk: range) -> "Inputs":
        """Return those of some of the images."""
        return Inputs(self.images[chunk.start : chunk.stop], label_rows(self.labels, chunk))


def label_rows(labels: Tensor | None, chunk: range) -> Tensor | None:
    """Return the labels of some of the images; None if there are no labels."""
    return None if labels is None else labels[chunk.start : chunk.stop]


def read_inputs(vae: VAE, source: Source, indices: Indices) -> Inputs:
    """Read images without augmentation, and their labels if the model is conditional."""
    return Inputs(vae.to_input(read(source, indices)), read_labels(vae, source, indices))


def read_labels(vae: VAE, source: Source, indices: Indices) -> Tensor | None:
    """Read the labels of images `(n,)`; None if the model is not conditional.

    Raises UserError if the images have no labels, or other classes than the model.
    """
    if not vae.classes:
        return None
    labels = source.labels(as_indices(indices))
    if labels is None:
        raise UserError(f"this model is conditional and needs labels, but the images of {source.info.name} have none")
    try:
        require_in_range(labels, vae.classes)
    except ShapeError as error:
        raise UserError(f"the images of {source.info.name} do not fit the model: {error}") from error
    return labels.to(vae.device)


def one_draw(vae: VAE, inputs: Inputs, indices: range) -> Inference:
    """Infer images with these indices, with one draw each.

    The noise belongs to an image's index, not to the run: an image meets the same noise in every evaluation.
    """
    noise = standard_normal(FIXED_SEED, Stream.EVALUATION, 0, indices, vae.latent_dim).to(vae.device, vae.dtype)
    inference: Inference = vae(inputs.images, noise.unsqueeze(0), inputs.labels)
    return inference
