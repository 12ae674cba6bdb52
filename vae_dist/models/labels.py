"""The labels that a conditional VAE is given. B batch."""

import torch
from torch import Tensor, nn

from vae_dist.models.tensors import ShapeError, require_shape

EMBEDDING_SIZE = 32  # numbers by which a network is told the class


def embedding_size(classes: int) -> int:
    """Return the size of an embedded label; 0 without classes."""
    return EMBEDDING_SIZE if classes else 0


class LabelEmbedding(nn.Module):
    """A learned vector for each class: labels `(B,)` int64 to `(B, EMBEDDING_SIZE)`.

    Weights of the classes `(B, classes)` in place of labels give averages of the vectors, between two classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.randn(classes, EMBEDDING_SIZE))

    def forward(self, labels: Tensor) -> Tensor:
        # Not a lookup: on a GPU its gradient is added up in an order that changes.
        weights = labels if labels.is_floating_point() else self._one_hot(labels)
        require_shape(weights, (labels.shape[0], self.classes), "weights of the classes")
        return weights.to(self.weight.dtype) @ self.weight

    def _one_hot(self, labels: Tensor) -> Tensor:
        require_shape(labels, labels.shape[:1], "labels")
        # On a GPU the host would wait for the answer: there labels are checked where they are read.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            require_in_range(labels, self.classes)
        return labels.unsqueeze(1) == torch.arange(self.classes, device=labels.device)


def in_turn(classes: int, rows: range, device: torch.device) -> Tensor | None:
    """Return the labels of these rows where the classes take turns: `(len(rows),)` int64; None without classes."""
    return torch.arange(rows.start, rows.stop, device=device) % classes if classes else None


def require_in_range(labels: Tensor, classes: int) -> None:
    """Raise ShapeError unless labels are int64 from 0 to `classes` - 1."""
    if labels.dtype != torch.int64:
        raise ShapeError(f"labels must be torch.int64, not {labels.dtype}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ShapeError(
            f"labels must be 0 to {classes - 1} for this model, not {int(labels.min())} to {int(labels.max())}"
        )
