"""Published data sets: small stand-ins for their files, a local mirror, and whatever goes wrong."""

import errno
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vae_dist
from tests.conftest import REPOSITORY, opened
from tests.file_server import FileServer
from tests.sources import whole
from vae_dist import UserError
from vae_dist.api.images import to_images
from vae_dist.config import OWN_IMAGES, DataConfig
from vae_dist.config.keys import options
from vae_dist.data import binarized_mnist, cifar10, datasets
from vae_dist.data.download import Published
from vae_dist.data.public_files import UnreachableError
from vae_dist.evaluation.evaluate import evaluate

AMAT = {"train": 60, "validation": 20, "test": 20}
LABELS = {"train": [[3, 9, 0], [1, 2], [4], [5, 6], [7, 8]], "test": [[9, 3, 3]]}  # of each file's records


def published(name: str, content: bytes) -> Published:
    return Published("http://127.0.0.1:9", name, len(content), hashlib.sha256(content).hexdigest())  # nobody listens


def text_of(images: np.ndarray) -> bytes:
    """Binary images `(N, 784)` as text, as numpy writes them."""
    file = io.BytesIO()
    np.savetxt(file, images, fmt="%d")
    return file.getvalue()


def record(label: int, image: np.ndarray) -> bytes:
    """A CIFAR-10 record of a colour image `(32, 32, 3)`: the label, all red values, all green ones, all blue ones."""
    planes = [image[:, :, channel].tobytes() for channel in range(3)]
    return bytes([label]) + b"".join(planes)


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.close()


@pytest.fixture
def digits(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Small files in place of binarised MNIST's, on the server; the images of each part, `(N, 28, 28)` of 0 and 1."""
    random = np.random.default_rng(0)
    images = {part: random.integers(0, 2, (count, 784)) for part, count in AMAT.items()}
    files = {}
    for part, file in binarized_mnist.FILES.items():
        server.contents[file.name] = content = text_of(images[part])
        files[part] = published(file.name, content)
    monkeypatch.setattr(binarized_mnist, "FILES", files)
    return {part: values.reshape(-1, 28, 28) for part, values in images.items()}


@pytest.fixture
def photographs(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A small archive in place of CIFAR-10's, on the server; the images of each part, `(N, 32, 32, 3)` uint8."""
    random = np.random.default_rng(0)
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    files: dict[str, tuple[Published, ...]] = {}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for part, groups in LABELS.items():
            kept = []
            for published_file, labels in zip(cifar10.FILES[part], groups, strict=True):
                drawn = random.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
                content = b"".join(map(record, labels, drawn))
                header = tarfile.TarInfo(f"cifar-10-batches-bin/{published_file.name}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
                kept.append(published(published_file.name, content))
                images[part].append(drawn)
            files[part] = tuple(kept)
    server.contents[cifar10.ARCHIVE.name] = archive.getvalue()
    monkeypatch.setattr(cifar10, "FILES", files)
    monkeypatch.setattr(cifar10, "ARCHIVE", published(cifar10.ARCHIVE.name, archive.getvalue()))
    return {part: np.concatenate(drawn) for part, drawn in images.items()}


def settings(root: Path, name: str, server: FileServer | None = None, **options: object) -> DataConfig:
    mirror = None if server is None else server.url
    return DataConfig(name=name, root=str(root), mirror=mirror, **options)  # type: ignore[arg-type]


def files_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} - {".lock"}


# ---- Binarised MNIST


def test_binarised_digits_are_those_of_the_text(
    digits: dict[str, np.ndarray], server: FileServer, tmp_path: Path
) -> None:
    data = settings(tmp_path, "binarized_mnist", server)
    training, validation = datasets.load_training(data)
    for source, part in (training, "train"), (validation, "validation"), (datasets.load_test(data), "test"):
        pixels, labels = whole(source)
        assert torch.equal(pixels, torch.from_numpy(255 * digits[part][:, None]).to(torch.uint8))
        assert len(labels) == 0 and source.info.classes is None
        assert source.info.processing == "binary: drawn once by Larochelle and Murray (2011)"
    assert len({training.info.identity, validation.info.identity, datasets.load_test(data).info.identity}) == 3
    assert len(server.requests) == 3 and files_below(tmp_path) == {file.name for file in binarized_mnist.FILES.values()}
    datasets.load_training(settings(tmp_path, "binarized_mnist", download=False))  # finds them


def test_the_published_files_have_lines_of_784_digits() -> None:
    counts = {part: file.bytes / (2 * 784) for part, file in binarized_mnist.FILES.items()}
    assert counts == {"train": 50_000, "validation": 10_000, "test": 10_000}


@pytest.mark.usefixtures("digits")
def test_a_run_on_binarised_digits_gives_likelihoods(server: FileServer, tmp_path: Path) -> None:
    arguments = [
        "data.name=binarized_mnist", f"data.root={tmp_path}", f"data.mirror={server.url}", "name=a", "device=cpu",
        "train.steps=2", "train.batch_size=20", "train.compile=false", "train.threads=1", "tracking.wandb=disabled",
        "model.hidden_dims=[16]", "model.latent_dim=4",
    ]  # fmt: skip
    run = vae_dist.fit(*arguments)
    assert run.config.data.validation_images is None  # the set's own part is used
    result = evaluate(run.directory, ["evaluate.importance_samples=2"])
    assert result["comparable"] and result["warning"] is None and result["bits_per_dimension"] > 0
    assert result["binarize"] == "fixed" and result["protocol"]["pixels"].startswith("binary: drawn once by Larochelle")

    # Grey images of the user's are drawn; black and white ones stay as they are.
    folder = tmp_path / "grey"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(np.full((28, 28), 100, np.uint8)).save(folder / f"{number}.png")
    other = evaluate(run.directory, [f"evaluate.folder={folder}", "evaluate.importance_samples=0"])
    assert other["protocol"]["pixels"].startswith("binary: 1 with the grey level's probability")
    grey = np.full((2, 28, 28), 100, np.uint8)
    vae = opened(run.directory).checkpoint.load_vae(run.config, torch.device("cpu"))
    drawn = to_images(grey, vae, run.config.data)
    assert set(drawn.unique().tolist()) == {0, 1} and 0.3 < drawn.mean() < 0.5  # 100 / 255, +- 5 standard deviations
    black = np.random.default_rng(0).integers(0, 2, (2, 28, 28)).astype(np.uint8) * 255
    kept = to_images(black, vae, run.config.data)
    assert torch.equal(kept, torch.from_numpy(black / 255).float()[:, None])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.binarize=dynamic", "are black and white already: use data.binarize=none, or data.name=mnist"),
        ("data.validation_images=5", "has 20 validation images of its own: use data.validation_images=null"),
        (
            "objective.reconstruction=discretized_logistic_mixture",
            "the images of binarized_mnist are black and white: use objective.reconstruction=bernoulli",
        ),
        ("model.conditional=true", "needs labels, but the images of binarized_mnist have none"),
    ],
)
@pytest.mark.usefixtures("digits")
def test_options_that_binarised_digits_refuse(argument: str, message: str, server: FileServer, tmp_path: Path) -> None:
    arguments = ["data.name=binarized_mnist", f"data.root={tmp_path}", f"data.mirror={server.url}"]
    with pytest.raises(UserError, match=message):
        vae_dist.fit(*arguments, argument, "tracking.wandb=disabled", "device=cpu")
    assert not (tmp_path / "runs").exists()


# ---- CIFAR-10


def test_photographs_have_their_colours_and_classes(
    photographs: dict[str, np.ndarray], server: FileServer, tmp_path: Path
) -> None:
    data = settings(tmp_path, "cifar10", server)
    for source, part in (datasets.load_training_set(data), "train"), (datasets.load_test(data), "test"):
        pixels, labels = whole(source)
        assert torch.equal(pixels.permute(0, 2, 3, 1), torch.from_numpy(photographs[part]))
        assert labels.tolist() == [label for group in LABELS[part] for label in group]
        assert (source.info.classes, source.info.image_shape) == (10, (3, 32, 32))
    assert source.info.class_names is not None and source.info.class_names[3] == "cat"
    assert [path for path, _ in server.requests] == ["/files/cifar-10-binary.tar.gz"]
    unpacked = {file.name for files in cifar10.FILES.values() for file in files}
    assert files_below(tmp_path) == unpacked  # the downloaded archive is gone


@pytest.mark.usefixtures("photographs")
def test_a_download_that_broke_off_goes_on(server: FileServer, tmp_path: Path) -> None:
    data = settings(tmp_path, "cifar10", server)
    server.sends = 5000
    with pytest.raises(
        UnreachableError, match=r"can't download cifar-10-binary.tar.gz .*; try again, give data.mirror"
    ):
        datasets.load_test(data)
    server.sends = None
    assert datasets.load_test(data).info.count == 3
    assert server.requests[-1] == ("/files/cifar-10-binary.tar.gz", "bytes=5000-")


@pytest.mark.usefixtures("photographs")
def test_the_users_archive_is_unpacked_and_stays(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vae_dist")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(server.contents[archive.name])
    data = settings(tmp_path, "cifar10", download=False)
    assert datasets.load_test(data).info.count == 3
    assert archive.exists() and server.requests == [] and f"unpacking {archive}" in caplog.text
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()  # one file is missing
    assert datasets.load_training_set(data).info.count == 10

    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    archive.write_bytes(archive.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=f"{archive} is damaged or another archive: .*; delete it"):
        datasets.load_training_set(data)


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize("download", [True, False])
def test_an_archive_of_the_users_that_cannot_be_read_is_named(
    download: bool, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    data = settings(tmp_path, "cifar10", server, download=download)
    archive.mkdir()
    refusal = f"^{archive} can't be read \\(Is a directory\\); delete it or choose another data.root$"
    with pytest.raises(UserError, match=refusal):
        datasets.load_test(data)
    archive.rmdir()
    archive.write_bytes(server.contents[archive.name])

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(cifar10, "open_regular", denied)  # root may read every file
    with pytest.raises(UserError, match=rf"^{archive} can't be read \(Permission denied\); delete it"):
        datasets.load_test(data)
    assert server.requests == []


@pytest.mark.usefixtures("photographs")
def test_a_conditional_run_on_photographs_knows_its_classes_by_name(server: FileServer, tmp_path: Path) -> None:
    run = vae_dist.fit(
        "data.name=cifar10", f"data.root={tmp_path}", f"data.mirror={server.url}", "name=a", "device=cpu",
        "data.validation_images=2", "train.steps=1", "train.batch_size=4", "train.compile=false", "train.threads=1",
        "tracking.wandb=disabled", "model.hidden_dims=[16]", "model.latent_dim=4", "model.conditional=true",
    )  # fmt: skip
    assert run.config.data.classes == list(cifar10.CLASSES)
    assert run.sample(2, labels="cat").shape == (2, 3, 32, 32)


# ---- Both


@pytest.mark.parametrize("name", ["binarized_mnist", "cifar10"])
@pytest.mark.usefixtures("digits", "photographs")
def test_files_that_cannot_be_had_or_used(name: str, server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"data.download=false"):
        datasets.load_test(settings(tmp_path, name, download=False))
    assert files_below(tmp_path) == set()
    with pytest.raises(
        UnreachableError, match=r"can't download .* \(http://127.0.0.1:9/.*; try again, give data.mirror"
    ):
        datasets.load_test(settings(tmp_path, name))  # its own address, where nobody listens

    datasets.load_test(settings(tmp_path, name, server))
    for path in tmp_path.rglob("*test*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(UserError, match=f"{path} is damaged: .*; delete it, and the next run downloads it again"):
            datasets.load_test(settings(tmp_path, name))
        path.unlink()
    assert datasets.load_test(settings(tmp_path, name, server)).info.count > 0

    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnreachableError, match=r"can't download into .*; choose another data.root"):
        datasets.load_test(settings(tmp_path / "file", name, server))


def test_the_option_and_the_documentation_name_every_set() -> None:
    text = next(option.help for option in options() if option.key == "data.name")
    page = (REPOSITORY / "docs/commands.md").read_text()
    for name in datasets.DATASETS:
        assert name in text and (f"`{name}`" in page or name in OWN_IMAGES)
