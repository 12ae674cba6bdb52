"""Views that start from codes: drawn, given, or moved through the latent space. A function for each kind.

Shapes: N images, L latents, R rows of a picture, S images in a row, C, H, W image.
"""

import math
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from vae_dist.errors import UserError
from vae_dist.plan import Stream, standard_normal
from vae_dist.views import pictures, selection
from vae_dist.views.latents import TrainedVAE, kl_name, prior_draws, scale_name
from vae_dist.views.view import View, label_tensors, require_plane

MAX_GRID_IMAGES = 1024  # more can't be told apart
CODE_COLUMNS = 8
SHORT_CODE = 3  # latents; a code of up to this size is written below its image
TRAVERSAL_EXTENT = 3.0  # a latent goes from -3 to 3, which holds 99.7% of N(0, 1)


def prior(trained: TrainedVAE) -> View:
    """Decode draws from the prior, or from a mixture of Gaussians fitted to the training images' posteriors.

    The mixture covers the regions where posteriors lie and avoids the prior's holes between them (Ghosh et al. 2020,
    "From variational to deterministic autoencoders", section 4). Of a conditional model, classes are drawn in turn.
    """
    options = trained.config.sample
    classes, labels = selection.classes(trained), None
    if classes:
        labels = torch.tensor(classes)[torch.arange(options.count) % len(classes)]
        if options.sampler == "mixture":
            raise UserError(
                "sample.sampler=mixture is for models that are not conditional: it is fitted to the codes of all "
                "classes together; use sample.sampler=prior"
            )
    tensors: dict[str, Tensor] = {}
    if options.sampler == "prior":
        latents = prior_draws(trained.vae, options.seed, range(options.count))
        description = "samples from the prior"
    else:
        mixture = trained.fit_mixture(options.mixture_components)
        latents = trained.in_chunks("drawing", options.count, lambda chunk: mixture.sample(options.seed, chunk)).float()
        tensors = {f"mixture.{name}": value for name, value in mixture._asdict().items()}
        count = options.mixture_components
        description = f"samples from a mixture of {count} Gaussians fitted to the training images' posteriors"
    decoded = _decoded(trained, latents, labels)
    shown = decoded[:MAX_GRID_IMAGES]
    names = [selection.class_names(trained)[label] for label in classes]

    def draw() -> Image.Image:
        if names:
            return pictures.grid_by_class(shown, names)
        return pictures.grid(shown, math.ceil(math.sqrt(len(shown))))

    return View(
        description + ", by class" * bool(names) + _part_shown(shown, decoded),
        {"images": decoded, "latents": latents, **label_tensors(labels), **tensors},
        draw,
    )


def codes(trained: TrainedVAE) -> View:
    """Decode the codes of `sample.codes`, as one class or each as its own."""
    latents = selection.codes(trained)
    classes = selection.classes(trained) if trained.config.sample.labels else [0]
    if len(classes) not in (1, len(latents)):
        raise UserError(f"sample.labels has {len(classes)} classes for {len(latents)} codes: give one, or one per code")
    labels = torch.tensor(classes).expand(len(latents)) if trained.vae.classes else None
    decoded = _decoded(trained, latents, labels)
    shown = decoded[:MAX_GRID_IMAGES]
    is_short = trained.vae.latent_dim <= SHORT_CODE
    captions = [selection.code_text(code) if is_short else str(at) for at, code in enumerate(latents[:MAX_GRID_IMAGES])]
    described = "decoded codes"
    if labels is not None and len(classes) == 1:
        described = f"codes{selection.as_class(trained, classes[0])}"
    elif labels is not None:
        names = selection.class_names(trained)
        captions = [f"{text} as {names[label]}" for text, label in zip(captions, labels.tolist(), strict=False)]
    columns = max(math.ceil(math.sqrt(len(shown))), min(len(shown), CODE_COLUMNS))
    return View(
        described + _part_shown(shown, decoded),
        {"images": decoded, "latents": latents, **label_tensors(labels)},
        lambda: pictures.labelled_grid(shown, columns, below=captions),
    )


def neighbours(trained: TrainedVAE) -> View:
    """Decode codes around one code: a row for each distance from it, a column for each random direction."""
    options, latent_dim = trained.config.sample, trained.vae.latent_dim
    start = selection.start(trained)
    rows, steps = options.rows or 5, options.steps or 10
    radii = torch.linspace(0, options.radius or math.sqrt(latent_dim) / 2, rows + 1, dtype=torch.float64)[1:]
    directions = standard_normal(options.seed, Stream.NEIGHBOURS, 0, range(steps), latent_dim).double()
    directions /= directions.norm(dim=1, keepdim=True)
    around = (start.code.double() + radii.view(-1, 1, 1) * directions).to(start.code.dtype).flatten(0, 1)
    labels = start.labels(1 + len(around))
    all_decoded = trained.decode(torch.cat([start.code.unsqueeze(0), around]), labels)
    decoded_start, decoded = all_decoded.split([1, len(around)])

    def draw() -> Image.Image:
        first = torch.cat([*start.images, decoded_start])
        return pictures.labelled_grid(
            torch.cat([torch.cat([first, row]) for row in decoded.split(steps)]),
            len(first) + steps,
            left=[f"{radius:.3g}" for radius in radii.tolist()],
            top=[*["image"] * len(start.images), "code"],
            gaps=[len(first)],
        )

    return View(
        f"neighbours of {start.name}: each row at the distance on its left, each column in one random direction",
        {
            "images": decoded,
            "latents": around,
            "distances": radii,
            **start.tensors,
            **label_tensors(start.labels(len(around))),
        },
        draw,
    )


def traversal(trained: TrainedVAE) -> View:
    """Move one latent at a time from -3 to 3 and keep the others (Higgins et al. 2017, "beta-VAE").

    The latents are in falling order of their mean KL over the test images.
    """
    options, latent_dim = trained.config.sample, trained.vae.latent_dim
    start = selection.start(trained)
    order = trained.by_kl[: options.rows or 20]
    values = torch.linspace(-TRAVERSAL_EXTENT, TRAVERSAL_EXTENT, options.steps or 13, dtype=start.code.dtype)
    latents = start.code.repeat(len(order), len(values), 1)
    latents[torch.arange(len(order)), :, order] = values
    latents = latents.flatten(0, 1)
    labels = start.labels(len(latents))
    decoded = trained.decode(latents, labels)

    def draw() -> Image.Image:
        return pictures.labelled_grid(
            decoded,
            len(values),
            left=[f"z{latent}  {trained.kl[latent]:.2f} nats" for latent in order.tolist()],
            top=[f"{round(value, 6) + 0:.3g}" for value in values.tolist()],  # 0, not -1.2e-07
        )

    return View(
        f"traversal from {start.name}: in each row one latent takes the values above while the others stay; "
        f"{len(order)} of {latent_dim} latents, by their {kl_name(trained.vae)} over the test images",
        {
            "images": decoded,
            "latents": latents,
            "order": order,
            "kl": trained.kl[order],
            **start.tensors,
            **label_tensors(labels),
        },
        draw,
    )


def manifold(trained: TrainedVAE) -> View:
    """Decode the plane of two latents at evenly spaced quantiles of N(0, 1) (Kingma and Welling 2013, figure 4).

    Of more than two latents these are the two with the largest KL over the test images. The others are the origin's.
    """
    latent_dim = trained.vae.latent_dim
    require_plane("manifold", latent_dim)
    across, up = [0, 1] if latent_dim == 2 else trained.by_kl[:2].tolist()
    side = trained.config.sample.steps or 20
    values = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side)
    latents = trained.origin.repeat(side, side, 1)
    latents[:, :, across] = values.float()
    latents[:, :, up] = values.flip(0).float().unsqueeze(1)
    latents = latents.flatten(0, 1)
    label = selection.one_class(trained, 0)
    labels = None if label is None else torch.full((len(latents),), label)
    decoded = trained.decode(latents, labels)

    def draw() -> Image.Image:
        texts = [f"{value:.2f}" for value in values.tolist()]
        return pictures.labelled_grid(decoded, side, left=texts[::-1], top=texts)

    others = ""
    if latent_dim > 2:
        largest = f"the two with the largest {kl_name(trained.vae)} over the test images"
        others = f" ({largest}, the others {_others(trained.origin)})"
    return View(
        f"latent space at evenly spaced quantiles of {scale_name(trained.vae)}: z{across} to the right, z{up} upwards"
        f"{others}{selection.as_class(trained, label)}",
        {"images": decoded, "latents": latents, "axes": torch.tensor([across, up]), **label_tensors(labels)},
        draw,
    )


def _decoded(trained: TrainedVAE, latents: Tensor, labels: Tensor | None) -> Tensor:
    """The images `(N, C, H, W)` of codes `(N, L)` with any labels `(N,)`, as `sample.pixels` says."""
    options = trained.config.sample
    if options.pixels == "mean":
        return trained.decode(latents, labels)
    return trained.draw_pixels(latents, labels, partial(standard_normal, options.seed, Stream.PIXELS, 0))


def _others(origin: Tensor) -> str:
    return "as at the origin" if origin.any() else "at 0"


def _part_shown(shown: Tensor, decoded: Tensor) -> str:
    if len(shown) == len(decoded):
        return ""
    return f"; the first {len(shown)} of {len(decoded)}, all are in samples.safetensors"
