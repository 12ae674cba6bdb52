"""Pictures of what a trained VAE has learned: samples, and views of its latent space. One function a kind.

Shapes: N images, L latents, R rows of a picture, S images in a row, C, H, W image.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.distributed import runtime
from vae_dist.errors import UserError
from vae_dist.files import ELSEWHERE, make_folder, write_together, writing
from vae_dist.models.distributions import DiagonalGaussian
from vae_dist.plan import Stream, standard_normal
from vae_dist.runs import checkpoint, console, tracking
from vae_dist.runs.picture import Picture, to_png, with_caption
from vae_dist.views import pictures, plots
from vae_dist.views.latents import Trained, principal_components

logger = logging.getLogger(__name__)

GRID_IMAGES = 1024  # a grid of more could not be looked at
CODE_COLUMNS = 8
SHORT_CODE = 3  # latents, for a code to be written below its image
TRAVERSED = 3.0  # a latent goes from -3 to 3, which holds 99.7% of the prior
EXAMPLES = range(10)  # the test images that are shown when none are chosen


class Result(NamedTuple):
    """What a kind makes of a trained VAE. Every process has it, and the main one draws it."""

    shows: str  # the caption's part that is the kind's
    tensors: dict[str, Tensor]  # `latents` (N, L), their `images` (N, C, H, W) but for the scatter, and the kind's own
    draw: Callable[[], Image.Image]


def sample(run: Path | None, arguments: Sequence[str] = ()) -> Path:
    """Make one of the KINDS from a run's newest checkpoint, or from the checkpoint that `run` is; the newest run's.

    Returns the folder of the picture (`scatter.png`, or `grid.png` for all other kinds), `samples.safetensors` and, on
    request, a file per image. Raises UserError where there is nothing to sample from, and for what a kind can't use.
    """
    with checkpoint.open_for_reading(run, arguments) as opened, runtime.join(opened.config) as world:
        console.start(world)
        folder, config, step, output, live = world.on_main(lambda: opened)
        world.on_main(lambda: tracking.check_online(config.tracking))
        kind = _chosen_kind(config, arguments)
        make, keys = KINDS[kind]
        name = config.sample.sampler if kind == "prior" else kind
        result = make(Trained(checkpoint.load_vae(folder, config, world.device), config, world))
        if not all(tensor.isfinite().all() for tensor in result.tensors.values()):
            raise UserError(
                "the codes or the images decoded from them are not finite: give codes nearer to 0 (sample.codes, "
                "sample.radius), or take an earlier checkpoint if the model has gone bad"
            )
        target = output / "samples" / f"step_{step:08d}_{name}"
        caption = f"{config.name} (trained on {config.data.name}), step {step}; {result.shows}"
        if "images" in result.tensors:
            caption += "; means of p(x|z)"
        if "seed" in keys:
            target = target.with_name(f"{target.name}_seed_{config.sample.seed}")
            caption += f"; seed {config.sample.seed}"
        tracked = tracking.for_reading(config, folder, arguments)

        def keep() -> None:
            picture = Picture(result.draw(), caption)
            with tracking.track(tracked, output, is_main=world.is_main, live=live, kind="samples") as tracker:
                _write(target, result.tensors, picture, separate_files=config.sample.files)
                tracker.pictures(step, lambda: {f"sample_{name}": picture})
            logger.info("%d latents and their picture in %s", len(result.tensors["latents"]), target)

        world.on_main(keep)
    return target


def _write(target: Path, tensors: dict[str, Tensor], picture: Picture, *, separate_files: bool) -> None:
    """Write all files of a kind, in the place of what an earlier command wrote there."""
    make_folder(target, ELSEWHERE)
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    file_name = "grid.png" if "images" in tensors else "scatter.png"
    drawn = to_png(with_caption(picture), optimize=True)
    separate = {
        target / f"{index:06d}.png": to_png(pictures.grid(image.unsqueeze(0), 1))
        for index, image in enumerate(tensors["images"] if separate_files else [])
    }
    with writing(target, ELSEWHERE):
        joint = {target / "samples.safetensors": content, target / file_name: drawn}
        write_together({**separate, **joint}, durable=not separate)
        for old in target.glob("[0-9]*.png"):  # of an earlier command that had more of them
            if old not in separate:
                old.unlink()


def prior(trained: Trained) -> Result:
    """Decoded draws from the prior, or from a mixture of Gaussians fitted to the training images' posteriors.

    The mixture keeps to where the posteriors lie and out of the prior's holes between them (Ghosh et al. 2020, "From
    variational to deterministic autoencoders", section 4).
    """
    asked = trained.config.sample
    tensors: dict[str, Tensor] = {}
    if asked.sampler == "prior":
        latents = standard_normal(asked.seed, Stream.PRIOR, 0, range(asked.count), trained.vae.latent_dim)
        shows = "samples from the prior"
    else:
        mixture = trained.fit_mixture(asked.mixture_components)
        latents = trained.in_blocks("drawing", asked.count, lambda block: mixture.sample(asked.seed, block)).float()
        tensors = {f"mixture.{name}": value for name, value in mixture._asdict().items()}
        shows = (
            f"samples from a mixture of {asked.mixture_components} Gaussians fitted to the training images' posteriors"
        )
    decoded = trained.decode(latents)
    shown = decoded[:GRID_IMAGES]
    return Result(
        shows + _of_more(shown, decoded),
        {"images": decoded, "latents": latents, **tensors},
        lambda: pictures.grid(shown, math.ceil(math.sqrt(len(shown)))),
    )


def codes(trained: Trained) -> Result:
    """Decoded codes that somebody chose."""
    latents = _codes(trained)
    decoded = trained.decode(latents)
    shown = decoded[:GRID_IMAGES]
    is_short = trained.vae.latent_dim <= SHORT_CODE
    labels = [_code_text(code) if is_short else str(index) for index, code in enumerate(latents[:GRID_IMAGES])]
    columns = max(math.ceil(math.sqrt(len(shown))), min(len(shown), CODE_COLUMNS))
    return Result(
        "decoded codes" + _of_more(shown, decoded),
        {"images": decoded, "latents": latents},
        lambda: pictures.labelled_grid(shown, columns, below=labels),
    )


def neighbours(trained: Trained) -> Result:
    """Codes around one code: a row for each distance from it, a column for each random direction."""
    asked, latent_dim = trained.config.sample, trained.vae.latent_dim
    start = _start(trained)
    rows, steps = asked.rows or 5, asked.steps or 10
    radii = torch.linspace(0, asked.radius or math.sqrt(latent_dim) / 2, rows + 1, dtype=torch.float64)[1:]
    directions = standard_normal(asked.seed, Stream.NEIGHBOURS, 0, range(steps), latent_dim).double()
    directions /= directions.norm(dim=1, keepdim=True)
    around = (start.code.double() + radii.view(-1, 1, 1) * directions).to(start.code.dtype).flatten(0, 1)
    decoded_start, decoded = trained.decode(torch.cat([start.code.unsqueeze(0), around])).split([1, len(around)])

    def draw() -> Image.Image:
        first = torch.cat([*start.images, decoded_start])
        return pictures.labelled_grid(
            torch.cat([torch.cat([first, row]) for row in decoded.split(steps)]),
            len(first) + steps,
            left=[f"{radius:.3g}" for radius in radii.tolist()],
            top=[*["image"] * len(start.images), "code"],
            gaps=[len(first)],
        )

    return Result(
        f"neighbours of {start.name}: each row at the distance beside it, each column in one random direction",
        {"images": decoded, "latents": around, "distances": radii, **start.tensors},
        draw,
    )


def interpolation(trained: Trained) -> Result:
    """The straight line in latent space between the posterior means of two test images, a row for each pair."""
    steps = trained.config.sample.steps or 10
    chosen = _images(trained)
    if trained.config.sample.images is None:
        chosen = chosen[: len(chosen) // 2 * 2]
    if not chosen or len(chosen) % 2:
        raise UserError(f"interpolation needs pairs of test images, not {len(chosen)} images; see sample.images")
    first, last = trained.encode(trained.test.pixels[chosen]).mean.unflatten(0, (-1, 2, 1)).unbind(1)
    position = torch.linspace(0, 1, steps, dtype=first.dtype).unsqueeze(1)
    latents = torch.lerp(first, last, position).flatten(0, 1)  # unlike a + t (b - a), it ends at b exactly
    decoded = trained.decode(latents)
    tests = _test_tensors(trained, chosen)

    def draw() -> Image.Image:
        pairs = zip(tests["test_images"].split(2), decoded.split(steps), strict=True)
        names = [_image_text(trained, index) for index in chosen]
        return pictures.labelled_grid(
            torch.cat([torch.cat([ends[:1], between, ends[1:]]) for ends, between in pairs]),
            steps + 2,
            left=names[0::2],
            right=names[1::2],
            gaps=[1, steps + 1],
        )

    return Result(
        "interpolation: each row has two test images at its ends (label, #index), and between them what the straight "
        "line from the code of one to that of the other decodes to",
        {"images": decoded, "latents": latents, **tests},
        draw,
    )


def traversal(trained: Trained) -> Result:
    """One latent at a time from -3 to 3 while the others stay (Higgins et al. 2017, "beta-VAE").

    The latents come in the order of their KL from the prior over the test images, those that say most first.
    """
    asked, latent_dim = trained.config.sample, trained.vae.latent_dim
    start = _start(trained)
    order = _by_kl(trained)[: asked.rows or 20]
    values = torch.linspace(-TRAVERSED, TRAVERSED, asked.steps or 13, dtype=start.code.dtype)
    latents = start.code.repeat(len(order), len(values), 1)
    latents[torch.arange(len(order)), :, order] = values
    latents = latents.flatten(0, 1)
    decoded = trained.decode(latents)

    def draw() -> Image.Image:
        return pictures.labelled_grid(
            decoded,
            len(values),
            left=[f"z{latent}  {trained.kl[latent]:.2f} nats" for latent in order.tolist()],
            top=[f"{value:.3g}" for value in values.tolist()],
        )

    return Result(
        f"traversal from {start.name}: in each row one latent takes the values above while the others stay; "
        f"{len(order)} of {latent_dim} latents, by their KL over the test images",
        {"images": decoded, "latents": latents, "order": order, "kl": trained.kl[order], **start.tensors},
        draw,
    )


def manifold(trained: Trained) -> Result:
    """The plane of two latents at evenly spaced quantiles of the prior (Kingma and Welling 2013, figure 4).

    With more than two latents it is the plane of the two with the largest KL over the test images, the others at 0.
    """
    latent_dim = trained.vae.latent_dim
    _require_plane("manifold", latent_dim)
    across, up = [0, 1] if latent_dim == 2 else _by_kl(trained)[:2].tolist()
    side = trained.config.sample.steps or 20
    values = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side)
    latents = torch.zeros(side, side, latent_dim)
    latents[:, :, across] = values.float()
    latents[:, :, up] = values.flip(0).float().unsqueeze(1)
    latents = latents.flatten(0, 1)
    decoded = trained.decode(latents)

    def draw() -> Image.Image:
        texts = [f"{value:.2f}" for value in values.tolist()]
        return pictures.labelled_grid(decoded, side, left=texts[::-1], top=texts)

    others = "" if latent_dim == 2 else " (the two with the largest KL over the test images, the others at 0)"
    return Result(
        f"latent space at evenly spaced quantiles of the prior: z{across} to the right, z{up} upwards{others}",
        {"images": decoded, "latents": latents, "axes": torch.tensor([across, up])},
        draw,
    )


def reconstruction(trained: Trained) -> Result:
    """Test images, each with what its posterior's mean and some draws from its posterior decode to."""
    asked = trained.config.sample
    chosen, steps = _images(trained), asked.steps or 8
    mean, log_variance = (part.unsqueeze(1) for part in trained.encode(trained.test.pixels[chosen]))
    noise = [
        standard_normal(asked.seed, Stream.RECONSTRUCTION, index, range(steps), trained.vae.latent_dim)
        for index in chosen
    ]
    draws = DiagonalGaussian(mean, log_variance).sample(torch.stack(noise).to(mean.dtype))
    latents = torch.cat([mean, draws], dim=1).flatten(0, 1)
    decoded = trained.decode(latents)
    tests = _test_tensors(trained, chosen)

    def draw() -> Image.Image:
        rows = decoded.unflatten(0, (len(chosen), steps + 1))
        return pictures.labelled_grid(
            torch.cat([tests["test_images"].unsqueeze(1), rows], dim=1).flatten(0, 1),
            steps + 2,
            left=[_image_text(trained, index) for index in chosen],
            top=["image", "mean", "draws"],
            gaps=[1, 2],
        )

    return Result(
        f"test images (label, #index), and what the mean of their posterior and {steps} draws from it decode to",
        {"images": decoded, "latents": latents, **tests},
        draw,
    )


def scatter(trained: Trained) -> Result:
    """The posterior means of the test images by label, along their principal components where latents are many."""
    _require_plane("scatter", trained.vae.latent_dim)
    means, labels = trained.posterior.mean, trained.test.labels
    if len(means) < 2:
        raise UserError("scatter needs at least 2 test images")
    tensors = {"latents": means, "labels": labels}
    points, names = means, ["z0", "z1"]
    shows = f"posterior means of the {len(means)} test images, by label"
    if trained.vae.latent_dim > 2:
        components = principal_components(means, 2)
        points = components.coordinates
        shares = [f"{share:.1%}" for share in components.shares.tolist()]
        names = [f"principal component {index} ({share} of the variance)" for index, share in enumerate(shares, 1)]
        shows += f"; the first two principal components hold {' and '.join(shares)} of the means' variance"
        tensors |= {"points": points, "directions": components.directions, "variance_shares": components.shares}
    x, y = (f"{name}, in standard deviations of the prior" for name in names)
    return Result(shows, tensors, lambda: plots.scatter(points, labels, x, y))


# sample.kind -> the function that makes it, and the keys of `sample` that it reads.
KINDS: dict[str, tuple[Callable[[Trained], Result], set[str]]] = {
    "prior": (prior, {"count", "seed", "sampler", "mixture_components", "files"}),
    "codes": (codes, {"codes", "files"}),
    "neighbours": (neighbours, {"codes", "images", "rows", "steps", "radius", "seed", "files"}),
    "interpolation": (interpolation, {"images", "steps", "files"}),
    "traversal": (traversal, {"codes", "images", "rows", "steps", "files"}),
    "manifold": (manifold, {"steps", "files"}),
    "reconstruction": (reconstruction, {"images", "steps", "seed", "files"}),
    "scatter": (scatter, set()),
}


def _chosen_kind(config: Config, arguments: Sequence[str]) -> str:
    """The kind that the config asks for. Raises UserError where there is none, and for a key that it would ignore."""
    kind = config.sample.kind or ("prior" if config.sample.codes is None else "codes")
    if kind not in KINDS:
        raise UserError(f"unknown sample.kind {kind!r}; choose from {', '.join(KINDS)}")
    # What the training's own config sets of `sample` may be for another kind; what this command sets may not.
    for given in (argument.removeprefix("--").partition("=")[0] for argument in arguments):
        section, _, key = given.partition(".")
        if section == "sample" and key not in KINDS[kind][1] | {"kind"}:
            others = ", ".join(name for name, (_, keys) in KINDS.items() if key in keys)
            raise UserError(f"{given} means nothing to sample.kind={kind}; it is for {others}")
    return kind


def _require_plane(kind: str, latent_dim: int) -> None:
    if latent_dim < 2:
        raise UserError(f"{kind} shows a plane, but this model has 1 latent; use sample.kind=traversal")


def _by_kl(trained: Trained) -> Tensor:
    """The latents by falling KL over the test images: `(L,)` int64."""
    return trained.kl.argsort(descending=True, stable=True)


def _of_more(shown: Tensor, decoded: Tensor) -> str:
    if len(shown) == len(decoded):
        return ""
    return f"; the first {len(shown)} of {len(decoded)}, all are in samples.safetensors"


class Start(NamedTuple):
    """The code that a view starts from."""

    name: str
    code: Tensor  # (L,)
    images: list[Tensor]  # the test image that it is the code of, if it is one's: (1, C, H, W)
    tensors: dict[str, Tensor]


def _start(trained: Trained) -> Start:
    """The one code of `sample.codes`, or that of the one test image of `sample.images`; 0 where neither is given."""
    asked = trained.config.sample
    if asked.codes is not None and asked.images is not None:
        raise UserError("give sample.codes or sample.images, not both")
    if asked.codes is not None:
        given = _codes(trained)
        if len(given) > 1:
            raise UserError(f"{asked.kind} starts from one code, but sample.codes has {len(given)}")
        return Start(f"the code {_code_text(given[0])}", given[0], [], {})
    if asked.images is None:
        return Start("the origin", torch.zeros(trained.vae.latent_dim), [], {})
    chosen = _images(trained)
    if len(chosen) > 1:
        raise UserError(f"{asked.kind} starts from one test image, but sample.images has {len(chosen)}")
    tensors = _test_tensors(trained, chosen)
    code = trained.encode(trained.test.pixels[chosen]).mean[0]
    name = f"the code of test image #{chosen[0]} (label {tensors['test_labels'].item()})"
    return Start(name, code, [tensors["test_images"]], tensors)


def _codes(trained: Trained) -> Tensor:
    """`sample.codes` as latents `(N, L)`."""
    codes, latent_dim = trained.config.sample.codes or [], trained.vae.latent_dim
    sizes = sorted({len(code) for code in codes})
    if sizes != [latent_dim]:
        found = " or ".join(str(size) for size in sizes) or "no"
        raise UserError(f"sample.codes has codes of {found} numbers, but this model has {latent_dim} latents")
    latents = torch.tensor(codes)
    if not latents.isfinite().all():
        raise UserError("sample.codes has a number that is too large for float32")
    return latents


def _images(trained: Trained) -> list[int]:
    """`sample.images`, or the first test images."""
    count = len(trained.test.labels)
    chosen = trained.config.sample.images
    if chosen is None:
        return list(EXAMPLES)[:count]
    if not chosen:
        raise UserError("sample.images is empty; give indices of test images, such as sample.images=[0,1]")
    if max(chosen) >= count:
        raise UserError(f"sample.images has {max(chosen)}, but the {count} test images are 0 to {count - 1}")
    return chosen


def _test_tensors(trained: Trained, chosen: list[int]) -> dict[str, Tensor]:
    return {
        "test_images": datasets.to_unit(trained.test.pixels[chosen]),
        "test_labels": trained.test.labels[chosen],
        "test_indices": torch.tensor(chosen),
    }


def _image_text(trained: Trained, index: int) -> str:
    return f"{trained.test.labels[index]}  #{index}"


def _code_text(code: Tensor) -> str:
    return "(" + ", ".join(f"{number:g}" for number in code.tolist()) + ")"
