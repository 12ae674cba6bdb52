"""The index of a folder: what is listed, what is refused, and that no folder makes it endless or large."""

import os
import socket
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.test_fuzz import assert_short_line
from tests.test_pixels import encoded, photograph
from vae_dist.data import decoding, folder_index, folder_walk
from vae_dist.data.decoding import checked
from vae_dist.data.folder_index import FolderIndex, advice, refusal
from vae_dist.errors import UserError

IMAGE = encoded(Image.new("RGB", (2, 3)))


def lay_out(folder: Path, *names: str, content: bytes = IMAGE) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def scan(folder: Path, threads: int | None = None) -> FolderIndex:
    return checked(folder_index.listed(folder), threads)


def listed(index: FolderIndex) -> list[str]:
    return index.names(range(len(index)))


def test_images_in_any_depth_are_listed_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    names = [
        "b.png", "a/c.JPG", "a-b/c.webp", "a/b/c/d/e.jpeg", "a.png", "a b.png", "ä.png", "Z.apng", "😀.png", "a/1.jfif",
        "Bild\u202f9.png", "a0/x.png", "a\\b.png",
    ]  # fmt: skip
    lay_out(tmp_path, *names)
    index = scan(tmp_path)
    assert listed(index) == sorted(names, key=str.encode) and not index.refused and not index.unread
    for k, name in enumerate(sorted(names, key=str.encode)):
        status = (tmp_path / name).stat()
        assert index.name(k) == name and index.path(k) == tmp_path / name
        assert (index.sizes[k], index.mtimes[k]) == (status.st_size, status.st_mtime_ns)
    assert index.names(np.array([3, 1])) == [index.name(3), index.name(1)]
    assert index.sizes.dtype == index.mtimes.dtype == index.offsets.dtype == np.int64


def test_what_systems_and_people_put_beside_images_is_left_out_or_counted(tmp_path: Path) -> None:
    lay_out(tmp_path, "a.png", ".hidden.png", ".folder/a.png", "Thumbs.db", "desktop.ini", "@eaDir/a.jpg/SMALL.jpg")
    lay_out(tmp_path, "__MACOSX/._a.png", "labels.csv", "a/readme.TXT", "LICENSE", "b.heic", "c.HEIC", "d.tif", "e.gif")
    lay_out(tmp_path, "odd.\x1b[2J")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "notes.txt").symlink_to("labels.csv")
    index = scan(tmp_path)
    assert listed(index) == ["a.png"] and not index.refused
    assert index.unread == {"heic": 2, "tif": 1, "gif": 1, "csv": 1, "txt": 2, "": 3}
    text = advice(index)
    assert_short_line(text)
    assert "2 .heic (export them as JPEG" in text and "1 .gif, 1 .tif (save them as PNG)" in text
    assert text.endswith("6 that are no image")
    assert advice(scan(lay_out(tmp_path / "only", "a.png"))) == ""


def test_what_can_not_be_used_is_refused_by_name(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "images", "good.png")
    lay_out(folder, "half.png", content=IMAGE[:30])
    lay_out(folder, "page.jpg", content=b"<html>")
    lay_out(folder, "empty.webp", content=b"")
    lay_out(folder, "line\n.png", "bell\x07/a.png", "left\u202egpj.png")
    (folder / "link.png").symlink_to("good.png")
    (folder / "broken.png").symlink_to("nothing")
    (folder / "again").symlink_to(".")
    (folder / "more").symlink_to(lay_out(tmp_path / "elsewhere", "a.png"))
    os.mkfifo(folder / "pipe.png")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write(IMAGE)
    monster = folder / "large.png"
    with open(monster, "wb") as file:
        file.truncate(2**40)
    index = scan(folder)
    assert listed(index) == ["good.png"] and len(index.sizes) == len(index.mtimes) == 1
    link = "a link; copy the file, or give its folder"
    assert dict(index.refused) == {
        "half.png": "cut off: the file ends before the image does", "page.jpg": "not an image, but HTML or XML",
        "empty.webp": "empty", "line\\n.png": "its name has the character '\\n'; rename it",
        "bell\\x07/a.png": "its name has the character '\\x07'; rename it",
        "left\\u202egpj.png": "its name has the character '\\u202e'; rename it", "link.png": link, "broken.png": link,
        "again": link, "more": link, "pipe.png": "not a regular file", "\\xff.png": "its name is not UTF-8; rename it",
        "large.png": "more than 256 MiB",
    }  # fmt: skip
    assert list(index.refused) == sorted(index.refused)
    message = refusal(index)
    assert_short_line(message)
    assert message.startswith(f"13 of 14 images in {folder} can't be used: ") and "and 3 more" in message
    assert all(f"{name} ({reason})" in message for name, reason in index.refused[:10])
    assert "data.skip_damaged=true" in message


def test_a_message_of_long_names_stays_short(tmp_path: Path) -> None:
    lay_out(tmp_path, *(f"{'n' * 200}/{'m' * 200}/{k}.png" for k in range(30)), content=b"<")
    message = refusal(scan(tmp_path))
    assert_short_line(message)
    assert "m/0.png (" in message and "and 20 more" in message


def test_a_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.png")  # in the test's own folder: the path must be short
        assert scan(Path()).refused == (("a.png", "not a regular file"),)


def test_folders_that_can_not_be_listed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, "a/b.png", "c/d.png", "e.png")
    entries = folder_walk._entries

    def guarded(folder: bytes) -> object:
        if folder.endswith(b"/c/"):
            raise PermissionError(13, "Permission denied")
        return entries(folder)

    monkeypatch.setattr(folder_walk, "_entries", guarded)
    index = scan(tmp_path)
    assert listed(index) == ["a/b.png", "e.png"]
    assert index.refused == (("c/", "can't be read (Permission denied)"),)


@pytest.mark.parametrize("name", ["nothing", "file.png"])
def test_a_folder_that_is_none_is_an_error_of_the_user(name: str, tmp_path: Path) -> None:
    lay_out(tmp_path, "file.png")
    with pytest.raises(UserError, match=rf"can't read .*{name}.*; ") as caught:
        scan(tmp_path / name)
    assert_short_line(str(caught.value))


def test_a_folder_may_be_given_by_a_link_and_be_empty(tmp_path: Path) -> None:
    lay_out(tmp_path / "a", "b.png")
    (tmp_path / "link").symlink_to("a")
    assert listed(scan(tmp_path / "link")) == ["b.png"]
    (tmp_path / "empty").mkdir()
    index = scan(tmp_path / "empty")
    assert len(index) == 0 and index.first_level() is None and list(index.offsets) == [0]


def test_a_deep_folder_ends(tmp_path: Path) -> None:
    lay_out(tmp_path, "top.png")
    deep = Path("d" * 200)
    for _ in range(25):  # too long for a path in the end
        deep.mkdir()
        os.chdir(deep)
    lay_out(Path(), "a.png")
    index = scan(tmp_path)
    assert listed(index) == ["top.png"]
    ((name, reason),) = index.refused
    assert name.startswith("dddd") and len(name) > 3000 and "File name too long" in reason
    assert_short_line(refusal(index))
    Path("a.png").unlink()
    for _ in range(25):  # which pytest could not remove
        os.chdir("..")
        deep.rmdir()


def test_classes_are_the_first_folders(tmp_path: Path) -> None:
    lay_out(tmp_path, "train/dog/1.png", "train/dog-b/2.png", "train/Cat/x/3.png", "test/dog/4.png", "val/5.png")
    index = scan(tmp_path)
    whole, train, test = (index.first_level(prefix) for prefix in ("", "train/", "test/"))
    assert whole is not None and whole.classes == ("test", "train", "val")
    assert train is not None and train.classes == ("Cat", "dog", "dog-b")
    names = index.names(index.below("train/"))
    assert names == ["train/Cat/x/3.png", "train/dog-b/2.png", "train/dog/1.png"]
    assert [train.classes[value] for value in train.values] == [name.split("/")[1] for name in names]
    assert test is not None and test.classes == ("dog",) and test.values.tolist() == [0]
    assert index.first_level("val/") is None and index.first_level("nothing/") is None


names = st.text(st.sampled_from("ab-/.~é"), min_size=1, max_size=5)


def test_a_prefix_finds_what_a_search_finds(tmp_path: Path) -> None:
    @settings(max_examples=100)
    @given(st.sets(names), names | st.just(""), st.sets(st.integers(0, 30)))
    def claim(some: set[str], prefix: str, damaged: set[int]) -> None:
        ordered = sorted(some, key=str.encode)
        content = [name.encode() for name in ordered]
        offsets = np.cumsum([0, *map(len, content)], dtype=np.int64)
        sizes = np.arange(len(some))
        index = FolderIndex(tmp_path, sizes, sizes, (), Counter(), b"".join(content), offsets)
        assert list(index.below(prefix)) == [k for k, name in enumerate(ordered) if name.startswith(prefix)]
        out = sorted(k for k in damaged if k < len(some))
        left = index.without([(k, "damaged") for k in out])
        assert listed(left) == [name for k, name in enumerate(ordered) if k not in out]
        assert left.sizes.tolist() == left.mtimes.tolist() == [k for k in range(len(some)) if k not in out]
        assert list(left.refused) == sorted((ordered[k], "damaged") for k in out)

    claim()


def test_any_number_of_threads_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "HEADERS_PER_TASK", 7)
    for k in range(60):
        lay_out(tmp_path, f"{k % 3}/{k}.jpg", content=encoded(photograph(8, 8), "JPEG")[: 9 if k % 5 == 0 else None])
    indices = [scan(tmp_path, threads) for threads in (0, 1, 7, None)]
    for index in indices:
        assert len(index) == 48 and len(index.refused) == 12
        assert (listed(index), index.refused) == (listed(indices[0]), indices[0].refused)
        assert np.array_equal(index.offsets, indices[0].offsets) and np.array_equal(index.sizes, indices[0].sizes)


def test_an_error_of_the_system_ends_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, *(f"{k}.png" for k in range(40)))
    monkeypatch.setattr(decoding, "HEADERS_PER_TASK", 1)
    read = []

    def failing(path: Path) -> None:
        read.append(path)
        raise UserError("can't read it (Input/output error); check the disk")

    monkeypatch.setattr(folder_index, "header", failing)
    for threads in (0, 2):
        with pytest.raises(UserError, match="check the disk"):
            scan(tmp_path, threads)
    assert len(read) < 40


def test_an_index_takes_little_more_than_its_names(tmp_path: Path) -> None:
    for k in range(40):
        (tmp_path / f"{k:02}").mkdir()
    first = lay_out(tmp_path, "first.png") / "first.png"
    for k in range(4000):
        os.link(first, tmp_path / f"{k % 40:02}/image_{k:06}.png")
    scan(tmp_path, 0)
    tracemalloc.start()
    index = scan(tmp_path, 0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 4001
    assert kept < 4001 * 60 and peak < 4001 * 150  # bytes: of each a name of 19, and three numbers of 8
