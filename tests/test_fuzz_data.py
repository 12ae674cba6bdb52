"""Hostile and broken data: files, servers, archives and caches are read whole or refused in one line."""

import gzip
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sources import Whole, whole
from tests.test_fuzz import assert_short_line, mutated, values
from vae_dist.config import DataConfig
from vae_dist.data import datasets, download, mnist
from vae_dist.errors import UserError

pytestmark = pytest.mark.timeout(900)  # the deep ones take minutes


@pytest.fixture(params=[1, pytest.param(20, marks=pytest.mark.slow)], ids=["quick", "deep"])
def depth(request: pytest.FixtureRequest) -> int:
    """Factor on the number of examples."""
    torch.set_flush_denormal(False)  # hypothesis draws denormals, and a training in this process flushes them
    return int(request.param)


# Data sets in the IDX format, their archives, and their servers.


def idx(*sizes: int, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)


def good_files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for part, count in ("train", 30), ("t10k", 10):
        files[f"{part}-images-idx3-ubyte"] = idx(count, 4, 3) + random.bytes(count * 12)
        files[f"{part}-labels-idx1-ubyte"] = idx(count) + random.bytes(count)
    return files


GOOD = good_files()
FILES = sorted(GOOD)
numbers = st.sampled_from([0, 1, 2, 3, 4, 10, 30, 31, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
headers = st.builds(
    lambda kind, sizes: idx(*sizes, kind=kind),
    st.sampled_from([8, 8, 8, 0, 9, 11, 13, 14, 255]),
    st.lists(numbers, max_size=5),
)
idx_files = st.builds(lambda header, size: header + bytes(size), headers, st.integers(0, 400)) | mutated(
    st.sampled_from(sorted(GOOD.values())), headers | st.binary(max_size=4)
)


def asked_for(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(name="kmnist", root=str(root), validation_images=5, **changes)


def lay_out(root: Path, contents: dict[str, bytes]) -> Path:
    folder = root / "KMNIST/raw"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def refusal(read: Callable[[], object]) -> str | None:
    try:
        read()
    except UserError as error:
        assert_short_line(str(error))
        return str(error)
    return None


def test_any_idx_file_is_read_whole_or_named_in_a_refusal(depth: int, tmp_path: Path) -> None:
    @settings(max_examples=150 * depth)
    @given(st.sampled_from(FILES), idx_files)
    def claim(name: str, content: bytes) -> None:
        folder = lay_out(tmp_path, GOOD | {name: content})
        read: list[tuple[torch.Tensor, torch.Tensor, str]] = []
        split = "train" if name.startswith("train") else "test"
        message = refusal(lambda: read.append(mnist.load("kmnist", tmp_path, split, download=False, mirror=None)))
        if message is None:
            images, labels, _ = read[0]
            which = images if "images" in name else labels
            assert len(images) == len(labels) == int.from_bytes(content[4:8], "big")
            assert which.to(torch.uint8).numpy().tobytes() == content[4 + 4 * content[3] :]
        else:
            assert str(folder) in message and (name in message or "labels; delete" in message)

    claim()


class RawServer:
    """Reply to every connection with the same bytes, and hang up."""

    def __init__(self) -> None:
        self.reply = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(2**16)
                    connection.sendall(self.reply)
                except OSError:
                    continue

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def raw_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RawServer]:
    server = RawServer()
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [f"http://127.0.0.1:{server.port}/"])
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.5)
    yield server
    server.close()


status_lines = st.sampled_from(
    [f"HTTP/1.1 {status}".encode() for status in ("200 OK", "206 x", "304 x", "404 \x1b[2J", "999 x", "100 x\r\n")]
    + [b"HTTP/1.1 302 x"] * 3
    + [b"HTTP/1.0 200", b"HTTP/9 x", b"ICY 200 OK", b""]
)
fields = st.sampled_from(
    [f"Content-Length: {length}".encode() for length in (0, 5, -1, "abc", 10**11, "1" * 5000)]
    + [f"Location: {place}".encode("latin-1") for place in ("file:///etc/passwd", "", "http://[", "/x", "http://\xff/")]
    + [f"Location: {place}".encode() for place in ("ftp://127.0.0.1:9/", "data:,x", "http://a b/", "javascript:x")]
    + [b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"no colon", b": ", b"A: " + b"a" * 70_000]
    + [b"A: b\r\n" * 200]
)
bodies = st.binary(max_size=50) | st.sampled_from(
    [b"", b"5\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello", b"zz\r\n", b"f" * 100, b"ffffffffff\r\n", b"1;" + b"x" * 70_000]
)
replies = st.builds(
    lambda status, fields, end, body: b"\r\n".join([status, *fields]) + end + body,
    status_lines,
    st.lists(fields, max_size=4),
    st.sampled_from([b"\r\n\r\n", b"\n\n", b"\r\n", b""]),
    bodies,
)


def test_any_hostile_reply_of_a_mirror_is_refused_and_leaves_no_file(
    depth: int, raw_server: RawServer, tmp_path: Path
) -> None:
    @settings(max_examples=200 * depth)
    @given(mutated(replies, st.binary(max_size=3)) | replies)
    def claim(reply: bytes) -> None:
        raw_server.reply = reply
        message = refusal(lambda: datasets.load_training_set(asked_for(tmp_path)))
        assert message is not None and "no mirror has" in message
        assert [path.name for path in (tmp_path / "KMNIST/raw").iterdir()] == [".lock"]

    claim()


def test_any_archive_of_the_right_digest_is_unpacked_or_refused(
    depth: int, raw_server: RawServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = gzip.compress(bytes(range(200)), mtime=0)
    archives = st.binary(max_size=30) | mutated(st.just(good) | st.just(good + good), st.binary(max_size=4))

    @settings(max_examples=150 * depth)
    @given(archives)
    def claim(archive: bytes) -> None:
        digest = hashlib.md5(archive).hexdigest()
        monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", [(f"{name}.gz", digest) for name in FILES])
        raw_server.reply = b"HTTP/1.1 200 OK\r\n\r\n" + archive
        message = refusal(lambda: datasets.load_training_set(asked_for(tmp_path)))
        assert message is not None
        for path in (tmp_path / "KMNIST/raw").iterdir():
            assert path.name == ".lock" or gzip.decompress(archive) == path.read_bytes()
            path.unlink()

    claim()


# The cache of the digits.

DIGITS = 12


def digits_in(root: Path) -> Whole:
    return whole(datasets.load_test(DataConfig(name="synthetic_digits", root=str(root), synthetic_images=DIGITS)))


def header_of(content: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + size]))


def with_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_a_corrupt_cache_of_the_digits_is_never_used(depth: int, tmp_path: Path) -> None:
    true = digits_in(tmp_path)
    (cache,) = (tmp_path / "synthetic_digits").iterdir()
    good = cache.read_bytes()
    header = header_of(good)
    body = good[8 + struct.unpack("<Q", good[:8])[0] :]
    dtypes = st.sampled_from(["U8", "I64", "F32", "F4", "F8_E8M0", "BOOL", "C64", "BF16", "nothing", ""])
    shapes = st.lists(numbers | st.sampled_from([-1, 2**63, 2**64, DIGITS]), max_size=5)
    offsets = st.lists(st.sampled_from([0, 1, len(body), len(body) + 1, -1, 2**63]) | numbers, max_size=3)
    entry = st.fixed_dictionaries({"dtype": dtypes, "shape": shapes, "data_offsets": offsets}) | values
    names = st.sampled_from([*header, "__metadata__", "more"])
    headers = st.dictionaries(names, entry, max_size=3).map(lambda changes: with_header(header | changes, body))
    left_out = st.sets(names, max_size=2).map(
        lambda gone: with_header({name: header[name] for name in header if name not in gone}, body)
    )

    @settings(max_examples=150 * depth)
    @given(st.binary(max_size=40) | mutated(st.just(good), st.binary(max_size=9)) | headers | left_out)
    def claim(content: bytes) -> None:
        cache.write_bytes(content)
        images = digits_in(tmp_path)
        assert torch.equal(images.pixels, true.pixels) and torch.equal(images.labels, true.labels)
        assert torch.equal(digits_in(tmp_path).pixels, true.pixels)

    claim()
