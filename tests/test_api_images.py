"""The images of a run, and pictures of a caller's own, through the Python API."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import vae_dist
from tests.conftest import MakeConfig
from tests.image_folders import numbered, write_images
from vae_dist.api.data import Images
from vae_dist.data import datasets
from vae_dist.data.source import Source, every_label, every_name, read
from vae_dist.errors import UserError

SETTINGS = ("tracking.wandb=disabled", "device=cpu", "train.threads=1", "train.compile=false", "train.steps=1")


def assert_same_images(images: Images, source: Source) -> None:
    pixels = read(source, range(source.info.count))
    assert np.array_equal(images.images.numpy(), pixels.numpy().astype(np.float32) / np.float32(255))
    labels = every_label(source)
    assert (None if images.labels is None else images.labels.tolist()) == (None if labels is None else labels.tolist())
    assert images.names == every_name(source)


def test_the_images_of_each_split_are_those_that_a_training_and_an_evaluation_use(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    given = make_config("name=digits")
    run = vae_dist.fit(*SETTINGS, "name=digits", f"data.root={given.data.root}", "data.name=synthetic_digits",
                       "data.synthetic_images=1200", "model.hidden_dims=[8]")  # fmt: skip
    training, validation = datasets.load_training(run.config.data)
    for split, source in ("train", training), ("validation", validation), ("test", datasets.load_test(run.config.data)):
        assert_same_images(run.images(split), source)  # type: ignore[arg-type]
    first = run.images(count=3)
    assert first.names is None and first.images.shape == (3, 1, 28, 28)
    assert torch.equal(first.images, run.images().images[:3])
    seconds = float(re.search(r"first step is done, (.*) s after the start", capsys.readouterr().err)[1])  # type: ignore[index]
    assert seconds <= time.monotonic() - started + 0.1  # of the training, not of this process; it is rounded
    with pytest.raises(UserError, match="no split 'tests': give train, validation or test"):
        run.images("tests")  # type: ignore[arg-type]
    for few in (0, 2.5, "5"):
        with pytest.raises(UserError, match=f"count={few}: a whole number of at least 1 is needed"):
            run.images(count=few)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="size=32: give the height and the width"):
        run.decode([[0, 0]], size=32)  # type: ignore[arg-type]
    for count in (0, -1):
        with pytest.raises(UserError, match=f"columns={count}: a whole number of at least 1"):
            run.show_images(run.sample(2), columns=count)
    for labels, message in (
        ({"below": ["a"]}, "below has 1 labels for 2 images"),
        ({"below": "abc"}, "below has 3 labels for 2 images"),
        ({"left": "ab", "columns": 2}, "left has 2 labels for 1 rows"),
    ):
        with pytest.raises(UserError, match=message):
            run.show_images(run.sample(2), **labels)


def test_images_of_a_folder_have_names_and_a_picture_shows_their_pixels(tmp_path: Path) -> None:
    write_images(tmp_path / "own", numbered(40, "a/") + numbered(40, "b/"))
    run = vae_dist.fit(*SETTINGS, "name=own", f"data.path={tmp_path / 'own'}", "data.name=folder", "data.size=8",
                       "data.validation_images=0", "train.batch_size=8", "model.architecture=mlp",
                       "objective.reconstruction=gaussian")  # fmt: skip
    images, labels, names = run.images()
    assert names is not None and labels is not None
    assert [name.partition("/")[0] for name in names] == ["ab"[label] for label in labels]
    with pytest.raises(UserError, match="no validation images"):
        run.images("validation")
    # Opening a file by its name gives the run's pixels, and a picture has them, each enlarged to a square.
    files = [tmp_path / "own" / name for name in names]
    assert torch.equal(run.encode(files).mean, run.encode(images).mean)
    drawn = np.asarray(run.show_images(images[:2], columns=2)).astype(int)
    shown = (images[:2] * 255).round().int().permute(0, 2, 3, 1).numpy()
    side = drawn.shape[0] // 10  # two pixels of padding
    for number, expected in enumerate(shown):
        at = (2 + 10 * number) * side
        assert np.array_equal(drawn[2 * side :: side, at : at + 8 * side : side], expected)
    plain = run.show_images(files[:4])
    labelled = run.show_images(files[:4], left=["one", "two"], below=labels[:4].tolist())
    assert labelled.width > plain.width and labelled.height > plain.height
