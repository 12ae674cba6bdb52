"""Pictures inside the report, as `data:` addresses."""

from base64 import b64encode
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image

from vae_dist.reports.subject import Subject

GRIDS_CHARACTERS = 1_500_000
MOST_GRIDS = 10  # steps that the slider moves over

_MOST_OPTIMISED = 4  # times the size of an optimised PNG that a fast one has


class Grid(NamedTuple):
    """A picture of one step."""

    step: int
    address: str  # a `data:` URI
    width: int  # pixels
    height: int


class Pictures(NamedTuple):
    """The pictures of the validations by caption, and their steps in order."""

    grids: dict[str, list[Grid]]
    steps: list[int]


def validation_pictures(subject: Subject) -> Pictures:
    """The grids of the newest validation, and of those before it for the slider."""
    data, is_conditional = subject.config.data, subject.config.model.conditional
    # None: the set has validation images of its own.
    held_out = "Training images (none are held out)" if data.validation_images == 0 else "Validation images"
    drawn, density = ("Samples by class", "p(x|z,y)") if is_conditional else ("Samples", "p(x|z)")
    captions = {
        "reconstructions": f"{held_out}, each row over its reconstruction from the posterior's mean",
        "samples": f"{drawn} from the prior (means of {density}), from the same latents at every step",
    }
    grids: dict[str, list[Grid]] = {}
    by_kind = subject.run.pictures(captions, MOST_GRIDS)
    for kind, caption in captions.items():
        for step, picture in ((step, picture) for (its_kind, step), picture in by_kind.items() if its_kind == kind):
            address = data_uri(picture, GRIDS_CHARACTERS // len(by_kind))
            grids.setdefault(caption, []).append(Grid(step, address, picture.width, picture.height))
    return Pictures(grids, sorted({step for _, step in by_kind}))


def data_uri(picture: Image.Image, most: int) -> str:
    """A picture as a `data:` URI of at most `most` characters: a PNG, or if that is larger a lossy, reduced WebP."""
    forms: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {"optimize": True}), ("WEBP", {"quality": 90}), ("WEBP", {"quality": 60})
    ]  # fmt: skip
    while True:
        # To optimise a large PNG takes many seconds.
        may_suffice = len(_encoded(picture, "PNG", {"compress_level": 1})) <= _MOST_OPTIMISED * most
        for form, options in forms if may_suffice else forms[1:]:
            address = _encoded(picture, form, options)
            if len(address) <= most:
                return address
        picture = picture.reduce(2)


def _encoded(picture: Image.Image, form: str, options: dict[str, Any]) -> str:
    """A picture as a `data:` URI."""
    file = BytesIO()
    picture.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{b64encode(file.getvalue()).decode()}"
