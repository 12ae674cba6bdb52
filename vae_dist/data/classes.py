"""The classes of labelled images, by which a conditional model is trained."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vae_dist.config.text import truncate
from vae_dist.data.source import DataInfo, Source
from vae_dist.errors import UserError

MOST_CLASSES = 1000


def class_names(info: DataInfo, chosen: Sequence[str] | None) -> list[str]:
    """Return the names of a source's classes: those of the source, `chosen` by a config, or else the labels.

    Raises UserError for images without labels, for more than MOST_CLASSES classes, for a name that a config can't hold,
    and if `chosen` does not fit.
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
    if unsaved := [name for name in own if "${" in name or name == "???"]:  # no run could be resumed or evaluated
        raise UserError(
            f"{truncate(repr(unsaved[0]))} can't be the name of a class, as a config takes it for a reference or a "
            "missing value: rename its folder"
        )
    if chosen is None or list(chosen) == own:
        return own
    if info.class_names is not None or len(chosen) != info.classes:
        raise UserError(
            f"data.classes is {_text(chosen)}, but the classes of {info.name} are {_text(own)}: leave data.classes out "
            "in a new run, or put back the images that this run was started with"
        )
    return list(chosen)


def with_classes(source: Source, classes: Sequence[str]) -> Source:
    """Return images to evaluate on with the labels of a conditional model of these classes, matched by name.

    Some classes may be missing. Raises UserError for images without labels, and for other classes.
    """
    info = source.info
    if info.classes is None:
        raise UserError(f"this model is conditional and needs labels, but the images of {info.name} have none")
    own = info.class_names or tuple(str(label) for label in range(info.classes))
    if (info.class_names is None and len(own) <= len(classes)) or own == tuple(classes):
        return source
    if unknown := [name for name in own if name not in classes]:
        raise UserError(
            f"this model has the classes {_text(classes)}, but the images of {info.name} have other ones: "
            f"{_text(unknown)}"
        )
    return _Relabelled(source, [classes.index(name) for name in own], classes)


class _Relabelled:
    """The images of a source with other numbers for its classes."""

    def __init__(self, source: Source, numbers: Sequence[int], classes: Sequence[str]) -> None:
        identity = hashlib.sha256(f"{source.info.identity}; of the classes {list(classes)}".encode()).hexdigest()
        self.info = replace(source.info, classes=len(classes), class_names=tuple(classes), identity=identity)
        self._source = source
        self._numbers = torch.tensor(numbers)

    def labels(self, indices: Tensor) -> Tensor | None:
        labels = self._source.labels(indices)
        return None if labels is None else self._numbers[labels]

    def names(self, indices: Tensor) -> Sequence[str] | None:
        return self._source.names(indices)

    def read(self, indices: Tensor, draws: Tensor | None, out: Tensor) -> None:
        self._source.read(indices, draws, out)


def _text(names: Sequence[str]) -> str:
    return truncate(f"{', '.join(names)} ({len(names)} in all)")
