"""Pictures inside the report, as `data:` addresses."""

from base64 import b64encode
from io import BytesIO
from typing import NamedTuple

from PIL import Image

from vae_dist.reports.subject import Subject

GRIDS_CHARACTERS = 1_500_000
MOST_GRIDS = 10  # steps that the slider moves over


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
    held_out = "Validation images" if subject.config.data.validation_images else "Training images (none are held out)"
    captions = {
        "reconstructions": f"{held_out}, each row over its reconstruction from the posterior's mean",
        "samples": "Samples from the prior (means of p(x|z)), from the same latents at every step",
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
    while True:
        for form, options in ("PNG", {"optimize": True}), ("WEBP", {"quality": 90}), ("WEBP", {"quality": 60}):
            file = BytesIO()
            picture.save(file, form, **options)
            address = f"data:image/{form.lower()};base64,{b64encode(file.getvalue()).decode()}"
            if len(address) <= most:
                return address
        picture = picture.reduce(2)
