import fcntl
import gzip
import hashlib
import io
import os
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import OpenerDirector, Request

import numpy as np
import pytest
import torch
import torchvision

from tests.conftest import REPOSITORY
from tests.forked import unused_port
from tests.sources import whole
from vae_dist.config import DataConfig
from vae_dist.data import datasets, download, public_files
from vae_dist.data.idx import FILE_BYTES
from vae_dist.errors import UserError

REAL_MNIST = REPOSITORY.parent / "shared" / "data"
NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def idx(array: np.ndarray) -> bytes:
    """An array as a file in the IDX format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def small_files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for part, count in ("train", 30), ("t10k", 10):
        files[f"{part}-images-idx3-ubyte"] = idx(random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(random.integers(0, 10, count, dtype=np.uint8))
    return files


class Server:
    """A local mirror that misbehaves on demand."""

    def __init__(self) -> None:
        self.archives = {f"{name}.gz": gzip.compress(content) for name, content in small_files().items()}
        self.behaviour = "serve"
        self.elsewhere = ""
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                content = outer.archives.get(self.path.rpartition("/")[2])
                try:
                    self.misbehave(content)
                except ConnectionError:  # the client has given up
                    self.close_connection = True

            def misbehave(self, content: bytes | None) -> None:
                if outer.behaviour in ("hang", "slow"):
                    time.sleep(3 if outer.behaviour == "hang" else 0.1)
                if outer.behaviour == "redirect" and not self.path.startswith("/new/"):
                    self.send_response(302)
                    self.send_header("Location", outer.elsewhere or f"/new{self.path}")
                    self.send_header("Content-Length", str(10**11))  # must not be read
                    self.end_headers()
                    return
                if outer.behaviour == "trickle head":
                    self.trickle(b"HTTP/1.1 200 OK\r\nX: ")
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                length = "many" if outer.behaviour == "unlikely length" else str(len(content))
                self.send_header("Content-Length", length)
                self.end_headers()
                if outer.behaviour == "trickle body":
                    self.trickle(b"")
                if outer.behaviour == "truncate":
                    content = content[: len(content) // 2]
                if outer.behaviour == "corrupt":
                    content = content[:-9] + bytes(9)
                if outer.behaviour == "longer":
                    content += b"more than was promised" * 1000
                self.wfile.write(content)

            def trickle(self, start: bytes) -> None:
                self.wfile.write(start)
                for _ in range(30):
                    self.wfile.write(b"a")
                    time.sleep(0.1)

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/kmnist/"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A mirror of small files with the digests that torchvision expects of KMNIST."""
    mirror = Server()
    digests = [(name, hashlib.md5(content).hexdigest()) for name, content in mirror.archives.items()]
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [mirror.url])
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", digests)
    yield mirror
    mirror.close()


def config(tmp_path: Path, **settings: object) -> DataConfig:
    return DataConfig(name="kmnist", root=str(tmp_path / "data"), validation_images=5, **settings)  # type: ignore[arg-type]


def refusal(settings: DataConfig) -> str:
    with pytest.raises(UserError) as refused:
        datasets.load_training_set(settings)
    return str(refused.value)


def test_a_set_is_downloaded_once_and_read_as_torchvision_does(server: Server, tmp_path: Path) -> None:
    info = datasets.load_training_set(config(tmp_path)).info
    assert (info.name, info.count, info.image_shape, info.classes) == ("kmnist", 30, (1, 28, 28), 10)
    assert len(server.requests) == 4
    test = whole(datasets.load_test(config(tmp_path)))
    theirs = torchvision.datasets.KMNIST(tmp_path / "data", train=False, download=True)  # finds what we downloaded
    assert torch.equal(test.pixels[:, 0], theirs.data)
    assert torch.equal(test.labels, theirs.targets)
    assert len(server.requests) == 4


def test_what_torchvision_downloaded_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    torchvision.datasets.KMNIST(tmp_path / "data", train=True, download=True)
    datasets.load_training_set(config(tmp_path, download=False))
    assert len(set(server.requests)) == 4


def test_another_mirror_can_be_given(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [])
    datasets.load_training_set(config(tmp_path, mirror=server.url.rstrip("/")))
    assert len(server.requests) == 4


def test_a_second_mirror_serves_what_the_first_does_not(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = f"http://127.0.0.1:{unused_port()}/"
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [dead, server.url])
    datasets.load_training_set(config(tmp_path))


def test_a_disk_that_is_full_during_a_download_keeps_no_part_of_a_file(server: Server, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # less than the training images
    try:
        assert "make room" in refusal(config(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert datasets.load_training_set(config(tmp_path)).info.count == 30


def test_other_labels_are_another_set(server: Server, tmp_path: Path) -> None:
    before = datasets.load_training_set(config(tmp_path)).info.identity
    labels = tmp_path / "data/KMNIST/raw/train-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:-1] + bytes([(content[-1] + 1) % 10]))
    assert datasets.load_training_set(config(tmp_path)).info.identity != before


@pytest.mark.parametrize(("behaviour", "expected"), [("truncate", "truncated"), ("corrupt", "corrupt")])
def test_a_bad_copy_is_named_and_never_kept(behaviour: str, expected: str, server: Server, tmp_path: Path) -> None:
    server.behaviour = behaviour
    message = refusal(config(tmp_path))
    assert expected in message and "train-images-idx3-ubyte.gz" in message and "synthetic_digits" in message
    assert not [path for path in (tmp_path / "data/KMNIST/raw").iterdir() if path.name != ".lock"]
    server.behaviour = "serve"
    datasets.load_training_set(config(tmp_path))


def test_a_silent_mirror_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = 8 + 2  # of MNIST's two mirrors, at most
    assert addresses * download.SILENCE_SECONDS < 60
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.5)
    server.behaviour = "hang"
    started = time.monotonic()
    assert "timed out" in refusal(config(tmp_path))
    assert time.monotonic() - started < 2.5


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_mirror_that_is_slow_and_never_silent_is_given_up(
    part: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ARCHIVE_SECONDS", 0.5)
    server.behaviour = f"trickle {part}"
    started = time.monotonic()
    message = refusal(config(tmp_path))
    assert "takes more than 0.5 s" in message or "exceeds 0.5 s" in message
    assert time.monotonic() - started < 2.5


def test_bytes_beyond_the_content_length_are_not_read(server: Server, tmp_path: Path) -> None:
    server.behaviour = "longer"
    assert datasets.load_training_set(config(tmp_path)).info.count == 30


def test_a_content_length_that_is_no_number_is_ignored(server: Server, tmp_path: Path) -> None:
    server.behaviour = "unlikely length"
    assert datasets.load_training_set(config(tmp_path)).info.count == 30


def test_an_archive_without_end_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ARCHIVE_BYTES", 100)
    assert "exceeds 300 s or 100 bytes" in refusal(config(tmp_path))


@pytest.mark.parametrize(
    ("elsewhere", "expected"),
    [
        ("file:///etc/passwd", "it redirects to file:///etc/passwd, which is not followed"),
        ("ftp://127.0.0.1:9/", "it redirects to ftp://127.0.0.1:9/, which is not followed"),
        ("data:,x", "it redirects to data:,x, which is not followed"),
        ("file:///\x1bc", "file:///?c"),
        ("http://a..b/", "encod"),
        ("http://[", "Invalid IPv6 URL"),
        ("/again", "it redirects more than 5 times, at last to http://127.0.0.1"),
    ],
)
def test_an_unsafe_or_endless_redirect_is_not_followed(
    elsewhere: str, expected: str, server: Server, tmp_path: Path
) -> None:
    server.behaviour, server.elsewhere = "redirect", elsewhere
    message = refusal(config(tmp_path))
    assert expected in message and message.isprintable()


def test_a_redirect_from_https_to_http_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(opener: OpenerDirector, request: Request, timeout: float) -> None:
        headers = Message()
        headers["Location"] = "http://elsewhere/x"
        raise HTTPError(request.full_url, 302, "Found", headers, io.BytesIO())

    monkeypatch.setattr(OpenerDirector, "open", redirect)
    with pytest.raises(download.DownloadError, match="redirects to http://elsewhere/x, which is not followed"):
        download.fetch("https://here/x", "")


def test_a_redirect_is_followed_and_its_body_not_read(server: Server, tmp_path: Path) -> None:
    server.behaviour = "redirect"
    assert datasets.load_training_set(config(tmp_path)).info.count == 30
    assert len(server.requests) == 8


def serve_archive(server: Server, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve this in place of the training images, with the digest that is expected."""
    server.archives["train-images-idx3-ubyte.gz"] = content
    digests = [(name, hashlib.md5(content).hexdigest()) for name, content in server.archives.items()]
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", digests)


@pytest.mark.parametrize(
    "archive",
    [gzip.compress(b"abc", mtime=0)[:-1], gzip.compress(b"abc", mtime=0) + b"x", b"PK\3\4", b"\x1f\x8b"],
    ids=["cut off", "too long", "a ZIP file", "a beginning"],
)
def test_an_incomplete_archive_is_rejected(
    archive: bytes, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_archive(server, archive, monkeypatch)
    assert "train-images-idx3-ubyte.gz is not a whole gzip archive" in refusal(config(tmp_path))
    assert [path.name for path in (tmp_path / "data/KMNIST/raw").iterdir()] == [".lock"]


def test_an_archive_that_unpacks_to_gigabytes_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_archive(server, gzip.compress(bytes(2**26)) * 64, monkeypatch)
    tracemalloc.start()
    try:
        assert f"holds more than {FILE_BYTES} bytes" in refusal(config(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 3 * FILE_BYTES
    finally:
        tracemalloc.stop()
    assert [path.name for path in (tmp_path / "data/KMNIST/raw").iterdir()] == [".lock"]


@pytest.mark.slow
def test_two_processes_at_once_download_each_archive_once(server: Server, tmp_path: Path) -> None:
    program = f"""
import torchvision
from vae_dist.data import datasets
from vae_dist.config import DataConfig
torchvision.datasets.KMNIST.mirrors = [{server.url!r}]
torchvision.datasets.KMNIST.resources = {torchvision.datasets.KMNIST.resources!r}
print(datasets.load_training_set(DataConfig(name="kmnist", root={str(tmp_path / "data")!r})).info.count)
"""
    server.behaviour = "slow"
    other = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    while not server.requests:
        assert other.poll() is None
        time.sleep(0.01)
    assert datasets.load_training_set(config(tmp_path)).info.count == 30
    assert other.communicate(timeout=120)[0] == "30\n"
    assert len(server.requests) == 4


def test_a_lock_that_is_never_released_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public_files, "LOCK_SECONDS", 0.2)
    folder = tmp_path / "data/KMNIST/raw"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process has held" in refusal(config(tmp_path))


def test_a_stale_lock_file_does_not_block(server: Server, tmp_path: Path) -> None:
    """Left behind by a process of another host, or of an earlier version."""
    folder = tmp_path / "data/KMNIST/raw"
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("4711\nnode7\n")
    assert datasets.load_training_set(config(tmp_path)).info.count == 30


def test_a_lock_that_is_a_link_is_not_followed(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "data/KMNIST/raw"
    folder.mkdir(parents=True)
    (folder / ".lock").symlink_to(tmp_path / "victim")
    assert "can't download into" in refusal(config(tmp_path))
    assert not (tmp_path / "victim").exists() and not server.requests


def test_an_unreachable_mirror_is_reported_with_remedies(tmp_path: Path) -> None:
    message = refusal(config(tmp_path, mirror=f"http://127.0.0.1:{unused_port()}"))
    assert "Connection refused" in message and "data.name=synthetic_digits" in message
    assert "data.download=false" in refusal(config(tmp_path, download=False))


def test_auto_falls_back_to_the_embedded_digits_and_a_name_does_not(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{unused_port()}"
    settings = DataConfig(name="auto", root=str(tmp_path), mirror=nowhere, synthetic_images=60, validation_images=5)
    assert datasets.load_training_set(settings).info.name == "synthetic_digits"
    settings.name = "mnist"
    assert "no mirror has what is missing" in refusal(settings)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda content: content[:-100], "has 23436 bytes where its header promises 23536"),
        (lambda content: content + b"x", "has 23537 bytes"),
        (lambda content: b"PK" + content[2:], "does not begin as an IDX file"),
        (lambda content: b"", "does not begin as an IDX file"),
        (lambda content: content[:9], "has 9 bytes where its header promises"),
        (lambda content: content[:4] + b"\xff" * 12, f"has 16 bytes where its header promises {16 + (2**32 - 1) ** 3}"),
        (lambda content: content[:4] + b"\xff" * 8 + bytes(4), "is empty: 4294967295 x 4294967295 x 0 bytes"),
        (lambda content: content[:2] + b"\x0d" + content[3:], "does not begin as an IDX file"),
        (lambda content: idx(np.zeros((29, 28, 28), np.uint8)), "29 train images but 30 labels"),
    ],
)
def test_a_damaged_file_on_the_disk_is_named(damage, expected: str, server: Server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    datasets.load_training_set(config(tmp_path))
    path = tmp_path / "data/KMNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(config(tmp_path))
    assert expected in message and str(path.parent) in message and "delete it" in message


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("folder", "Is a directory"),
        ("pipe", "Is not a regular file"),
        ("device", "Is not a regular file"),
        ("sparse", f"Has more than {FILE_BYTES} bytes"),
    ],
)
def test_any_obstacle_in_a_files_place_is_named_and_does_not_block(
    kind: str, expected: str, server: Server, tmp_path: Path
) -> None:
    datasets.load_training_set(config(tmp_path))
    path = tmp_path / "data/KMNIST/raw/train-labels-idx1-ubyte"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 2**36)
    message = refusal(config(tmp_path))
    assert expected in message and str(path) in message


def test_a_linked_data_root_is_followed(server: Server, tmp_path: Path) -> None:
    datasets.load_training_set(config(tmp_path))
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "data").symlink_to("elsewhere")
    assert datasets.load_training_set(config(tmp_path, download=False)).info.count == 30


@contextmanager
def without_privileges() -> Iterator[None]:
    """Drop root's rights, for which permissions do not count."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_an_unreadable_folder_is_named(server: Server, tmp_path: Path) -> None:
    datasets.load_training_set(config(tmp_path))
    folder = tmp_path / "data/KMNIST/raw"
    folder.parent.chmod(0)
    try:
        with without_privileges():
            message = refusal(config(tmp_path))
    finally:
        folder.parent.chmod(0o700)
    assert f"can't read {folder} (Permission denied)" in message or "can't download into" in message


def test_a_root_that_is_too_long_for_a_path_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.root = "a" * 300
    assert "(File name too long); choose another data.root" in refusal(settings)


PLACES = ["KMNIST/raw", "KMNIST", "kmnist", "kmnist/raw"]


@pytest.mark.parametrize("place", [*PLACES, "", "raw"])
@pytest.mark.parametrize("form", ["{}.gz", "{}"])
def test_copies_downloaded_by_hand_are_used_in_place(place: str, form: str, server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "data" / place
    folder.mkdir(parents=True)
    for name, content in small_files().items():
        (folder / form.format(name)).write_bytes(server.archives[f"{name}.gz"] if "gz" in form else content)
    before = sorted((tmp_path / "data").rglob("*"))
    settings = config(tmp_path, download=False)
    if place in ("", "raw") and form == "{}":  # all sets have files of these names, and no digest tells them apart
        message = refusal(settings)
        assert str(folder / NAMES[0]) in message and "put it into KMNIST/raw" in message
        return
    datasets.load_training_set(settings)
    images, labels = (small_files()[f"t10k-{kind}-ubyte"] for kind in ("images-idx3", "labels-idx1"))
    test = whole(datasets.load_test(settings))
    assert test.pixels.numpy().tobytes() == images[16:] and bytes(test.labels.tolist()) == labels[8:]
    assert sorted((tmp_path / "data").rglob("*")) == before and not server.requests


@pytest.mark.parametrize("spelling", ["{}.gz", "{}", "{}/{}"])
def test_common_spellings_of_a_copy_are_known(spelling: str, tmp_path: Path) -> None:
    """A dot for the dash, unpacked into a folder, unpacked by a browser."""
    for name, content in small_files().items():
        path = tmp_path / "data/kmnist" / spelling.replace("{}", name.replace("-idx", ".idx"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert datasets.load_training_set(config(tmp_path, download=False)).info.count == 30


def test_a_damaged_copy_is_named_and_only_its_file_is_downloaded(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "data/KMNIST/raw"
    folder.mkdir(parents=True)
    for archive, content in server.archives.items():
        (folder / archive).write_bytes(content)
    broken = folder / "t10k-labels-idx1-ubyte.gz"
    for content, problem in (
        (broken.read_bytes()[:-4], "not a whole gzip archive"),
        (b"<html>", "does not begin as an IDX file"),
        (b"", ""),
    ):
        broken.write_bytes(content)
        (folder / "kmnist.npz").write_bytes(b"")
        message = refusal(config(tmp_path, download=False))
        assert "t10k-labels-idx1-ubyte missing" in message and f"{broken} (" in message and problem in message
        assert "train-images" not in message and f"{folder / 'kmnist.npz'} (of another format)" in message
    nowhere = refusal(config(tmp_path, mirror=f"http://127.0.0.1:{unused_port()}"))
    assert "missing" in nowhere and "t10k-labels-idx1-ubyte" in nowhere and str(broken) in nowhere
    assert datasets.load_training_set(config(tmp_path)).info.count == 30
    assert server.requests == ["/kmnist/t10k-labels-idx1-ubyte.gz"]


@pytest.mark.skipif(not (REAL_MNIST / "MNIST").exists(), reason="the real MNIST is not next to this checkout")
def test_auto_finds_the_real_mnist_in_data_root_itself(tmp_path: Path) -> None:
    settings = DataConfig(name="auto", root=str(REAL_MNIST / "MNIST/raw"), download=False, synthetic_images=60)
    assert datasets.load_training_set(settings).info.name == "mnist"


def test_a_flipped_bit_in_mnist_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "data/MNIST/raw"
    folder.mkdir(parents=True)
    for name, content in small_files().items():
        (folder / name).write_bytes(content)
    settings = config(tmp_path)
    settings.name = "mnist"
    assert "sha256 is not the published one" in refusal(settings)


@pytest.mark.skipif(not (REAL_MNIST / "MNIST").exists(), reason="the real MNIST is not next to this checkout")
def test_the_real_mnist_is_read_whole() -> None:
    settings = DataConfig(name="mnist", root=str(REAL_MNIST), download=False, validation_images=0)
    training = whole(datasets.load_training(settings)[0])
    assert training.pixels.shape == (60_000, 1, 28, 28)
    assert training.pixels.double().mean().item() / 255 == pytest.approx(0.1306604762738429)
    assert datasets.load_test(settings).info.count == 10_000
