import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from tests.sources import whole
from vae_dist.config import DataConfig
from vae_dist.data import datasets, digit_set, digits
from vae_dist.errors import UserError
from vae_dist.models.tensors import to_unit


def settings(root: Path, **changes: object) -> DataConfig:
    config = DataConfig(name="synthetic_digits", root=str(root), synthetic_images=600, validation_images=100)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_validation_and_training_images_are_disjoint_and_complete(data_root: Path) -> None:
    everything = whole(datasets.load_training(settings(data_root, validation_images=0))[0])
    training, validation = map(whole, datasets.load_training(settings(data_root)))
    assert (len(training.pixels), len(validation.pixels)) == (500, 100)
    assert not rows(training.pixels) & rows(validation.pixels)
    assert rows(training.pixels) | rows(validation.pixels) == rows(everything.pixels)


def test_test_images_are_none_of_the_training_images(data_root: Path) -> None:
    everything = whole(datasets.load_training(settings(data_root, validation_images=0))[0])
    test = whole(datasets.load_test(settings(data_root)))
    assert len(test.pixels) == len(test.labels) == 100
    assert not rows(everything.pixels) & rows(test.pixels)


def test_a_larger_set_begins_with_the_smaller_one(data_root: Path) -> None:
    small = whole(datasets.load_training(settings(data_root, validation_images=0))[0])
    large = whole(datasets.load_training(settings(data_root, validation_images=0, synthetic_images=900))[0])
    assert torch.equal(large.pixels[:600], small.pixels)


def test_images_are_bytes_and_become_floats_from_black_to_white(data_root: Path) -> None:
    training = whole(datasets.load_training(settings(data_root))[0])
    assert training.pixels.dtype == torch.uint8 and training.labels.dtype == torch.int64
    unit = to_unit(training.pixels)
    assert unit.dtype == torch.float32 and unit.min() == 0 and unit.max() == 1


def test_threshold_makes_every_split_binary(data_root: Path) -> None:
    config = settings(data_root, binarize="threshold")
    grey = whole(datasets.load_training(settings(data_root))[0])
    training, validation = map(whole, datasets.load_training(config))
    for images in (training, validation, whole(datasets.load_test(config))):
        assert set(images.pixels.unique().tolist()) == {0, 255}
    assert torch.equal(training.pixels == 255, grey.pixels >= 128)


def test_dynamic_draws_held_out_images_once_and_training_by_the_plan(data_root: Path) -> None:
    config = settings(data_root, binarize="dynamic")
    training, validation = map(whole, datasets.load_training(config))
    assert len(training.pixels.unique()) > 2
    assert set(validation.pixels.unique().tolist()) == {0, 255}
    assert torch.equal(whole(datasets.load_training(config)[1]).pixels, validation.pixels)
    test = whole(datasets.load_test(config))
    assert set(test.pixels.unique().tolist()) == {0, 255}
    assert torch.equal(whole(datasets.load_test(config)).pixels, test.pixels)


def test_digits_are_cached_under_the_root_and_drawn_again_if_damaged(tmp_path: Path) -> None:
    first = whole(datasets.load_test(settings(tmp_path)))
    cache = next((tmp_path / "synthetic_digits").glob("600_*.safetensors"))
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(whole(datasets.load_test(settings(tmp_path))).pixels, first.pixels)
    assert cache.stat().st_size > 1000


def change(pixel: int = 0, **tensors: torch.Tensor) -> Callable[[bytes], bytes]:
    """Return an edit of the cached digits: another first pixel, and other tensors of these names."""

    def changed(content: bytes) -> bytes:
        kept = load(content)
        kept["test_pixels"][0, 0, 0, 0] += pixel
        return save(kept | tensors)

    return changed


def rehashed(content: bytes) -> bytes:
    """Return the content with a matching digest, as an attacker would write it."""
    kept = load(content)
    kept.pop("sha256")
    return save({**kept, "sha256": digit_set._digest(kept)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b'"U8"', b'"F4"'),
        change(pixel=1),
        change(test_pixels=torch.zeros(100, 1, 28, 28, dtype=torch.uint8)),
        change(sha256=torch.zeros(32, dtype=torch.uint8)),
        change(sha256=torch.zeros(0, dtype=torch.uint8)),
        change(more=torch.zeros(1)),
        lambda content: rehashed(change(test_pixels=torch.zeros(99, 1, 28, 28, dtype=torch.uint8))(content)),
        lambda content: rehashed(change(test_pixels=torch.zeros(100, 1, 14, 14, dtype=torch.uint8))(content)),
        lambda content: rehashed(change(test_pixels=torch.zeros(100, 1, 28, 28))(content)),
        lambda content: rehashed(change(test_labels=torch.zeros(100, dtype=torch.int32))(content)),
        lambda content: rehashed(change(more=torch.zeros(1))(content)),
        lambda content: save({name: tensor for name, tensor in load(content).items() if name != "train_labels"}),
        lambda content: save({name: tensor for name, tensor in load(content).items() if name != "sha256"}),
    ],
)
def test_a_changed_cache_of_digits_is_rejected(
    damage: Callable[[bytes], bytes], data_root: Path, tmp_path: Path
) -> None:
    true = whole(datasets.load_test(settings(data_root)))
    (good,) = (data_root / "synthetic_digits").glob("600_*.safetensors")
    cache = tmp_path / "synthetic_digits" / good.name
    cache.parent.mkdir()
    cache.write_bytes(damage(good.read_bytes()))
    images = whole(datasets.load_test(settings(tmp_path)))
    assert torch.equal(images.pixels, true.pixels) and torch.equal(images.labels, true.labels)
    assert cache.read_bytes() == good.read_bytes()


def test_cached_digits_are_read_and_not_drawn(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = whole(datasets.load_test(settings(data_root)))
    monkeypatch.delattr(digit_set, "_draw_digits")
    assert torch.equal(whole(datasets.load_test(settings(data_root))).pixels, true.pixels)


def test_a_renamed_cache_of_another_drawing_is_rejected(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(digits, "drawing_version", lambda: "another")
        datasets.load_test(settings(tmp_path))
    true = whole(datasets.load_test(settings(data_root)))
    (good,) = (data_root / "synthetic_digits").glob("600_*.safetensors")
    other = tmp_path / "synthetic_digits/600_another.safetensors"
    assert torch.equal(load(other.read_bytes())["test_pixels"], true.pixels)
    other.rename(other.with_name(good.name))
    datasets.load_test(settings(tmp_path))
    assert other.with_name(good.name).read_bytes() == good.read_bytes()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "sparse", "dangling"])
def test_no_file_in_the_caches_place_blocks(kind: str, data_root: Path, tmp_path: Path) -> None:
    true = whole(datasets.load_test(settings(data_root)))
    (good,) = (data_root / "synthetic_digits").glob("600_*.safetensors")
    cache = tmp_path / "synthetic_digits" / good.name
    cache.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(cache)
    elif kind == "folder":
        cache.mkdir()
    elif kind == "sparse":
        cache.touch()
        os.truncate(cache, 2**36)
    else:
        cache.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nowhere")
    assert torch.equal(whole(datasets.load_test(settings(tmp_path))).pixels, true.pixels)
    assert not (tmp_path / "nowhere").exists()
    if kind != "folder":
        assert not cache.is_symlink() and cache.read_bytes() == good.read_bytes()


def test_more_digits_than_fit_into_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.synthetic_images=4000000000 would take .* GiB"):
        datasets.load_training_set(settings(tmp_path, synthetic_images=4_000_000_000))


def test_digits_need_no_folder_that_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert len(whole(datasets.load_test(settings(tmp_path / "file"))).labels) == 100


def test_more_validation_images_than_there_are_is_refused(data_root: Path) -> None:
    with pytest.raises(UserError, match="leaves nothing of 600"):
        datasets.load_training(settings(data_root, validation_images=600))


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(
        UserError, match=r"unknown data\.name 'mnits'; choose from array, .*fashion_mnist, .*kmnist, mnist"
    ):
        datasets.check_name("mnits")


def test_an_evaluations_data_set_has_a_known_name_and_shape(data_root: Path) -> None:
    for load_part in (datasets.load_test, datasets.load_training):
        with pytest.raises(UserError, match=r"unknown data\.name 'mnits'"):
            load_part(settings(data_root, name="mnits"))
        with pytest.raises(UserError, match="name the data set"):
            load_part(settings(data_root, name="auto"))
        with pytest.raises(UserError, match=r"data.image_shape=\[3, 2, 2\] but the images of synthetic_digits are"):
            load_part(settings(data_root, image_shape=[3, 2, 2]))


def test_a_root_in_an_unknown_users_home_is_refused() -> None:
    for name in ("synthetic_digits", "kmnist"):
        with pytest.raises(UserError, match=r"data.root=~nobody-of-that-name/data can't be found"):
            datasets.load_test(settings(Path("~nobody-of-that-name/data"), name=name))
