"""A trained VAE as an object. N images, L latents, C, H, W image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vae_dist.api import records
from vae_dist.api.codes import option_text, to_codes
from vae_dist.api.images import to_images, to_labels
from vae_dist.config import Config, load_reader
from vae_dist.distributed.world import World, every_chunk
from vae_dist.errors import UserError
from vae_dist.evaluation.metrics import importance_estimate
from vae_dist.models.inputs import Inputs, label_rows
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.picture import Picture, with_caption
from vae_dist.runs.run import RunDirectory
from vae_dist.views import pictures
from vae_dist.views.latents import TrainedVAE, prior_draws
from vae_dist.views.making import Made, make_view


class Run:
    """A trained VAE: what `vae_dist.load` and `vae_dist.fit` return.

    Images go in as PIL images, paths of files, arrays or tensors (see `encode`); they come out as tensors
    `(N, C, H, W)` float32 in [0, 1]. All tensors come out on the run's device. Batches are cut into chunks of
    `evaluate.batch_size` images. The methods draw no random numbers of torch's: the same seed gives the same result.

    A conditional model needs `labels`: names or numbers of its classes, one for all images or one for each.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: Config, device: str | torch.device, arguments: Sequence[str] = ()
    ) -> None:
        """Use `load`, which opens the checkpoint."""
        self.config = config  # the run's, with what `load` was given
        self.checkpoint = checkpoint.folder
        self.directory = checkpoint.run_dir
        self.step = checkpoint.step  # optimizer steps done
        self.model: VAE = checkpoint.load_vae(config, torch.device(device))
        self._averaged = checkpoint.has_average
        self._arguments = tuple(arguments)

    def __repr__(self) -> str:
        data, latents = self.config.data.title, self.model.latent_dim
        return (
            f"<Run {str(self.directory)!r}, step {self.step}: {self.config.model.architecture} on {data}, "
            f"{latents} latent{'s' if latents > 1 else ''}, on {self.model.device}>"
        )

    # ---- Images and latents

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
            parts = [self.model.infer(*inputs.rows(chunk)) for chunk in self._chunks(len(inputs.images))]
        return DiagonalGaussian(*(torch.cat(parameter).float() for parameter in zip(*parts, strict=True)))

    def decode(self, latents: Any, labels: Any = None, size: tuple[int, int] | None = None) -> Tensor:
        """Return the mean images of p(x|z) of latents: `(N, C, H, W)` float32 in [0, 1].

        `latents` are an array, a tensor or lists: one code or N, flat `(L,)` or in the shape of the network's latents.
        `size` is (H, W) of the images, by default the training's. Raises UserError for other shapes and for numbers
        that are not finite.

        >>> run.decode([[0, 0], [0, 1], [-1, -1]]).shape
        torch.Size([3, 1, 28, 28])
        """
        shape = (self.model.image_shape[0], *(size or self.model.image_shape[1:]))
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
        return prior_draws(self.model, seed, count).to(self.model.device, copy=True)

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
        if samples < 1:
            raise UserError(f"samples={samples}: at least one sample of each image is needed")
        inputs = self._inputs(images, labels)
        at_once = self.config.evaluate.chunk
        with torch.no_grad():
            estimates = [
                importance_estimate(self.model, inputs.rows(chunk), chunk, samples, at_once)
                for chunk in self._chunks(len(inputs.images))
            ]
        return -torch.cat(estimates).to(self.model.device)

    # ---- Records

    def evaluate(self, *arguments: str) -> dict[str, Any]:
        """Evaluate the checkpoint on the test images, as `vae-dist eval`, and return the content of `evaluation.json`.

        `arguments` are `key=value`, such as `evaluate.split=validation` or `evaluate.folder=PICTURES`. Writes to the
        run's directory, or to `output=FOLDER`. Raises UserError as the command does.
        """
        from vae_dist.evaluation.evaluate import evaluate

        return evaluate(self.checkpoint, self._with_own(arguments))

    def export(self, *arguments: str) -> Path:
        """Export the checkpoint, as `vae-dist export` with these `key=value`, and return the folder."""
        from vae_dist.publishing.export import export

        return export(self.checkpoint, self._with_own(arguments))

    def push(self, repository: str, *arguments: str) -> str:
        """Export the checkpoint to `USER/NAME` of the Hugging Face Hub, and return its name for `load`."""
        self.export(f"export.push={repository}", *arguments)
        return f"hf://{repository}"

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The content of the newest `evaluation.json`; None if there is none."""
        newest = RunDirectory(self.directory).evaluation
        return None if newest is None else newest.values

    def metrics(self) -> Any:
        """Return the logged metrics by step: a pandas DataFrame, or without pandas a list of dictionaries.

        Losses are in nats per image: `train/loss`, `validation/negative_elbo` and so on.
        """
        return records.table(RunDirectory(self.directory).metrics)

    # ---- Pictures. A notebook shows the last value of a cell.

    def show_samples(self, count: int = 64, seed: int = 0, **options: Any) -> Image.Image:
        """Draw samples in a grid. `options` are those of `sample`, and `pixels="draw"` draws the pixels too."""
        return self._drawn("prior", count=count, seed=seed, **{"sampler": "prior", **options})

    def show_reconstructions(self, images: Any = None, labels: Any = None) -> Image.Image:
        """Draw rows of images over their reconstructions; by default test images, with draws from their posteriors."""
        if images is None:
            return self._drawn("reconstruction")
        inputs = self._inputs(images, labels)
        decoded = self.reconstruct(images, labels).cpu()
        subject = f"{self.config.name}, step {self.step}: {len(decoded)} images"
        return with_caption(pictures.over_reconstructions(inputs.images.float().cpu(), decoded, subject))

    def show_codes(self, codes: Any, labels: Any = None) -> Image.Image:
        """Draw decoded codes `(N, L)` with the codes below them."""
        return self._drawn("codes", codes=torch.as_tensor(codes).tolist(), labels=labels)

    def show_traversal(self, **options: Any) -> Image.Image:
        """Draw a row for each latent, from -3 to 3. `options` are those of `sample`: rows, steps, codes, images."""
        return self._drawn("traversal", **options)

    def show_neighbours(self, **options: Any) -> Image.Image:
        """Draw a ball around a code. `options`: codes, images, radius, rows, steps, seed."""
        return self._drawn("neighbours", **options)

    def show_interpolation(self, **options: Any) -> Image.Image:
        """Draw straight lines between the codes of test images. `options`: images, steps."""
        return self._drawn("interpolation", **options)

    def show_manifold(self, **options: Any) -> Image.Image:
        """Draw a plane of the latent space. `options`: steps, the images on a side."""
        return self._drawn("manifold", **options)

    def show_scatter(self) -> Image.Image:
        """Plot the posterior means of the test images, by label."""
        return self._drawn("scatter")

    def show_curves(self, *names: str) -> Image.Image:
        """Plot metrics by step; by default the training loss and the negative ELBO of the validation images."""
        return records.curves(RunDirectory(self.directory), names)

    # ----

    def _with_own(self, arguments: Sequence[str]) -> list[str]:
        return [*self._arguments, f"device={self.model.device.type}", f"weights={self.config.weights}", *arguments]

    def _inputs(self, images: Any, labels: Any) -> Inputs:
        converted = to_images(images, self.model, self.config.data)
        return Inputs(converted, self._labels(labels, len(converted)))

    def _labels(self, labels: Any, count: int) -> Tensor | None:
        return to_labels(labels, count, self.model, self.config.data.classes or ())

    def _chunks(self, count: int) -> list[range]:
        return every_chunk(count, self.config.evaluate.batch_size)

    def _view(self, kind: str, **options: Any) -> Made:
        given = {"kind": kind, **{key: value for key, value in options.items() if value is not None}}
        arguments = [f"sample.{key}={option_text(key, value)}" for key, value in given.items()]
        config = load_reader(self.config, arguments)
        trained = TrainedVAE(self.model, config, World.alone(self.model.device))
        return make_view(trained, arguments, self.step, averaged=self._averaged)

    def _drawn(self, kind: str, **options: Any) -> Image.Image:
        made = self._view(kind, **options)
        return with_caption(Picture(made.view.draw(), made.caption))
