import gzip
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from tests.conftest import REPOSITORY
from vae_dist import data, mnist
from vae_dist.config import DataConfig
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
    """A mirror on this machine that can be told to misbehave."""

    def __init__(self) -> None:
        self.archives = {f"{name}.gz": gzip.compress(content) for name, content in small_files().items()}
        self.behaviour = "serve"
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                content = outer.archives.get(self.path.rpartition("/")[2])
                if outer.behaviour == "hang":
                    time.sleep(3)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if outer.behaviour == "truncate":
                    content = content[: len(content) // 2]
                if outer.behaviour == "corrupt":
                    content = content[:-9] + bytes(9)
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/kmnist/"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A mirror whose small files are what torchvision expects of KMNIST."""
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
        data.prepare(settings)
    return str(refused.value)


def test_a_set_is_downloaded_once_and_read_as_torchvision_reads_it(server: Server, tmp_path: Path) -> None:
    assert data.prepare(config(tmp_path)) == ("kmnist", 30, [1, 28, 28])
    assert len(server.requests) == 4
    test = data.load_test(config(tmp_path))
    theirs = torchvision.datasets.KMNIST(tmp_path / "data", train=False, download=True)  # finds what we downloaded
    assert torch.equal(test.pixels[:, 0], theirs.data)
    assert torch.equal(test.labels, theirs.targets)
    assert len(server.requests) == 4


def test_what_torchvision_downloaded_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    torchvision.datasets.KMNIST(tmp_path / "data", train=True, download=True)
    data.prepare(config(tmp_path, download=False))
    assert len(set(server.requests)) == 4


def test_another_mirror_can_be_given(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [])
    data.prepare(config(tmp_path, mirror=server.url.rstrip("/")))
    assert len(server.requests) == 4


def test_a_second_mirror_serves_what_the_first_does_not(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = f"http://127.0.0.1:{unused_port()}/"
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [dead, server.url])
    data.prepare(config(tmp_path))


@pytest.mark.parametrize(("behaviour", "expected"), [("truncate", "truncated"), ("corrupt", "corrupt")])
def test_a_bad_copy_is_named_and_never_kept(behaviour: str, expected: str, server: Server, tmp_path: Path) -> None:
    server.behaviour = behaviour
    message = refusal(config(tmp_path))
    assert expected in message and "train-images-idx3-ubyte.gz" in message and "synthetic_digits" in message
    assert not [path for path in (tmp_path / "data/KMNIST/raw").iterdir() if path.name != ".lock"]
    server.behaviour = "serve"
    data.prepare(config(tmp_path))


def test_a_silent_mirror_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = 8 + 2  # of MNIST's two mirrors, at most
    assert addresses * mnist.SILENCE_SECONDS < 60
    monkeypatch.setattr(mnist, "SILENCE_SECONDS", 0.5)
    server.behaviour = "hang"
    started = time.monotonic()
    assert "timed out" in refusal(config(tmp_path))
    assert time.monotonic() - started < 2.5


def test_no_server_at_all_is_said_with_the_ways_out(tmp_path: Path) -> None:
    message = refusal(config(tmp_path, mirror=f"http://127.0.0.1:{unused_port()}"))
    assert "Connection refused" in message and "data.name=synthetic_digits" in message
    assert "data.download=false" in refusal(config(tmp_path, download=False))


def test_auto_falls_back_to_the_embedded_digits_and_a_name_does_not(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{unused_port()}"
    settings = DataConfig(name="auto", root=str(tmp_path), mirror=nowhere, synthetic_images=60, validation_images=5)
    assert data.prepare(settings).name == "synthetic_digits"
    settings.name = "mnist"
    assert "no mirror gave what is missing" in refusal(settings)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda content: content[:-100], "has 23436 bytes where its header promises 23536"),
        (lambda content: content + b"x", "has 23537 bytes"),
        (lambda content: b"PK" + content[2:], "first bytes"),
        (lambda content: b"", "first bytes"),
    ],
)
def test_a_damaged_file_on_the_disk_is_named(damage, expected: str, server: Server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data.prepare(config(tmp_path))
    path = tmp_path / "data/KMNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(config(tmp_path))
    assert expected in message and str(path) in message and "delete it" in message


def test_a_flipped_bit_in_mnist_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "data/MNIST/raw"
    folder.mkdir(parents=True)
    for name, content in small_files().items():
        (folder / name).write_bytes(content)
    settings = config(tmp_path)
    settings.name = "mnist"
    assert "sha256 is not the published one" in refusal(settings)


@pytest.mark.skipif(not (REAL_MNIST / "MNIST").exists(), reason="the real MNIST is not beside this checkout")
def test_the_real_mnist_is_read_whole() -> None:
    settings = DataConfig(name="mnist", root=str(REAL_MNIST), download=False, validation_images=0)
    training, _ = data.load_training(settings)
    assert training.pixels.shape == (60_000, 1, 28, 28)
    assert training.pixels.double().mean().item() / 255 == pytest.approx(0.1306604762738429)
    assert len(data.load_test(settings).labels) == 10_000


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
