"""The codes, test images and classes that the options of `sample` select.

Shapes: N codes or images, L latents, C, H, W image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.config.text import truncate
from vae_dist.data.source import read
from vae_dist.errors import UserError
from vae_dist.models.tensors import to_unit
from vae_dist.views.latents import TrainedVAE

LONGEST_TEXT = 64  # numbers of a code that a caption states
DEFAULT_IMAGES = range(10)  # the test images that are shown when none are selected


class Start(NamedTuple):
    """The code that a view starts from."""

    name: str
    code: Tensor  # (L,)
    images: list[Tensor]  # the test image that was encoded, (1, C, H, W), or none
    tensors: dict[str, Tensor]  # that test image, as `image_tensors` returns it
    label: int | None  # the class as which the view is decoded; None if the model is not conditional

    def labels(self, count: int) -> Tensor | None:
        """Return the label of `count` codes `(count,)`."""
        return None if self.label is None else torch.full((count,), self.label)


def start(trained: TrainedVAE) -> Start:
    """Return the one code of `sample.codes`, that of the one test image of `sample.images`, or else the origin.

    Its class is that of `sample.labels`, else that of the test image, or else the first one.
    """
    options = trained.config.sample
    if options.codes is not None and options.images is not None:
        raise UserError("give sample.codes or sample.images, not both")
    if options.codes is not None:
        given = codes(trained)
        if len(given) > 1:
            raise UserError(f"{options.kind} starts from one code, but sample.codes has {len(given)}")
        return _start(trained, f"the code {code_text(given[0])}", given[0])
    if options.images is None:
        return _start(trained, "the origin", trained.origin)
    indices = images(trained)
    if len(indices) > 1:
        raise UserError(f"{options.kind} starts from one test image, but sample.images has {len(indices)}")
    tensors = image_tensors(trained, indices)
    code = trained.encode(indices).mean[0]
    name = f"the code of test image #{indices[0]}"
    if "test_labels" in tensors:
        name += f" (label {tensors['test_labels'].item()})"
    return _start(trained, name, code, tensors)


def _start(trained: TrainedVAE, name: str, code: Tensor, image: dict[str, Tensor] | None = None) -> Start:
    image = image or {}
    label = one_class(trained, int(image["test_labels"].item()) if "test_labels" in image else 0)
    return Start(name + as_class(trained, label), code, [image["test_images"]] if image else [], image, label)


def classes(trained: TrainedVAE) -> list[int]:
    """Return the numbers of the classes of `sample.labels`, by default of all; none if not conditional."""
    names = class_names(trained)
    return [_class(text, names) for text in trained.config.sample.labels or names]


def one_class(trained: TrainedVAE, default: int) -> int | None:
    """Return the one class of `sample.labels`, or else the default; None if the model is not conditional."""
    if not trained.vae.classes:
        return None
    given = trained.config.sample.labels
    if given is None:
        return default
    if len(given) > 1:
        raise UserError(f"{trained.config.sample.kind} shows one class, but sample.labels has {len(given)}")
    return classes(trained)[0]


def class_names(trained: TrainedVAE) -> list[str]:
    """Return the names of all classes; none if the model is not conditional."""
    return list(trained.config.data.classes or ()) if trained.vae.classes else []


def as_class(trained: TrainedVAE, label: int | None) -> str:
    """Say in a caption as which class codes are decoded."""
    return "" if label is None else f", decoded as class {class_names(trained)[label]}"


def _class(text: str, names: list[str]) -> int:
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(names):
        return int(text)
    shown = truncate(", ".join(names))
    raise UserError(
        f"sample.labels has {truncate(text)}, but the {len(names)} classes are {shown} (or their numbers from 0)"
    )


def codes(trained: TrainedVAE) -> Tensor:
    """Return `sample.codes` as latents `(N, L)`."""
    given, latent_dim = trained.config.sample.codes or [], trained.vae.latent_dim
    sizes = sorted({len(code) for code in given})
    if sizes != [latent_dim]:
        text = " or ".join(str(size) for size in sizes) or "no"
        raise UserError(f"sample.codes has codes of {text} numbers, but this model has {latent_dim} latents")
    latents = torch.tensor(given)
    if not latents.isfinite().all():
        raise UserError("sample.codes has a number that is too large for float32")
    return latents


def images(trained: TrainedVAE) -> list[int]:
    """Return the indices of the test images in `sample.images`, by default of the first ones."""
    count = trained.test.info.count
    indices = trained.config.sample.images
    if indices is None:
        return list(DEFAULT_IMAGES)[:count]
    if not indices:
        raise UserError("sample.images is empty; give indices of test images, such as sample.images=[0,1]")
    if max(indices) >= count:
        raise UserError(f"sample.images has {max(indices)}, but the {count} test images are 0 to {count - 1}")
    return indices


def image_tensors(trained: TrainedVAE, indices: list[int]) -> dict[str, Tensor]:
    """Return test images `(N, C, H, W)` in [0, 1], any labels, and indices, by their names in a view's file."""
    chosen = torch.tensor(indices)
    labels = trained.test.labels(chosen)
    return {
        "test_images": to_unit(read(trained.test, chosen)),
        **({} if labels is None else {"test_labels": labels}),
        "test_indices": chosen,
    }


def image_texts(originals: dict[str, Tensor]) -> list[str]:
    """Return the label, if any, and the index of each image, as `image_tensors` returns them."""
    texts = [f"#{index}" for index in originals["test_indices"].tolist()]
    if "test_labels" not in originals:
        return texts
    return [f"{label}  {text}" for label, text in zip(originals["test_labels"].tolist(), texts, strict=True)]


def image_words(originals: dict[str, Tensor]) -> str:
    """Return what `image_texts` has, in words."""
    return "label, #index" if "test_labels" in originals else "#index"


def code_text(code: Tensor) -> str:
    """The numbers of a code `(L,)`; of a long one the first of them."""
    numbers = [f"{number:g}" for number in code[:LONGEST_TEXT].tolist()]
    return "(" + ", ".join([*numbers, "..."] if len(code) > LONGEST_TEXT else numbers) + ")"
