"""The classes of labelled images, by which a conditional model is trained."""

from collections.abc import Sequence

from vae_dist.config.text import truncate
from vae_dist.data.source import DataInfo
from vae_dist.errors import UserError

MOST_CLASSES = 1000


def class_names(info: DataInfo, chosen: Sequence[str] | None) -> list[str]:
    """Return the names of a source's classes: those of the source, `chosen` by a config, or else the labels.

    Raises UserError for images without labels, for more than MOST_CLASSES classes, and if `chosen` does not fit.
    """
    if info.classes is None:
        raise UserError(
            f"a conditional model needs labels, but the images of {info.name} have none: use "
            "model.conditional=false, or images with labels"
        )
    if info.classes > MOST_CLASSES:
        raise UserError(
            f"a conditional model takes at most {MOST_CLASSES:,} classes, but the images of {info.name} have "
            f"{info.classes:,}: use model.conditional=false, or fewer classes"
        )
    own = [str(label) for label in range(info.classes)] if info.class_names is None else list(info.class_names)
    if chosen is None or list(chosen) == own:
        return own
    if info.class_names is not None or len(chosen) != info.classes:
        raise UserError(
            f"data.classes is {_text(chosen)}, but the classes of {info.name} are {_text(own)}: leave data.classes out "
            "in a new run, or put back the images that this run was started with"
        )
    return list(chosen)


def require_same_classes(info: DataInfo, classes: Sequence[str]) -> None:
    """Raise UserError if images to evaluate a conditional model on have labels of other classes than the model."""
    if info.classes is None:
        raise UserError(f"this model is conditional and needs labels, but the images of {info.name} have none")
    differ = info.class_names is not None and list(info.class_names) != list(classes)
    if differ or info.classes > len(classes):
        own = info.class_names or [str(label) for label in range(info.classes)]
        raise UserError(f"this model has the classes {_text(classes)}, but the images of {info.name} have {_text(own)}")


def _text(names: Sequence[str]) -> str:
    return truncate(f"{', '.join(names)} ({len(names)} in all)")
