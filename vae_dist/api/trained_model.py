"""A trained VAE: its images and latents. N images, L latents, C, H, W image."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vae_dist.api.codes import option_text, to_codes
from vae_dist.api.images import to_images, to_labels
from vae_dist.api.numbers import whole_number
from vae_dist.config import Config, load_reader
from vae_dist.config.memory import require_memory
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.evaluation.metrics import importance_estimate
from vae_dist.models.inputs import Inputs, label_rows
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.plan import every_chunk
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.views.latents import TrainedVAE, prior_draws
from vae_dist.views.making import Made, make_view


class TrainedModel:
    """The part of a `Run` that computes: images and latents."""

    def __init__(
        self, checkpoint: Checkpoint, config: Config, device: torch.device, arguments: Sequence[str] = ()
    ) -> None:
        """Use `load`, which opens the checkpoint."""
        self._config = config
        self._folder = _working_directory()
        self._checkpoint = checkpoint.folder, checkpoint.folder.absolute()
        self._directory = checkpoint.run_dir, checkpoint.run_dir.absolute()
        self.step = checkpoint.step  # optimizer steps done
        self.model: VAE = checkpoint.load_vae(config, device)
        self._averaged = checkpoint.has_average
        self._arguments = tuple(arguments)

    @property
    def config(self) -> Config:
        """The run's config, with what `load` was given."""
        moved = self._moved()
        return replace(self._config, data=replace(self._config.data, **moved)) if moved else self._config

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint."""
        return _reachable(*self._checkpoint)

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return _reachable(*self._directory)

    def encode(self, images: Any, labels: Any = None) -> DiagonalGaussian:
        """Return the posteriors q(z|x) of images: `mean` and `log_variance`, `(N, L)` float32 each.

        `images` are one or a list of PIL images (converted to the model's channels), paths of image files (also cropped
        and resized, as for a training), arrays or tensors, uint8 or floats from 0 to 1: `(H, W)` grey, `(C, H, W)`,
        `(H, W, C)`, or N of these; on any device, and of any size that the network takes. A model of binary images gets
        them binarised as its test images are. Raises UserError for images that it can't take.

        >>> run.encode(torch.zeros(3, 28, 28)).mean.shape
        torch.Size([3, 2])
        """
        inputs = self._inputs(images, labels)
        with torch.no_grad():
            posteriors = [self.model.infer(*inputs.rows(chunk)) for chunk in self._chunks(len(inputs.images))]
            parts = [(posterior.mean, posterior.log_variance) for posterior in posteriors]
        return DiagonalGaussian(*(torch.cat(parameter).float() for parameter in zip(*parts, strict=True)))

    def decode(self, latents: Any, labels: Any = None, size: tuple[int, int] | None = None) -> Tensor:
        """Return the mean images of p(x|z) of latents: `(N, C, H, W)` float32 in [0, 1].

        `latents` are an array, a tensor or lists: one code or N, flat `(L,)` or in the shape of the network's latents.
        `size` is (H, W) of the images, by default the training's. Raises UserError for other shapes and for numbers
        that are not finite.

        >>> run.decode([[0, 0], [0, 1], [-1, -1]]).shape
        torch.Size([3, 1, 28, 28])
        """
        try:
            height, width = self.model.image_shape[1:] if size is None else size
        except (TypeError, ValueError) as error:
            raise UserError(f"size={size}: give the height and the width of the images, such as (64, 64)") from error
        shape = (self.model.image_shape[0], whole_number("size[0]", height), whole_number("size[1]", width))
        codes = to_codes(latents, self.model, shape)
        given = self._labels(labels, len(codes))
        with torch.no_grad():
            parts = [
                self.model.decode(codes[chunk.start : chunk.stop], shape, label_rows(given, chunk)).mean.float()
                for chunk in self._chunks(len(codes))
            ]
        return torch.cat(parts)

    def reconstruct(self, images: Any, labels: Any = None) -> Tensor:
        """Return images decoded from the means of their posteriors: `(N, C, H, W)` float32 in [0, 1]."""
        inputs = self._inputs(images, labels)
        means = self.encode(inputs.images, labels).mean
        return self.decode(means, inputs.labels, (inputs.images.shape[2], inputs.images.shape[3]))

    def prior(self, count: int, seed: int = 0) -> Tensor:
        """Draw codes from the prior p(z): `(count, L)` float32. The first ones are the same for every count."""
        rows = range(whole_number("count", count))
        require_memory(f"the latents of count={count}", 4 * len(rows) * self.model.latent_dim)
        return prior_draws(self.model, whole_number("seed", seed, 0), rows).to(self.model.device, copy=True)

    def sample(
        self, count: int = 16, seed: int = 0, *, labels: Any = None, sampler: Literal["prior", "mixture"] = "prior"
    ) -> Tensor:
        """Draw images `(count, C, H, W)` float32 in [0, 1]: the means of p(x|z) of codes drawn from the prior.

        They are those of `vae-dist sample` with this `sample.seed`. `labels` are classes, drawn in turn; by default
        all of a conditional model. `sampler="mixture"` draws codes from Gaussians that are fitted to the posteriors of
        the training images, for which it loads them.

        >>> run.sample(4, seed=1).shape
        torch.Size([4, 1, 28, 28])
        """
        made = self._view("prior", count=count, seed=seed, labels=labels, sampler=sampler, pixels="mean")
        return made.view.tensors["images"].to(self.model.device)

    def log_likelihood(self, images: Any, samples: int = 128, labels: Any = None) -> Tensor:
        """Estimate log p(x) of images: `(N,)` float64, nats; log p(x|y) of a conditional model.

        The estimate is the log of the mean importance weight of `samples` draws from each image's posterior, on average
        a lower bound (Burda et al. 2016). It is what `evaluate` reports, with the sign of a log-likelihood. Of a
        likelihood that is not of the pixels' kind, such as a Bernoulli of grey pixels, it is no probability: see
        `evaluate()["warning"]`.

        >>> run.log_likelihood(torch.zeros(2, 28, 28), samples=8).dtype
        torch.float64
        """
        samples = whole_number("samples", samples)
        inputs = self._inputs(images, labels)
        at_once = self.config.evaluate.draws_at_once(self.model.image_shape)
        with torch.no_grad():
            estimates = [
                importance_estimate(self.model, inputs.rows(chunk), chunk, samples, at_once)
                for chunk in self._chunks(len(inputs.images))
            ]
        return -torch.cat(estimates).to(self.model.device)

    def _moved(self) -> dict[str, Any]:
        """Return the paths of the data by key, absolute, if the working directory is another one by now."""
        if self._folder is None or self._folder == _working_directory():
            return {}
        given = {key: getattr(self._config.data, key) for key in ("root", "path", "pack_dir")}
        return {key: str(self._folder / path) for key, path in given.items() if path and not path.startswith("~")}

    def _inputs(self, images: Any, labels: Any) -> Inputs:
        converted = to_images(images, self.model, self.config.data)
        return Inputs(converted, self._labels(labels, len(converted)))

    def _labels(self, labels: Any, count: int) -> Tensor | None:
        return to_labels(labels, count, self.model, self.config.data.classes or ())

    def _chunks(self, count: int) -> list[range]:
        return every_chunk(count, self.config.evaluate.images_at_once(self.model.image_shape))

    def _view(self, kind: str, **options: Any) -> Made:
        given = {"kind": kind, **{key: value for key, value in options.items() if value is not None}}
        if "codes" in given:
            given["codes"] = to_codes(given["codes"], self.model, self.model.image_shape)
        arguments = [f"sample.{key}={option_text(key, value)}" for key, value in given.items()]
        config = load_reader(self.config, arguments)
        trained = TrainedVAE(self.model, config, World.alone(self.model.device))
        return make_view(trained, arguments, self.step, averaged=self._averaged)


def _working_directory() -> Path | None:
    """Return the working directory; None if it has been deleted."""
    try:
        return Path.cwd()
    except OSError:
        return None


def _reachable(path: Path, absolute: Path) -> Path:
    """Return a path as it was given, or absolute if the working directory is another one by now."""
    return path if path.absolute() == absolute else absolute
