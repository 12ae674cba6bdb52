from pathlib import Path

import pytest
import torch

from vae_dist import data
from vae_dist.config import DataConfig
from vae_dist.errors import UserError


def settings(root: Path, **changes: object) -> DataConfig:
    asked = DataConfig(name="synthetic_digits", root=str(root), synthetic_images=600, validation_images=100)
    for key, value in changes.items():
        setattr(asked, key, value)
    return asked


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_validation_and_training_images_are_disjoint_and_complete(data_root: Path) -> None:
    everything, _ = data.load_training(settings(data_root, validation_images=0))
    training, validation = data.load_training(settings(data_root))
    assert (len(training.labels), len(validation.labels)) == (500, 100)
    assert not rows(training.pixels) & rows(validation.pixels)
    assert rows(training.pixels) | rows(validation.pixels) == rows(everything.pixels)


def test_test_images_are_none_of_the_training_images(data_root: Path) -> None:
    everything, _ = data.load_training(settings(data_root, validation_images=0))
    test = data.load_test(settings(data_root))
    assert len(test.labels) == 100
    assert not rows(everything.pixels) & rows(test.pixels)


def test_a_larger_set_begins_with_the_smaller_one(data_root: Path) -> None:
    small, _ = data.load_training(settings(data_root, validation_images=0))
    large, _ = data.load_training(settings(data_root, validation_images=0, synthetic_images=900))
    assert torch.equal(large.pixels[:600], small.pixels)


def test_images_are_bytes_and_become_floats_from_black_to_white(data_root: Path) -> None:
    training, _ = data.load_training(settings(data_root))
    assert training.pixels.dtype == torch.uint8 and training.labels.dtype == torch.int64
    unit = data.to_unit(training.pixels)
    assert unit.dtype == torch.float32 and unit.min() == 0 and unit.max() == 1


def test_threshold_makes_every_split_binary(data_root: Path) -> None:
    asked = settings(data_root, binarize="threshold")
    grey, _ = data.load_training(settings(data_root))
    training, validation = data.load_training(asked)
    for images in (training, validation, data.load_test(asked)):
        assert set(images.pixels.unique().tolist()) == {0, 255}
    assert torch.equal(training.pixels == 255, grey.pixels >= 128)


def test_dynamic_leaves_training_to_the_plan_and_draws_held_out_images_once(data_root: Path) -> None:
    asked = settings(data_root, binarize="dynamic")
    training, validation = data.load_training(asked)
    assert len(training.pixels.unique()) > 2
    assert set(validation.pixels.unique().tolist()) == {0, 255}
    assert torch.equal(data.load_training(asked)[1].pixels, validation.pixels)
    test = data.load_test(asked)
    assert set(test.pixels.unique().tolist()) == {0, 255}
    assert torch.equal(data.load_test(asked).pixels, test.pixels)


def test_digits_are_kept_under_the_root_and_drawn_again_when_damaged(tmp_path: Path) -> None:
    first = data.load_test(settings(tmp_path))
    cache = next((tmp_path / "synthetic_digits").glob("600_*.safetensors"))
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(data.load_test(settings(tmp_path)).pixels, first.pixels)
    assert cache.stat().st_size > 1000


def test_digits_need_no_folder_that_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert len(data.load_test(settings(tmp_path / "file")).labels) == 100


def test_more_validation_images_than_there_are_is_refused(data_root: Path) -> None:
    with pytest.raises(UserError, match="leaves nothing of 600"):
        data.load_training(settings(data_root, validation_images=600))


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(UserError, match="unknown dataset 'mnits'; choose from fashion_mnist, kmnist, mnist"):
        data.check_name("mnits")
