from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.sources import Mapped, of_pixels, whole
from vae_dist.config import DataConfig
from vae_dist.data import datasets
from vae_dist.data.source import InMemory, Source, in_memory, process, read, select
from vae_dist.plan import FIXED_SEED, bernoulli_pixels

PIXELS = torch.randint(0, 256, (30, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % 7
ODD = [3, 4, 5, 29, 0, 1, 1, 17]  # consecutive, falling and repeated


def sources(folder: Path) -> list[Source]:
    held = in_memory("colours", PIXELS, LABELS, "an identity")
    return [held, Mapped(held, folder)]


def test_a_source_describes_its_images() -> None:
    info = in_memory("colours", PIXELS, LABELS, "an identity").info
    assert (info.name, info.count, info.image_shape, info.classes) == ("colours", 30, (3, 4, 5), 7)
    assert (info.processing, info.identity) == ("colour, 0 to 1", "an identity")
    assert of_pixels(PIXELS[:, :1]).info.processing == "grey, 0 to 1"
    assert of_pixels(PIXELS).info.classes is None and of_pixels(PIXELS).labels(torch.arange(3)) is None


def test_images_are_read_in_any_order(tmp_path: Path) -> None:
    for source in sources(tmp_path):
        assert torch.equal(read(source, ODD), PIXELS[ODD])
        assert torch.equal(read(source, torch.tensor(ODD)), PIXELS[ODD])
        assert torch.equal(read(source, range(20, 10, -3)), PIXELS[[20, 17, 14, 11]])
        assert read(source, []).shape == (0, 3, 4, 5)
        assert torch.equal(source.labels(torch.tensor(ODD)), LABELS[ODD])  # type: ignore[arg-type]


def test_a_selection_of_a_processed_selection_is_indexing(tmp_path: Path) -> None:
    first, second = torch.arange(29, 4, -2), torch.tensor([2, 0, 7, 7])
    expected = 255 - PIXELS[first][second]
    for source in sources(tmp_path):
        inverted = process(select(source, first, "odd"), lambda pixels, _: 255 - pixels, "inverted")
        chosen = select(inverted, second, "some")
        assert isinstance(chosen, InMemory) == isinstance(source, InMemory)
        assert torch.equal(whole(chosen).pixels, expected)
        assert torch.equal(whole(chosen).labels, LABELS[first][second])
        assert (chosen.info.count, chosen.info.classes, chosen.info.processing) == (4, 7, "inverted")


def test_what_is_done_to_an_image_may_depend_on_its_index(tmp_path: Path) -> None:
    for source in sources(tmp_path):
        numbered = process(source, lambda pixels, indices: pixels * 0 + indices.byte().view(-1, 1, 1, 1), "numbered")
        assert read(numbered, ODD)[:, 0, 0, 0].tolist() == ODD


def test_an_identity_follows_from_the_parents_and_the_rule() -> None:
    held = in_memory("colours", PIXELS, LABELS, "an identity")
    other = in_memory("colours", PIXELS, LABELS, "another")
    half = torch.arange(15)
    derived = [
        held, other, select(held, half, "a"), select(held, half, "b"), select(other, half, "a"),
        process(held, lambda pixels, _: pixels, "a"), process(held, lambda pixels, _: pixels, "a", "step 1"),
        process(select(held, half, "a"), lambda pixels, _: pixels, "a"),
    ]  # fmt: skip
    assert len({source.info.identity for source in derived}) == len(derived)
    assert select(held, half, "a").info.identity == derived[2].info.identity


def test_splits_of_a_source_have_identities_of_their_own(data_root: Path) -> None:
    config = DataConfig(name="synthetic_digits", root=str(data_root), synthetic_images=600, validation_images=100)
    identities = set()
    for config.binarize in ("none", "threshold", "dynamic"):
        identities |= {source.info.identity for source in (*datasets.load_training(config), datasets.load_test(config))}
    assert len(identities) == 8  # training images under "dynamic" are those under "none"


@pytest.mark.parametrize("binarize", ["none", "threshold", "dynamic"])
def test_splits_are_the_same_wherever_the_images_lie(binarize: str, data_root: Path, tmp_path: Path) -> None:
    config = DataConfig(name="synthetic_digits", root=str(data_root), synthetic_images=600, validation_images=100)
    everything = datasets.load_training_set(config)
    config.binarize = binarize  # type: ignore[assignment]
    held = datasets.split(everything, config)
    lazy = datasets.split(Mapped(everything, tmp_path), config)
    for ours, theirs in zip(lazy, held, strict=True):
        assert not isinstance(ours, InMemory) and ours.info == theirs.info
        assert all(map(torch.equal, whole(ours), whole(theirs)))
        some = [5, 6, 7, 99, 3, 3, 40, 41]
        assert torch.equal(read(ours, some), read(theirs, some))


def test_a_held_out_images_draw_belongs_to_its_index(data_root: Path) -> None:
    """The oracle: one image at a time."""
    config = DataConfig(name="synthetic_digits", root=str(data_root), synthetic_images=600, validation_images=100)
    grey = datasets.load_test(config)
    config.binarize = "dynamic"
    drawn = datasets.load_test(config)
    for index in (0, 1, 57, 99):
        expected = bernoulli_pixels(read(grey, [index]), FIXED_SEED, 1, range(index, index + 1))
        assert torch.equal(read(drawn, [index]), expected)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(2, 3, 4, 5, dtype=torch.float32),
        torch.empty(1, 3, 4, 5, dtype=torch.uint8),
        torch.empty(2, 3, 5, 4, dtype=torch.uint8),
        torch.empty(2, 1, 4, 5, dtype=torch.uint8),
        torch.empty(2, 60, dtype=torch.uint8),
    ],
)
def test_a_request_of_another_shape_is_refused(out: Tensor) -> None:
    with pytest.raises(ValueError, match=r"out must be torch.uint8 \(2, 3, 4, 5\), not"):
        of_pixels(PIXELS).read(torch.tensor([0, 1]), None, out)


def test_indices_outside_are_refused(tmp_path: Path) -> None:
    for indices in ([30], [-1]):
        with pytest.raises(IndexError):
            read(of_pixels(PIXELS), indices)


def test_images_and_labels_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be torch.int64 \(30,\), not torch.int64 \(29,\)"):
        in_memory("colours", PIXELS, LABELS[1:], "")
    with pytest.raises(ValueError, match=r"labels must be torch.int64"):
        in_memory("colours", PIXELS, LABELS.int(), "")
    with pytest.raises(ValueError, match=r"pixels must be torch.uint8"):
        in_memory("colours", PIXELS.float(), LABELS, "")
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\)"):
        in_memory("colours", PIXELS[0], None, "")
    with pytest.raises(ValueError, match=r"processed pixels must be .* \(30, 3, 4, 5\), not .* \(30, 1, 4, 5\)"):
        process(of_pixels(PIXELS), lambda pixels, _: pixels[:, :1], "grey")


def test_a_data_set_under_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets.DATASETS, "renamed", lambda config, part: of_pixels(PIXELS))
    with pytest.raises(ValueError, match="DATASETS has the source of pixels under renamed"):
        datasets.load_test(DataConfig(name="renamed"))


def test_classes_are_counted_without_gaps() -> None:
    labels = torch.from_numpy(np.array([0, 4, 4]))
    assert in_memory("few", PIXELS[:3], labels, "").info.classes == 5
    assert in_memory("none", PIXELS[:0], labels[:0], "").info.classes == 0
