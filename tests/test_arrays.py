"""The user's own arrays: each layout and format gives the pixels that numpy and Pillow give; bad files are refused."""

import json
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

from tests.forked import ForkServer
from tests.sources import whole
from tests.test_fuzz import assert_short_line, mutated
from vae_dist.config import DataConfig
from vae_dist.data import array_files, arrays, datasets
from vae_dist.data.source import every_name, read
from vae_dist.errors import UserError

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
        save_file(tensors, path)
    return path


def asked(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(name="array", path=str(path), **changes)


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
        source = arrays.all_images(asked(write(path, images, LABELS)))
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
            source = arrays.all_images(asked(write(tmp_path / "own.npy", layout), channels=1))
            assert np.array_equal(whole(source).pixels[:, 0].numpy(), grey_by_pillow(images))
            assert source.info.processing == "grey, 0 to 1"
    source = arrays.all_images(asked(write(tmp_path / "own.npy", GREY), channels=3))
    assert np.array_equal(whole(source).pixels.numpy(), np.stack([GREY] * 3, 1))


def test_reads_of_many_rows_are_cut_into_small_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = arrays.all_images(asked(write(tmp_path / "own.npy", COLOUR)))
    monkeypatch.setattr("vae_dist.data.array_images.BYTES_AT_ONCE", 200)
    assert np.array_equal(read(source, ODD).numpy(), COLOUR.transpose(0, 3, 1, 2)[ODD])


def test_requests_outside_and_of_other_shapes_are_refused(tmp_path: Path) -> None:
    source = arrays.all_images(asked(write(tmp_path / "own.npy", GREY)))
    for indices in ([30], [-1]):
        with pytest.raises(IndexError):
            read(source, indices)
    for out in (torch.empty(1, 3, 6, 5, dtype=torch.uint8), torch.empty(1, 1, 6, 5)):
        with pytest.raises(ValueError, match=r"out must be torch.uint8"):
            source.read(torch.tensor([0]), None, out)


def test_the_images_are_found_by_name_or_as_the_only_ones(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    for name in ("images", "x", "arr_0", "whatever"):
        np.savez(path, **{name: GREY, "y": LABELS, "weights": np.zeros((3, 3, 3)), "more": np.zeros(30, np.uint8)})  # type: ignore[arg-type]
        source = arrays.all_images(asked(path))
        assert source.info.image_shape == (1, 6, 5) and whole(source).labels.tolist() == LABELS.tolist()
    np.savez(path, first=GREY, second=GREY)
    with pytest.raises(
        UserError, match=r"has 2 arrays \('first' \(30, 6, 5\), 'second' .*name the one with the images"
    ):
        arrays.all_images(asked(path))


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
    parts = [images.pixels.numpy().tobytes() for images in (training, validation, test) for images in [images]]
    rows = [image.numpy().tobytes() for images in (training, validation, test) for image in images.pixels]
    assert len(parts) == 3 and len(set(rows)) == len(rows) == sum(files.values())
    if has_test:
        assert np.array_equal(test.pixels.numpy(), pixels["test"])
    if has_validation:
        assert np.array_equal(validation.pixels.numpy(), next(pixels[name] for name in files if name.startswith("val")))


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no train.npy, train.npz, train.safetensors"):
        datasets.load_test(asked(tmp_path))
    write(tmp_path / "train.npy", GREY, LABELS)
    write(tmp_path / "test.npz", COLOUR)
    with pytest.raises(UserError, match=r"test.npz has images \(3, 6, 5\), but .*train.npy has \(1, 6, 5\)"):
        datasets.load_test(asked(tmp_path))
    assert datasets.load_test(asked(tmp_path, channels=1)).info.classes is None  # the test images have no labels
    write(tmp_path / "train.npz", GREY)
    with pytest.raises(UserError, match=r"several arrays of train images, .*train.npy, .*train.npz; keep one"):
        datasets.load_test(asked(tmp_path))


def test_classes_are_those_of_all_parts(tmp_path: Path) -> None:
    write(tmp_path / "train.npy", GREY[:20], LABELS[:20] % 2)
    write(tmp_path / "test.npy", GREY[20:], LABELS[20:])
    config = asked(tmp_path)
    assert [datasets.load_test(config).info.classes, datasets.load_training(config)[0].info.classes] == [4, 4]


def test_the_identity_follows_pixels_labels_and_channels(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    changed = GREY.copy()
    changed[:, 0, 0] ^= 1
    variants: list[tuple[Array, Array | None, int | None]] = [
        (GREY, None, None), (GREY, LABELS, None), (GREY, LABELS[::-1].copy(), None), (changed, None, None),
        (GREY[:29], None, None), (GREY.reshape(30, 5, 6), None, None), (GREY, None, 3),
    ]  # fmt: skip
    identities = [
        arrays.all_images(asked(write(path, images, labels), channels=channels)).info.identity
        for images, labels, channels in variants
    ]
    assert len(set(identities)) == len(variants)
    elsewhere = write(tmp_path / "moved.npz", GREY)
    assert arrays.all_images(asked(elsewhere)).info.identity == identities[0]


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
    "short npz": ("a.npz", zip_of("x.npy", header(NPY, bytes(7))), "has 7 bytes of numbers"),
    "short tensors": ("a.safetensors", raw(b"123"), "cut off or no safetensors file: it has 3"),
    "tensors cut off": ("a.safetensors", raw(tensors(u8([3, 5, 5], 0, 75), bytes(74))), "is cut off"),
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
        arrays.all_images(asked(path, size=6))
    assert arrays.all_images(asked(write(path, COLOUR[:, :5, :5]), size=5)).info.image_shape == (3, 5, 5)


def test_an_image_shape_decides_between_two_readings(tmp_path: Path) -> None:
    images = RANDOM.integers(0, 256, (9, 3, 8, 1), np.uint8)
    path = write(tmp_path / "own.npy", images)
    first = whole(arrays.all_images(asked(path, image_shape=[1, 3, 8]))).pixels.numpy()
    second = whole(arrays.all_images(asked(path, image_shape=[3, 8, 1]))).pixels.numpy()
    assert np.array_equal(first, images.transpose(0, 3, 1, 2)) and np.array_equal(second, images)


def test_nothing_in_a_file_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    for name in ("a.npy", "a.npz"):
        objects = np.array([Bomb(), Bomb()], dtype=object)
        np.save(tmp_path / name, objects) if name == "a.npy" else np.savez(tmp_path / name, images=objects)
        with pytest.raises(UserError, match="never unpickled"):
            arrays.all_images(asked(tmp_path / name))
    assert not (tmp_path / "run").exists()


def test_a_mapped_file_costs_no_memory(fork_server: ForkServer, tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    count = 2**31 // 4096
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 64, 64), }}"
    raw(header(text), len(header(text)) + 2**31)(path)
    code = (
        "import sys, torch, psutil\n"
        "from vae_dist.config import DataConfig\n"
        "from vae_dist.data import arrays\n"
        "from vae_dist.data.source import read\n"
        "config = DataConfig(name='array', path=sys.argv[1])\n"
        "before = psutil.Process().memory_info().rss\n"
        "source = arrays.all_images(config)\n"
        "assert read(source, range(0, source.info.count, 5000)).sum() == 0\n"
        "print(psutil.Process().memory_info().rss - before)"
    )
    run = fork_server.run("-c", code, str(path))
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
            images = whole(arrays.all_images(asked(path)))
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
