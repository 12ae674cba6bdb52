"""The user's own arrays: each layout and format gives the pixels that numpy and Pillow give; bad files are refused."""

import csv
import json
import logging
import math
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from tests.conftest import REPOSITORY, MakeConfig
from tests.conftest import opened as opened_run
from tests.forked import ForkServer
from tests.sources import of_pixels, whole
from tests.test_fuzz import assert_short_line, mutated
from vae_dist.config import DataConfig
from vae_dist.data import array_files, arrays, chosen, datasets
from vae_dist.data.source import DataInfo, InMemory, Source, every_name, read
from vae_dist.errors import RunError, UserError
from vae_dist.evaluation import per_image
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.objectives import elbo_terms
from vae_dist.plan import FIXED_SEED, Stream, bernoulli_pixels, standard_normal
from vae_dist.reports.comparison import compare
from vae_dist.reports.subject import subject_of
from vae_dist.training.loop import train

EVALUATE = str(REPOSITORY / "vae_dist/evaluate.py")
Array = npt.NDArray[Any]
RANDOM = np.random.default_rng(0)
GREY: Array = RANDOM.integers(0, 256, (30, 6, 5), np.uint8)
COLOUR: Array = RANDOM.integers(0, 256, (30, 6, 5, 3), np.uint8)
LABELS = np.arange(30) % 4
ODD = [7, 0, 29, 7, 3]


def write(path: Path, images: Array, labels: Array | None = None, name: str = "images") -> Path:
    """Write an array in the format that the path's ending names."""
    if path.suffix == ".npy":
        np.save(path, images)
        if labels is not None:
            np.save(path.with_name(f"{path.stem}_labels.npy"), labels)
        return path
    tensors = {name: np.ascontiguousarray(images)} | ({} if labels is None else {"labels": labels})
    if path.suffix == ".npz":
        np.savez(path, **tensors)  # type: ignore[arg-type]
    else:
        save_file(tensors, path, {"format": "pt"})  # metadata, which lies among the arrays
    return path


def asked(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(name="array", path=str(path), **changes)


def opened(path: Path, **changes: Any) -> Source:
    return arrays.all_images(asked(path, **changes))


def grey_by_pillow(images: Array) -> Array:
    return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])


@pytest.mark.parametrize("suffix", array_files.SUFFIXES)
def test_every_layout_in_every_format_gives_numpys_pixels(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"own{suffix}"
    cases = [
        (GREY, GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2)), COLOUR.transpose(0, 3, 1, 2)),
    ]
    for images, expected in cases:
        source = opened(write(path, images, LABELS))
        assert source.info.count == 30 and source.info.image_shape == expected.shape[1:]
        assert np.array_equal(whole(source).pixels.numpy(), expected)
        assert np.array_equal(read(source, ODD).numpy(), expected[ODD])
        assert source.info.classes == 4 and whole(source).labels.tolist() == LABELS.tolist()
        assert list(every_name(source) or ()) == [str(number) for number in range(30)]
        assert read(source, []).shape == (0, *expected.shape[1:])


def test_colour_becomes_grey_as_in_pillow_and_grey_becomes_colour(tmp_path: Path) -> None:
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 5, dtype=np.uint8)] * 3), -1).reshape(-1, 52, 52, 3)
    for images in (COLOUR, every):
        for layout in (images, np.ascontiguousarray(images.transpose(0, 3, 1, 2))):
            source = opened(write(tmp_path / "own.npy", layout), channels=1)
            assert np.array_equal(whole(source).pixels[:, 0].numpy(), grey_by_pillow(images))
            assert source.info.processing == "grey, 0 to 1"
    source = opened(write(tmp_path / "own.npy", GREY), channels=3)
    assert np.array_equal(whole(source).pixels.numpy(), np.stack([GREY] * 3, 1))


def test_reads_of_many_rows_are_cut_into_small_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(write(tmp_path / "own.npy", COLOUR))
    monkeypatch.setattr("vae_dist.data.array_images.BYTES_AT_ONCE", 200)
    assert np.array_equal(read(source, ODD).numpy(), COLOUR.transpose(0, 3, 1, 2)[ODD])


def test_requests_outside_and_of_other_shapes_are_refused(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "own.npy", GREY))
    for indices in ([30], [-1]):
        with pytest.raises(IndexError):
            read(source, indices)
    for out in (torch.empty(1, 3, 6, 5, dtype=torch.uint8), torch.empty(1, 1, 6, 5)):
        with pytest.raises(ValueError, match=r"out must be torch.uint8"):
            source.read(torch.tensor([0]), None, out)


def test_the_images_are_found_by_name_or_as_the_only_ones(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    for name in ("images", "x", "arr_0", "größe"):
        np.savez(path, **{name: GREY, "y": LABELS, "weights": np.zeros((3, 3, 3)), "more": np.zeros(30, np.uint8)})  # type: ignore[arg-type]
        source = opened(path)
        assert source.info.image_shape == (1, 6, 5) and whole(source).labels.tolist() == LABELS.tolist()
    np.savez(path, first=GREY, second=GREY)
    with pytest.raises(
        UserError, match=r"has 2 arrays \('first' \(30, 6, 5\), 'second' .*name the one with the images"
    ):
        opened(path)


@pytest.mark.parametrize(("files", "has_validation", "has_test"), [
    ({"train": 20}, False, False), ({"train": 20, "val": 4}, True, False), ({"train": 20, "test": 6}, False, True),
    ({"train": 20, "valid": 4, "test": 6}, True, True), ({"train": 20, "validation": 4}, True, False),
])  # fmt: skip
def test_parts_are_files_or_are_held_out(
    files: dict[str, int], has_validation: bool, has_test: bool, tmp_path: Path
) -> None:
    start = 0
    pixels = {}
    for part, count in files.items():
        write(tmp_path / f"{part}.npy", GREY[start : start + count], LABELS[start : start + count])
        pixels[part] = GREY[start : start + count, None]
        start += count
    config = asked(tmp_path)
    test = whole(datasets.load_test(config))
    training, validation = map(whole, datasets.load_training(config))
    assert datasets.has_validation_part(config) == has_validation
    assert (len(test.pixels), len(validation.pixels)) == (
        6 if has_test else 2,
        4 if has_validation else 20 // 10 - (not has_test),
    )
    rows = [image.numpy().tobytes() for images in (training, validation, test) for image in images.pixels]
    assert len(set(rows)) == len(rows) == sum(files.values())
    if has_test:
        assert np.array_equal(test.pixels.numpy(), pixels["test"])
    if has_validation:
        assert np.array_equal(validation.pixels.numpy(), next(pixels[name] for name in files if name.startswith("val")))


def test_parts_that_do_not_belong_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vae_dist"), "propagate", True)
    with pytest.raises(UserError, match=r"has no train.npy, train.npz, train.safetensors"):
        datasets.load_test(asked(tmp_path))
    write(tmp_path / "train.npy", GREY, LABELS)
    write(tmp_path / "test.npz", COLOUR)
    with pytest.raises(UserError, match=r"test.npz has images \(3, 6, 5\), but .*train.npy has \(1, 6, 5\)"):
        datasets.load_test(asked(tmp_path))
    assert datasets.load_test(asked(tmp_path, channels=1)).info.classes is None
    assert "the labels are not used, as 1 parts have none" in caplog.text
    write(tmp_path / "train.npz", GREY)
    with pytest.raises(UserError, match=r"several arrays of train images, .*train.npy, .*train.npz; keep one"):
        datasets.load_test(asked(tmp_path))


def test_classes_are_those_of_all_parts(tmp_path: Path) -> None:
    write(tmp_path / "train.npy", GREY[:20], LABELS[:20] % 2)
    config = asked(Path("~"))  # the home is this folder
    identities = set()
    for classes in (3, 4):
        write(tmp_path / "test.npy", GREY[20:], LABELS[20:] % classes)
        assert datasets.load_test(config).info.classes == datasets.load_training(config)[0].info.classes == classes
        identities.add(arrays.load(config, "train").info.identity)
    assert len(identities) == 2


@pytest.mark.parametrize("suffix", array_files.SUFFIXES)
def test_labels_of_any_integers_are_the_same_labels(suffix: str, tmp_path: Path) -> None:
    kinds = [f"{order}{sign}{size}" for order in "<>" for sign in "iu" for size in (1, 2, 4, 8)]
    for kind in kinds if suffix != ".safetensors" else kinds[:8]:  # which has one byte order
        labels = LABELS * (min(np.iinfo(kind).max, 2**16 - 1) // 3)
        source = opened(write(tmp_path / f"a{suffix}", GREY, labels.astype(kind)))
        assert whole(source).labels.tolist() == labels.tolist()


def test_a_header_of_the_second_version_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, GREY, version=(2, 0))
    assert np.array_equal(whole(opened(tmp_path / "a.npy")).pixels[:, 0].numpy(), GREY)


def test_the_identity_follows_pixels_labels_and_channels(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    changed = GREY.copy()
    changed[:, 0, 0] ^= 1
    variants: list[tuple[Array, Array | None, int | None]] = [
        (GREY, None, None), (GREY, LABELS, None), (GREY, LABELS[::-1].copy(), None), (changed, None, None),
        (GREY[:29], None, None), (GREY.reshape(30, 5, 6), None, None), (GREY, None, 3),
    ]  # fmt: skip
    identities = [
        opened(write(path, images, labels), channels=channels).info.identity for images, labels, channels in variants
    ]
    assert len(set(identities)) == len(variants)
    elsewhere = write(tmp_path / "moved.npz", GREY)
    assert opened(elsewhere).info.identity == identities[0]


Make = Callable[[Path], object]


def header(text: str, body: bytes = b"", version: bytes = b"\1\0") -> bytes:
    length = len(text).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + length + text.encode() + body


def tensors(entries: Any, body: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def u8(shape: Any, *offsets: int) -> dict[str, Any]:
    return {"images": {"dtype": "U8", "shape": shape, "data_offsets": list(offsets)}}


def npy(images: Any) -> Make:
    return lambda path: np.save(path, images, allow_pickle=True)


def npz(**tensors: Any) -> Make:
    return lambda path: np.savez(path, **tensors)


def raw(content: bytes, size: int | None = None) -> Make:
    """The file with this content; longer by a hole if a size is given."""

    def make(path: Path) -> None:
        path.write_bytes(content)
        os.truncate(path, size or len(content))

    return make


def with_labels(path: Path) -> None:
    np.save(path, GREY)
    path.with_name("a_labels.npy").write_text("text")


def zip_of(name: str, content: bytes, **options: Any) -> Make:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", **options) as archive:
            archive.writestr(name, content)

    return make


def zip_with_list(path: Path) -> None:
    """A sparse archive whose list of members claims to have a GiB."""
    raw(b"", 2**30)(path)
    with path.open("ab") as file:
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**30, 0, 0))


NPY = "{'descr': '|u1', 'fortran_order': False, 'shape': (30, 6, 5), }"
SHAPE = NPY.replace  # of the header
BF16 = {"x": {"dtype": "BF16", "shape": [1, 1, 2], "data_offsets": [0, 4]}}
REFUSED: dict[str, tuple[str, Make, str]] = {
    "missing": ("a.npy", lambda path: None, r"a.npy can't be read \(No such file or directory\)"),
    "another format": ("a.h5", raw(b"x"), "is no array by its name: give a .npy, .npz, .safetensors file"),
    "folder": ("a.npz", lambda path: path.mkdir(), r"has no train.npy"),
    "pipe": ("a.npy", os.mkfifo, "can't be read .Is not a regular file"),
    "device": ("a.npy", lambda path: path.symlink_to("/dev/zero"), "can't be read .Is not a regular file"),
    "no bytes": ("a.npy", raw(b""), "is empty; write it again"),
    "html": ("a.npy", raw(b"<html>" * 20), "does not begin as a .npy array"),
    "float": ("a.npy", npy(GREY / 255), r"are 'float64', not uint8: save \(images \* 255\)"),
    "not a number": ("a.npy", npy(GREY * np.float32("nan")), r"float32.*save \(images \* 255\)"),
    "16 bits": ("a.npy", npy(GREY.astype(">u2")), r"'uint16', not uint8: save \(images >> 8\)"),
    "bool": ("a.npy", npy(GREY > 9), r"'bool', not uint8: save images.astype\('uint8'\) \* 255"),
    "int64": ("a.npy", npy(GREY.astype(int)), "'int64', not uint8: save images.astype"),
    "bfloat16": ("a.safetensors", raw(tensors(BF16, b"1234")), "'BF16', not uint8"),
    "objects": ("a.npy", npy(np.array([{}, 1])), "holds Python objects, which are never unpickled"),
    "structured": ("a.npy", npy(np.zeros(9, "u1,u1")), "void16', not uint8"),
    "subarrays": ("a.npy", raw(header(SHAPE("'|u1'", "('|u1', (9,))"))), "has 0 bytes of numbers where its header"),
    "Fortran": ("a.npy", npy(np.asfortranarray(GREY)), "Fortran order: save numpy.ascontig"),
    "no images": ("a.npy", npy(GREY[:0]), r"is empty: its shape is \(0, 6, 5\)"),
    "one number": ("a.npy", npy(np.uint8(1)), r"its shape is \(\): images are \(N, H, W\)"),
    "rows": ("a.npy", npy(GREY.reshape(30, 30)), r"its shape is \(30, 30\): images are"),
    "video": ("a.npy", npy(GREY[None, None]), r"images are \(N, H, W\), .* 1 or 3 channels"),
    "two channels": ("a.npy", npy(GREY.reshape(15, 2, 6, 5)), "with 1 or 3 channels"),
    "alpha": ("a.npy", npy(np.zeros((9, 8, 8, 4), np.uint8)), "has 4 channels: blend the images"),
    "one image": ("a.npy", npy(COLOUR[0]), r"may be one image or 6 grey ones: save images\[None\]"),
    "planes": ("a.npy", npy(GREY[:3]), r"may be one image or 3 grey ones"),
    "two readings": (
        "a.npy", npy(np.zeros((9, 3, 8, 1), np.uint8)),
        r"is \(N, H, W, C\), data.image_shape=\[1, 3, 8\] or \(N, C, H, W\), data.image_shape=\[3, 8, 1\]: give",
    ),
    "two equal readings": ("a.npy", npy(np.zeros((9, 3, 3, 3), np.uint8)), r"data.image_shape=\[3, 3, 3\]: pad the im"),
    "cut off": ("a.npy", raw(header(NPY, bytes(899))), "has 899 bytes of numbers where its header promises 900"),
    "trailing": ("a.npy", raw(header(NPY, bytes(901))), "has 901 bytes of numbers where"),
    "enormous": ("a.npy", raw(header(SHAPE("30", "9" * 18))), "promises 2999999999999999997"),
    "impossible": ("a.npy", raw(header(SHAPE("30", "9" * 400))), "impossible shape"),
    "negative": ("a.npy", raw(header(SHAPE("30", "-30"))), "impossible shape"),
    "nested": ("a.npy", raw(header("(" * 60000)), "does not begin as a .npy array"),
    "huge header": ("a.npy", raw(header(NPY, b"", b"\2\0")[:8] + b"\xff" * 4, 2**33), "header that is too large"),
    "compressed": ("a.npz", lambda path: np.savez_compressed(path, x=GREY), "'x.npy' is compressed.*numpy.savez"),
    "bomb": ("a.npz", zip_of("x.npy", bytes(2**24), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "no arrays": ("a.npz", zip_of("x.txt", b"text"), "has 0 arrays"),
    "no zip": ("a.npz", raw(b"PK" * 99), "no whole .npz archive"),
    "huge list": ("a.npz", zip_with_list, "list of arrays has more than 1048576 bytes"),
    "damaged npz": ("a.npz", lambda path: path.write_bytes(b"XX" + zipped(header(NPY, bytes(900)))[2:]), "is damaged"),
    "short npz": ("a.npz", zip_of("x.npy", header(NPY, bytes(7))), "has 7 bytes of numbers"),
    "short tensors": ("a.safetensors", raw(b"123"), "cut off or no safetensors file: it has 3"),
    "tensors cut off": ("a.safetensors", raw(tensors(u8([3, 5, 5], 0, 75), bytes(74))), "is cut off"),
    "tensors in the header": ("a.safetensors", raw(tensors(u8([3, 5, 5], -1, 74), bytes(75))), "is cut off"),
    "tensors' size": ("a.safetensors", raw(tensors(u8([3, 5, 5], 0, 74), bytes(75))), "has 74 bytes"),
    "tensors' header": ("a.safetensors", raw(struct.pack("<Q", 2**32), 2**33), "promises a header of 4294967296"),
    "many dimensions": ("a.safetensors", raw(tensors(u8([1] * 10000, 0, 1), b"1")), "impossible shape"),
    "not JSON": ("a.safetensors", raw(struct.pack("<Q", 5) + b"nope!"), "header is not that of"),
    "a list": ("a.safetensors", raw(tensors([1])), "header is not that of"),
    "deep": ("a.safetensors", raw(struct.pack("<Q", 90000) + b"[" * 90000), "header is not that of"),
    "labels' number": ("a.npz", npz(x=GREY, y=LABELS[1:]), r"integers of shape \(30,\), .*'int64' of shape \(29,\)"),
    "labels' kind": ("a.npz", npz(x=GREY, y=LABELS / 1), r"integers of shape \(30,\), .*'float64'"),
    "labels' range": ("a.npz", npz(x=GREY, y=LABELS - 1), "from -1 to 2; they must be from 0 to 65535"),
    "labels' size": ("a.npz", npz(x=GREY, y=LABELS.astype(np.uint64) + 2**63), "save numpy.unique"),
    "labels' file": ("a.npy", with_labels, "a_labels.npy can't be used: it does not begin as"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_can_not_be_used_is_named_with_a_remedy(case: str, tmp_path: Path) -> None:
    name, make, message = REFUSED[case]
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as refusal:
        datasets.load_test(asked(tmp_path / name))
    assert_short_line(str(refusal.value))


def test_another_size_is_refused_and_the_same_one_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "own.npy", GREY)
    with pytest.raises(UserError, match=r"have 6 x 5 pixels, and arrays are not resized: leave out data.size=6"):
        opened(path, size=6)
    assert opened(write(path, COLOUR[:, :5, :5]), size=5).info.image_shape == (3, 5, 5)


def test_an_image_shape_decides_between_two_readings(tmp_path: Path) -> None:
    images = RANDOM.integers(0, 256, (9, 3, 8, 1), np.uint8)
    path = write(tmp_path / "own.npy", images)
    first = whole(opened(path, image_shape=[1, 3, 8])).pixels.numpy()
    second = whole(opened(path, image_shape=[3, 8, 1])).pixels.numpy()
    assert np.array_equal(first, images.transpose(0, 3, 1, 2)) and np.array_equal(second, images)


def test_images_of_one_pixel_are_read_once_saved_as_the_message_says(tmp_path: Path) -> None:
    images = GREY[:, :1, :1]
    with pytest.raises(UserError, match=r"save images\[None\] for one image, images\[:, None\] for grey ones"):
        opened(write(tmp_path / "own.npy", images))
    assert np.array_equal(whole(opened(write(tmp_path / "own.npy", images[:, None]))).pixels.numpy(), images[:, None])
    one = whole(opened(write(tmp_path / "own.npy", images[None]))).pixels.numpy()
    assert np.array_equal(one, images[None].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("suffix", array_files.SUFFIXES)
def test_a_file_that_is_overwritten_is_not_read_on(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"own{suffix}", GREY)
    content, time = path.read_bytes(), (1, 1)
    os.utime(path, ns=time)
    source = opened(path)
    for change in content[:-1] + b"?", content[:-8], b"":  # of a shorter one the kernel has no pages: SIGBUS
        path.write_bytes(change)
        with pytest.raises(RunError, match=f"own{suffix} has changed since the start; put it back"):
            read(source, ODD)
        path.write_bytes(content)
        os.utime(path, ns=time)
        assert np.array_equal(read(source, ODD)[:, 0].numpy(), GREY[ODD])


def test_a_file_that_another_replaces_or_that_is_deleted_keeps_its_images(tmp_path: Path) -> None:
    path = write(tmp_path / "own.npy", GREY)
    source = opened(path)
    write(tmp_path / "other.npy", GREY[::-1]).rename(path)
    assert np.array_equal(whole(source).pixels[:, 0].numpy(), GREY)
    path.unlink()
    assert np.array_equal(whole(source).pixels[:, 0].numpy(), GREY)


def test_a_mapped_file_is_closed_with_its_source(tmp_path: Path) -> None:
    path = write(tmp_path / "own.npy", GREY)
    source = opened(path)
    assert str(path) in open_files()
    del source
    assert str(path) not in open_files()


def open_files() -> list[str]:
    """The paths of this process's descriptors."""
    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def test_nothing_in_a_file_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    for name in ("a.npy", "a.npz"):
        objects = np.array([Bomb(), Bomb()], dtype=object)
        np.save(tmp_path / name, objects) if name == "a.npy" else np.savez(tmp_path / name, images=objects)
        with pytest.raises(UserError, match="never unpickled"):
            opened(tmp_path / name)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mapped_file_costs_no_memory(fork_server: ForkServer, tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    count = 2**31 // 4096
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 64, 64), }}"
    raw(header(text), len(header(text)) + 2**31)(path)
    code = (
        "import sys\nsys.path.insert(0, sys.argv[2])\n"
        "import torch, psutil\n"
        "from vae_dist.config import DataConfig\n"
        "from vae_dist.data import arrays\n"
        "from vae_dist.data.source import read\n"
        "config = DataConfig(name='array', path=sys.argv[1])\n"
        "before = psutil.Process().memory_info().rss\n"
        "source = arrays.all_images(config)\n"
        "assert read(source, range(0, source.info.count, 5000)).sum() == 0\n"
        "print(psutil.Process().memory_info().rss - before)"
    )
    run = fork_server.run("-c", code, str(path), str(REPOSITORY))
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 2**26


def valid(suffix: str) -> bytes:
    images, labels = GREY[:4, :3, :2], LABELS[:4]
    folder = Path("valid")
    folder.mkdir(exist_ok=True)
    return write(folder / f"a{suffix}", images, labels).read_bytes()


@pytest.mark.parametrize("depth", [1, pytest.param(20, marks=pytest.mark.slow)], ids=["quick", "deep"])
@pytest.mark.parametrize("suffix", array_files.SUFFIXES)
def test_any_file_is_read_whole_or_refused_in_one_line(suffix: str, depth: int, tmp_path: Path) -> None:
    torch.set_flush_denormal(False)
    good = valid(suffix)
    path = tmp_path / f"a{suffix}"
    numbers = st.sampled_from([0, 1, 2, 3, 4, 24, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64, -1, 10**400])
    shapes = st.lists(numbers, max_size=5).map(tuple)
    kinds = st.sampled_from(
        ["'|u1'", "'|O'", "'<f8'", "'<i8'", "('|u1', (3,))", "[('a', '|u1')]", "'<U9'", "x", "'|V0'"]
    )
    headers = st.builds(
        lambda kind, shape, more: header(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}", bytes(more)),
        kinds, shapes, st.sampled_from([0, 24, 32]),
    )  # fmt: skip
    if suffix == ".npz":
        headers = headers.map(zipped)
    if suffix == ".safetensors":
        entry = st.fixed_dictionaries({
            "dtype": st.sampled_from(["U8", "I64", "BF16", "F4", ""]), "shape": shapes,
            "data_offsets": st.lists(numbers, max_size=3),
        })  # fmt: skip
        entries = st.dictionaries(st.sampled_from(["images", "labels", "__metadata__"]), entry | numbers, max_size=3)
        headers = entries.map(lambda header: tensors(header, bytes(24)))

    @settings(max_examples=150 * depth)
    @given(mutated(st.just(good), st.binary(max_size=9)) | headers)
    def claim(content: bytes) -> None:
        path.write_bytes(content)
        tracemalloc.start()
        try:
            images = whole(opened(path))
        except UserError as error:
            assert_short_line(str(error))
            assert str(path) in str(error)
        else:
            assert images.pixels.numel() <= 3 * len(content)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2**24

    claim()


def zipped(content: bytes) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", content)
    return file.getvalue()


def own_arguments(path: Path) -> list[str]:
    return [
        "data.name=array",
        f"data.path={path}",
        "train.batch_size=10",
        "train.steps=4",
        "data.validation_images=null",
    ]


def test_a_run_on_an_array_trains_resumes_and_is_evaluated_image_by_image(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = RANDOM.integers(0, 256, (60, 28, 28), np.uint8)
    path = write(tmp_path / "own.npz", images, np.arange(60) % 3)
    run_dir = train(make_config("name=own", *own_arguments(path)))
    assert train(make_config("name=own", *own_arguments(path), "train.steps=6")) == run_dir
    result = evaluate(run_dir, ["evaluate.importance_samples=2"])
    assert (result["dataset"], result["split"], result["images"]) == ("own.npz", "test", 6)
    held_out = list(every_name(datasets.load_test(asked(path))) or ())
    table = rows(run_dir / "evaluations/step_00000006_test_k2.csv")
    assert sorted(int(row["name"]) for row in table) == sorted(map(int, held_out))
    metrics = ["mean_squared_error", "psnr", "negative_elbo", "reconstruction", "kl", "ssim", "negative_log_likelihood"]
    assert list(table[0]) == ["name", "label", *metrics]
    for metric in metrics:
        assert np.mean([float(row[metric]) for row in table]) == pytest.approx(result[metric], rel=1e-12)
    errors = [float(row["mean_squared_error"]) for row in table]
    assert errors == sorted(errors, reverse=True)
    unrounded = [-10 * math.log10(error) for error in errors]
    assert [float(row["psnr"]) for row in table] == pytest.approx(unrounded, rel=1e-3)
    assert all(row["label"] == str(int(row["name"]) % 3) for row in table)
    assert f"the largest mean squared errors: {table[0]['name']} (" in capsys.readouterr().err
    changed = images.copy()
    changed[:] = 255 - images
    write(path, changed, np.arange(60) % 3)
    with pytest.raises(UserError, match=r"are not those that run own was started with"):
        train(make_config("name=own", *own_arguments(path), "train.steps=8"))


def test_an_array_in_memory_trains_bitwise_as_a_mapped_one(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = RANDOM.integers(0, 256, (60, 28, 28, 3), np.uint8)
    settings = [*own_arguments(write(tmp_path / "own.npy", images)), "data.channels=1", "data.flip=true"]
    in_memory = train(make_config("name=in_memory", *settings))
    config = asked(tmp_path / "own.npy", channels=1)
    assert all(isinstance(source, InMemory) for source in (*datasets.load_training(config), datasets.load_test(config)))
    monkeypatch.setattr("vae_dist.data.source.MEMORY_SHARE", 2**60)
    assert not isinstance(datasets.load_training(config)[0], InMemory)
    mapped = train(make_config("name=mapped", *settings))
    files = [run / "checkpoints/step_00000004/model.safetensors" for run in (in_memory, mapped)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_folder_and_an_array_of_its_pixels_have_equal_evaluations(make_config: MakeConfig, tmp_path: Path) -> None:
    run_dir = train(make_config("name=digits", "train.steps=2"))
    images = RANDOM.integers(0, 256, (5, 28, 28), np.uint8)
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"pictures/{number}.png")
    settings = ["evaluate.importance_samples=2", "data.pack=never"]
    results = [
        evaluate(run_dir, [f"evaluate.folder={path}", *settings])
        for path in (tmp_path / "pictures", write(tmp_path / "own.npy", images))
    ]
    names = ("images", "negative_elbo", "negative_log_likelihood", "psnr", "standard_errors", "kl_per_latent")
    assert [results[0][name] for name in names] == [results[1][name] for name in names]
    [table] = [rows(path) for path in (run_dir / "evaluations").glob("*_folder_pictures-*_k2.csv")]
    assert sorted(row["name"] for row in table) == [f"{number}.png" for number in range(5)]


def test_any_run_is_evaluated_on_other_images(make_config: MakeConfig, tmp_path: Path) -> None:
    """The oracle: the ELBO of the images one by one."""
    run_dir = train(make_config("name=digits", "train.steps=2"))
    images = RANDOM.integers(0, 256, (7, 28, 28, 3), np.uint8)
    path = write(tmp_path / "=other.npy", images)
    before = {item: item.read_bytes() for item in run_dir.rglob("*") if item.is_file() and item.name != "log.txt"}
    result = evaluate(run_dir, [f"evaluate.folder={path}", "evaluate.importance_samples=0"])
    assert (result["images"], result["dataset"], result["split"]) == (7, "=other.npy", "all")
    assert (result["protocol"]["dataset"], result["protocol"]["split"]) == ("=other.npy", "all")
    assert "on the same pixels of =other.npy, not with papers" in result["warning"]
    added = [item for item in run_dir.rglob("*") if item.is_file() and item not in before and item.name != "log.txt"]
    assert sorted(item.suffix for item in added) == [".csv", ".json"]
    assert all(item.name.startswith("step_00000002_folder_-other.npy-") for item in added)
    assert all(item.read_bytes() == content for item, content in before.items())  # evaluation.json, metrics, pictures
    run = opened_run(run_dir)
    vae = run.checkpoint.load_vae(run.config, torch.device("cpu"))
    values = []
    for index, grey in enumerate(grey_by_pillow(images)):
        image = torch.from_numpy(grey).view(1, 1, 28, 28).float() / 255
        noise = standard_normal(FIXED_SEED, Stream.EVALUATION, 0, range(index, index + 1), vae.latent_dim)
        values.append(elbo_terms(vae(image, noise.unsqueeze(0)), image).negative_elbo.item())
    assert result["negative_elbo"] == pytest.approx(np.mean(values), abs=1e-3)
    subject = subject_of(run)
    assert not subject.evaluation  # a report shows the run's own images
    with pytest.raises(UserError, match=r"compared on their own images: leave out evaluate\.folder"):
        compare([run_dir], [f"evaluate.folder={path}"])


@pytest.mark.slow
def test_an_evaluation_of_single_images_is_bitwise_the_same_at_any_number_of_processes(
    fork_server: ForkServer, make_config: MakeConfig, tmp_path: Path
) -> None:
    run_dir = train(make_config("name=digits", "train.steps=1"))
    path = write(tmp_path / "other.npy", RANDOM.integers(0, 256, (50, 28, 28), np.uint8))
    written = []
    for size in (1, 3):
        arguments = [f"evaluate.folder={path}", "evaluate.importance_samples=2", "evaluate.batch_size=7"]
        arguments += [f"output={tmp_path / str(size)}", "train.threads=1", "device=cpu"]
        results = fork_server.launch(size, EVALUATE, str(run_dir), *arguments)
        assert [result.returncode for result in results] == [0] * size, results[0].stderr
        written.append({item.name: item.read_bytes() for item in (tmp_path / str(size) / "evaluations").iterdir()})
    assert written[0] == written[1] and len(written[0]) == 2


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("gone.npy", None, r"evaluate.folder=.*gone.npy does not exist; give a folder"),
        ("small.npy", GREY, r"are \[1, 6, 5\], but the run's are \[1, 28, 28\] .*: resize them"),
        ("floats.npy", GREY / 255, r"not uint8"),
    ],
)
def test_other_images_that_do_not_fit_the_run_are_refused(
    name: str, images: Array | None, message: str, tmp_path: Path
) -> None:
    if images is not None:
        write(tmp_path / name, images)
    with pytest.raises(UserError, match=message):
        chosen.of_folder(DataConfig(name="mnist", image_shape=[1, 28, 28]), str(tmp_path / name), "evaluate.folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"\[1, 6, 5\], and those of a folder are square"):
        chosen.of_folder(DataConfig(name="mnist", image_shape=[1, 6, 5]), str(tmp_path / "folder"), "evaluate.folder")


def test_other_images_are_binarised_like_the_runs_test_images(tmp_path: Path) -> None:
    path = write(tmp_path / "own.npy", GREY).rename(tmp_path / "OWN.NPY")
    config = DataConfig(name="mnist", image_shape=[1, 6, 5], binarize="dynamic")
    drawn = whole(chosen.of_folder(config, str(path), "evaluate.folder")).pixels
    assert torch.equal(drawn, bernoulli_pixels(torch.from_numpy(GREY[:, None]), FIXED_SEED, 1, range(30)))


def test_a_spreadsheet_computes_no_name_or_label() -> None:
    names = ["=1+1.png", "+a", "-b", "@c", 'd,"e"', "f"]
    pixels = torch.zeros(6, 1, 1, 1, dtype=torch.uint8)
    info = DataInfo("own", 6, (1, 1, 1), 2, "grey", "", ("=cmd", "fine"))
    source = InMemory(info, pixels, torch.tensor([0, 1] * 3), names)
    by_image = dict.fromkeys((*per_image.FIRST, "kl"), torch.tensor([6.0, 5, 4, 3, 2, 2], dtype=torch.float64) / 3)
    table = list(csv.DictReader((per_image.to_csv(source, by_image) or b"").decode().splitlines()))
    assert [row["name"] for row in table] == ["'=1+1.png", "'+a", "'-b", "'@c", 'd,"e"', "f"]
    assert [row["label"] for row in table] == ["'=cmd", "fine"] * 3
    assert [float(row["kl"]) for row in table] == by_image["kl"].tolist()
    assert [per_image.harmless(text) for text in ("\t=1", "\r=1", "1=1")] == ["'\t=1", "'\r=1", "1=1"]
    assert per_image.worst(source, by_image) == "=1+1.png (2), +a (1.67), -b (1.33)"
    assert (
        per_image.to_csv(of_pixels(pixels), by_image) is None and per_image.worst(of_pixels(pixels), by_image) is None
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
