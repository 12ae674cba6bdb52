"""Views that start from test images: their posteriors, and the codes between them. A function for each kind."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vae_dist.data.source import every_label
from vae_dist.errors import UserError
from vae_dist.models.tensors import sizes
from vae_dist.plan import Stream, standard_normal
from vae_dist.views import pictures, plots, selection
from vae_dist.views.components import principal_components
from vae_dist.views.latents import TrainedVAE, require_finite, scale_name
from vae_dist.views.view import View, label_tensors, require_plane


def interpolation(trained: TrainedVAE) -> View:
    """Decode the straight line between the posterior means of two test images, a row for each pair."""
    steps = trained.config.sample.steps or 10
    indices = selection.images(trained)
    if trained.config.sample.images is None:
        indices = indices[: len(indices) // 2 * 2]
    if not indices or len(indices) % 2:
        raise UserError(f"interpolation needs pairs of test images, not {len(indices)} images; see sample.images")
    first, last = trained.encode(indices).mean.unflatten(0, (-1, 2, 1)).unbind(1)
    position = torch.linspace(0, 1, steps, dtype=first.dtype).unsqueeze(1)
    latents = torch.lerp(first, last, position).flatten(0, 1)  # unlike a + t (b - a), it ends at b exactly
    originals = selection.image_tensors(trained, indices)
    weights = None
    if trained.vae.classes:
        ends = F.one_hot(originals["test_labels"], trained.vae.classes).to(first.dtype)
        one, other = ends.unflatten(0, (-1, 2, 1)).unbind(1)
        weights = torch.lerp(one, other, position).flatten(0, 1)
    decoded = trained.decode(latents, weights)

    def draw() -> Image.Image:
        pairs = zip(originals["test_images"].split(2), decoded.split(steps), strict=True)
        names = selection.image_texts(originals)
        return pictures.labelled_grid(
            torch.cat([torch.cat([ends[:1], between, ends[1:]]) for ends, between in pairs]),
            steps + 2,
            left=names[0::2],
            right=names[1::2],
            gaps=[1, steps + 1],
        )

    return View(
        f"interpolation: each row has two test images at its ends ({selection.image_words(originals)}) and between "
        "them decoded codes on the straight line from one's code to the other's"
        + (", and likewise of the embeddings of their labels" if trained.vae.classes else ""),
        {"images": decoded, "latents": latents, **originals, **({} if weights is None else {"class_weights": weights})},
        draw,
    )


def reconstruction(trained: TrainedVAE) -> View:
    """Decode the posterior's mean and some draws from it, for each of some test images."""
    options = trained.config.sample
    indices, steps = selection.images(trained), options.steps or 8
    noise = [
        standard_normal(options.seed, Stream.RECONSTRUCTION, index, range(steps), trained.vae.latent_dim)
        for index in indices
    ]
    latents = trained.mean_and_draws(indices, torch.stack(noise, dim=1)).flatten(0, 1)

    def noise_of(chunk: range, columns: int) -> Tensor:
        # By test image: its draws do not depend on the other images.
        rows = [(indices[row // (steps + 1)], row % (steps + 1)) for row in chunk]
        seed, stream = options.seed, Stream.PIXELS
        return torch.cat([standard_normal(seed, stream, image, range(at, at + 1), columns) for image, at in rows])

    originals = selection.image_tensors(trained, indices)
    labels = originals["test_labels"].repeat_interleave(steps + 1) if trained.vae.classes else None
    if options.pixels == "mean":
        decoded = trained.decode(latents, labels)
    else:
        decoded = trained.draw_pixels(latents, labels, noise_of)

    def draw() -> Image.Image:
        rows = decoded.unflatten(0, (len(indices), steps + 1))
        return pictures.labelled_grid(
            torch.cat([originals["test_images"].unsqueeze(1), rows], dim=1).flatten(0, 1),
            steps + 2,
            left=selection.image_texts(originals),
            top=["image", "mean", "draws"],
            gaps=[1, 2],
        )

    return View(
        f"test images ({selection.image_words(originals)}), each with its posterior's mean and {steps} draws from it, "
        "decoded",
        {"images": decoded, "latents": latents, **originals, **label_tensors(labels)},
        draw,
    )


def levels(trained: TrainedVAE) -> View:
    """Decode the posterior means of the first level of latents, of the first two and so on, for some test images."""
    indices, shapes = selection.images(trained), trained.vae.latent_shapes(trained.vae.image_shape)
    ends = torch.tensor(sizes(shapes)).cumsum(0)
    kept = torch.arange(trained.vae.latent_dim) < ends.unsqueeze(1)
    means = trained.encode(indices).mean.unsqueeze(1)
    latents = torch.where(kept, means, trained.origin).flatten(0, 1)
    originals = selection.image_tensors(trained, indices)
    labels = originals["test_labels"].repeat_interleave(len(shapes)) if trained.vae.classes else None
    decoded = trained.decode(latents, labels)

    def draw() -> Image.Image:
        rows = torch.cat([originals["test_images"].unsqueeze(1), decoded.unflatten(0, (-1, len(shapes)))], dim=1)
        return pictures.labelled_grid(
            rows.flatten(0, 1),
            len(shapes) + 1,
            left=selection.image_texts(originals),
            top=["image", *map(str, range(1, len(shapes) + 1))],
            gaps=[1],
        )

    named = ", ".join(" x ".join(map(str, shape)) for shape in shapes)
    count = "1 level" if len(shapes) == 1 else f"{len(shapes)} levels"
    return View(
        f"test images ({selection.image_words(originals)}), each decoded from the posterior means of its first levels "
        f"of latents, as many as stand above, and the origin of the others; {count}: {named}",
        {"images": decoded, "latents": latents, **originals, **label_tensors(labels)},
        draw,
    )


def scatter(trained: TrainedVAE) -> View:
    """Plot the posterior means of the test images by label; more than two latents along their principal components."""
    require_plane("scatter", trained.vae.latent_dim)
    means, labels = trained.posterior.mean, every_label(trained.test)
    if len(means) < 2:
        raise UserError("scatter needs at least 2 test images")
    tensors = {"latents": means} if labels is None else {"latents": means, "labels": labels}
    points, names = means, ["z0", "z1"]
    different = 0 if labels is None else len(labels.unique())
    by_label = ", by label" if different <= plots.MOST_LABELS else f", whose {different:,} labels are too many to show"
    description = f"posterior means of the {len(means)} test images{by_label if different else ''}"
    if trained.vae.latent_dim > 2:
        require_finite(means)
        components = principal_components(means, 2)
        points = components.coordinates
        ratios = [f"{ratio:.1%}" for ratio in components.variance_ratios.tolist()]
        names = [f"principal component {index} ({ratio} of the variance)" for index, ratio in enumerate(ratios, 1)]
        description += f"; the first two principal components explain {' and '.join(ratios)} of the means' variance"
        tensors |= {
            "points": points,
            "directions": components.directions,
            "variance_shares": components.variance_ratios,
        }
    x, y = (f"{name}, in standard deviations of {scale_name(trained.vae)}" for name in names)
    return View(description, tensors, lambda: plots.scatter(points, labels, x, y))
