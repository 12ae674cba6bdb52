"""A trained VAE as an object: its data, records and pictures. N images, L latents, C, H, W image."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vae_dist.api import records
from vae_dist.api.data import Images, Split, load_images
from vae_dist.api.images import to_unit_images
from vae_dist.api.numbers import whole_number
from vae_dist.api.trained_model import TrainedModel
from vae_dist.errors import UserError
from vae_dist.runs.picture import Picture, with_caption
from vae_dist.runs.run import RunDirectory
from vae_dist.views import pictures


class Run(TrainedModel):
    """A trained VAE: what `vae_dist.load` and `vae_dist.fit` return.

    Images go in as PIL images, paths of files, arrays or tensors (see `encode`); they come out as tensors
    `(N, C, H, W)` float32 in [0, 1]. All tensors come out on the run's device. Batches are cut into chunks of
    `evaluate.batch_size` images. The methods draw no random numbers of torch's: the same seed gives the same result.

    A conditional model needs `labels`: names or numbers of its classes, one for all images or one for each.
    """

    def __repr__(self) -> str:
        data, latents = self.config.data.title, self.model.latent_dim
        return (
            f"<Run {str(self.directory)!r}, step {self.step}: {self.config.model.architecture} on {data}, "
            f"{latents} latent{'s' if latents > 1 else ''}, on {self.model.device}>"
        )

    # ---- Data and records

    def images(self, split: Split = "test", count: int | None = None) -> Images:
        """Return the first `count` images of a split, by default all test images: `images`, `labels` and `names`.

        They are those of `evaluate`; training images are not flipped, and binarised once. Raises UserError if there are
        none.

        >>> run.images(count=5).images.shape
        torch.Size([5, 1, 28, 28])
        """
        return load_images(self.config.data, split, count, self.model.device)

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

        Losses are in nats per image: `train/loss`, `validation/negative_elbo` and so on. Training losses of the recipe
        `autoencoder` are means per pixel value.
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
        subject = f"{self.config.name}, step {self.step}: {len(decoded)} image{'s' if len(decoded) > 1 else ''}"
        return with_caption(pictures.over_reconstructions(inputs.images.float().cpu(), decoded, subject))

    def show_codes(self, codes: Any, labels: Any = None) -> Image.Image:
        """Draw decoded codes, those that `decode` takes, with the codes below them."""
        return self._drawn("codes", codes=codes, labels=labels)

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

    def show_levels(self, **options: Any) -> Image.Image:
        """Draw test images decoded from the first levels of their latents. `options`: images."""
        return self._drawn("levels", **options)

    def show_scatter(self) -> Image.Image:
        """Plot the posterior means of the test images, by label."""
        return self._drawn("scatter")

    def show_curves(self, *names: str) -> Image.Image:
        """Plot metrics by step; by default the training loss and the negative ELBO of the validation images.

        Of the recipe `autoencoder`, by default the training loss and its reconstruction error.
        """
        return records.curves(RunDirectory(self.directory), names)

    def show_images(
        self, images: Any, columns: int | None = None, *, left: Sequence[object] = (), below: Sequence[object] = ()
    ) -> Image.Image:
        """Draw images of any kind that `encode` takes, such as those of `decode`, in rows of `columns`.

        `left` labels the rows, and `below` the images. Raises UserError unless there is a label for each of them.
        """
        unit = to_unit_images(images, self.model, self.config.data).cpu()
        columns = math.ceil(math.sqrt(len(unit))) if columns is None else whole_number("columns", columns)
        if len(left) == len(below) == 0:
            return pictures.grid(unit, columns)
        for name, labels, what, count in (
            ("left", left, "rows", -(-len(unit) // columns)),
            ("below", below, "images", len(unit)),
        ):
            if len(labels) not in (0, count):
                raise UserError(f"{name} has {len(labels)} labels for {count} {what}: give one for each")
        return pictures.labelled_grid(unit, columns, left=[*map(str, left)], below=[*map(str, below)])

    def _with_own(self, arguments: Sequence[str]) -> list[str]:
        moved = [f"data.{key}={path}" for key, path in self._moved().items()]
        own = [f"device={self.model.device.type}", f"weights={self.config.weights}"]
        return [*self._arguments, *moved, *own, *arguments]

    def _drawn(self, kind: str, **options: Any) -> Image.Image:
        made = self._view(kind, **options)
        return with_caption(Picture(made.view.draw(), made.caption))
