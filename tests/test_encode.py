"""The latents of a data set in files: what they hold, their statistics, and what a killed or hostile folder does."""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.conftest import REPOSITORY, MakeConfig, opened
from tests.forked import ForkServer
from tests.image_folders import write_images
from tests.sources import of_pixels
from tests.test_evaluation import PIXELS, Linear, linear_gaussian_vae
from vae_dist import config
from vae_dist.data import datasets
from vae_dist.data.chosen import choose
from vae_dist.data.source import Source, every_label, read
from vae_dist.encoding import folder as folders
from vae_dist.encoding import shards
from vae_dist.encoding.encode import encode
from vae_dist.encoding.latents import encode_images
from vae_dist.encoding.request import Request, make_request
from vae_dist.errors import UserError
from vae_dist.files import write_atomically
from vae_dist.locks import locked
from vae_dist.models.tensors import Shape
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, standard_normal, uniform_bits
from vae_dist.training.loop import train

SMALL = ["evaluate.batch_size=48", "encode.shard_images=200", "train.threads=1"]  # 1000 images in shards of 240
DRAWS = ["encode.latents=draws", "encode.seed=7"]
CONV = ["model.architecture=conv", "model.channels=[4,8]", "model.latent_channels=3"]
SIZES = [pytest.param(2, marks=pytest.mark.slow), 3]


@pytest.fixture(scope="module")
def run_dir(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("runs")
    return train(config.load([*smoke_arguments, f"runs_dir={runs_dir}", "name=a", "train.steps=10"]))


@pytest.fixture(scope="module")
def undisturbed(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of one process."""
    return encode(run_dir, [*SMALL, f"output={tmp_path_factory.mktemp('undisturbed')}"])


@pytest.fixture
def finished(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of these files, for a test that changes them."""
    return Path(shutil.copytree(undisturbed, tmp_path / "finished/latents" / undisturbed.name))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def index_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return values


def joined(folder: Path) -> dict[str, Tensor]:
    """The tensors of all files, in the order of the index."""
    files = [load_file(folder / file["name"]) for file in index_of(folder)["files"]]
    return {name: torch.cat([tensors[name] for tensors in files]) for name in files[0]}


def model_and_images(run_dir: Path, split: str) -> tuple[VAE, Source]:
    checkpoint, settings, *_ = opened(run_dir)
    return checkpoint.load_vae(settings, torch.device("cpu")), choose(settings.data, split, None, "encode").source


def infer(vae: VAE, source: Source, labels: Tensor | None = None, batch_size: int = 48) -> tuple[Tensor, Tensor]:
    """The posteriors of all images, by batches of those sizes."""
    images = vae.to_input(read(source, range(source.info.count)))
    given = [None] * -(-len(images) // batch_size) if labels is None else labels.split(batch_size)
    torch.set_num_threads(1)
    with torch.inference_mode():
        each = [vae.infer(batch, y) for batch, y in zip(images.split(batch_size), given, strict=True)]
    return torch.cat([posterior.mean for posterior in each]), torch.cat([posterior.log_variance for posterior in each])


def test_posteriors_are_those_of_the_model_with_the_images_labels(run_dir: Path, undisturbed: Path) -> None:
    vae, source = model_and_images(run_dir, "train")
    mean, log_variance = infer(vae, source)
    tensors = joined(undisturbed)
    assert torch.equal(tensors["mean"], mean) and torch.equal(tensors["log_variance"], log_variance)
    labels = every_label(source)
    assert labels is not None and torch.equal(tensors["labels"], labels)


def test_the_index_describes_every_file(undisturbed: Path) -> None:
    index = index_of(undisturbed)
    assert undisturbed.name == "step_00000010_train"
    assert [(file["first"], file["count"]) for file in index["files"]] == [
        (n, min(240, 1000 - n)) for n in range(0, 1000, 240)
    ]
    for file in index["files"]:
        content = (undisturbed / file["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
    shapes = {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in joined(undisturbed).items()}
    assert {name: (entry["shape"], f"torch.{entry['dtype']}") for name, entry in index["tensors"].items()} == shapes
    assert (index["run"], index["step"], index["images"], index["latent_shapes"]) == ("a", 10, 1000, [[8]])
    assert index["classes"] == [str(digit) for digit in range(10)] and index["names"] is None
    assert index["protocol"]["split"] == "train" and index["protocol"]["batch_size"] == 48


def test_draws_are_the_mean_and_the_noise_of_the_images_index(run_dir: Path, undisturbed: Path, tmp_path: Path) -> None:
    drawn = encode(run_dir, [*SMALL, *DRAWS, f"output={tmp_path}"])
    assert drawn.name == "step_00000010_train_draws_seed_7"
    posterior, noise = joined(undisturbed), standard_normal(7, Stream.ENCODING, 0, range(1000), 8)
    expected = posterior["mean"] + torch.exp(posterior["log_variance"] / 2) * noise
    tensors = joined(drawn)
    torch.testing.assert_close(tensors["latents"], expected, rtol=1e-6, atol=1e-6)
    assert tensors.keys() == {"latents", "labels"}


def by_numpy(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The statistics by numpy, over all images at once."""

    def double(name: str) -> Any:
        return tensors[name].double().reshape(*tensors[name].shape[:2], -1).numpy()

    def described(mean: Any, variance_of_each: Any, values: Any) -> dict[str, Any]:
        variance = values.var((0, 2)) + variance_of_each.mean((0, 2))
        return {
            "mean": mean,
            "standard_deviation": np.sqrt(variance),
            "overall_mean": values.mean(),
            "overall_standard_deviation": np.sqrt(values.var() + variance_of_each.mean()),
        }

    if "latents" in tensors:
        values = double("latents")
        return {"latents": described(values.mean((0, 2)), np.zeros_like(values), values)}
    values, variances = double("mean"), np.exp(double("log_variance"))
    mean = values.mean((0, 2))
    return {
        "latents": described(mean, variances, values),
        "means": described(mean, np.zeros_like(values), values),
    }


def require_numpys_statistics(folder: Path) -> None:
    expected, statistics = by_numpy(joined(folder)), index_of(folder)["statistics"]
    assert statistics.keys() == expected.keys()
    for kind, values in expected.items():
        for name, value in values.items():
            np.testing.assert_allclose(statistics[kind][name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "arguments", [["encode.split=test"], DRAWS, ["encode.dtype=bf16"]], ids=["posterior", "draws", "bf16"]
)
def test_statistics_are_numpys_over_the_numbers_as_stored(arguments: list[str], run_dir: Path, tmp_path: Path) -> None:
    require_numpys_statistics(encode(run_dir, [*SMALL, *arguments, f"output={tmp_path}"]))


def test_latents_of_a_convolutional_model_have_its_shape(smoke_arguments: list[str], tmp_path: Path) -> None:
    digits = ["data.name=synthetic_digits", "data.synthetic_images=1200"]
    run_dir = train(config.load([*smoke_arguments[1:], *digits, *CONV, f"runs_dir={tmp_path}", "train.steps=3"]))
    folder = encode(run_dir, [*SMALL, "encode.split=test"])
    assert folder == run_dir / "latents/step_00000003_test"
    vae, source = model_and_images(run_dir, "test")
    mean, _ = infer(vae, source)
    assert torch.equal(joined(folder)["mean"], mean.unflatten(1, (3, 14, 14)))
    assert len(index_of(folder)["statistics"]["latents"]["mean"]) == 3
    require_numpys_statistics(folder)


def test_a_conditional_model_encodes_with_the_images_labels(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=conditional", "model.conditional=true", "train.steps=3"))
    vae, source = model_and_images(run_dir, "validation")
    labels = every_label(source)
    mean, _ = infer(vae, source, labels)
    tensors = joined(encode(run_dir, [*SMALL, "encode.split=validation"]))
    assert labels is not None and torch.equal(tensors["mean"], mean) and torch.equal(tensors["labels"], labels)


def test_training_images_drawn_at_every_step_are_drawn_once_by_index(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=dynamic", "data.binarize=dynamic", "train.steps=3"))
    settings = opened(run_dir).config
    grey = read(datasets.load_training(settings.data)[0], range(100))
    uniform = (uniform_bits(FIXED_SEED, Stream.BINARIZATION, 2, range(100), 784) >> 8) * 2.0**-24
    expected = torch.from_numpy(uniform).view(grey.shape) * 255 < grey
    chosen = choose(settings.data, "train", None, "encode").source
    assert torch.equal(read(chosen, range(100)) == 255, expected)
    folder = encode(run_dir, SMALL)
    assert "drawn once with seed 0" in index_of(folder)["protocol"]["pixels"]
    mean, _ = infer(*model_and_images(run_dir, "train"))
    assert torch.equal(joined(folder)["mean"], mean)


def test_raw_weights_and_smaller_types_have_folders_of_their_own(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=ema", "ema.decay=0.9", "train.steps=10"))
    names = {}
    for weights in ("ema", "raw"):
        folder = encode(run_dir, [*SMALL, f"weights={weights}", "encode.dtype=fp16", "encode.split=test"])
        names[folder.name] = joined(folder)["mean"]
        checkpoint, settings, *_ = opened(run_dir, [f"weights={weights}"])
        mean, _ = infer(checkpoint.load_vae(settings, torch.device("cpu")), datasets.load_test(settings.data))
        assert torch.equal(names[folder.name], mean.half())
    assert names.keys() == {"step_00000010_test_fp16", "step_00000010_test_fp16_raw"}


def test_images_with_names_get_a_table_of_them(run_dir: Path, tmp_path: Path) -> None:
    names = ["=1+1.png", "b.png", "sub/c.jpg"]
    write_images(tmp_path / "own pictures", names)
    folder = encode(run_dir, [*SMALL, f"encode.folder={tmp_path / 'own pictures'}", f"output={tmp_path}"])
    assert re.fullmatch(r"step_00000010_folder_own-pictures-[0-9a-f]{8}", folder.name)
    rows = list(csv.DictReader((folder / "images.csv").read_text().splitlines()))
    assert {row["name"].removeprefix("'") for row in rows} == set(names) and index_of(folder)["names"] == "images.csv"
    assert [row["index"] for row in rows] == ["0", "1", "2"]
    assert "'=1+1.png" in {row["name"] for row in rows}  # which a spreadsheet does not compute


@pytest.mark.parametrize("pack", ["always", "never"])
def test_damaged_files_of_a_folder_are_left_out_by_the_advice(pack: str, run_dir: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "own", names := ["a.png", "b.png", "c.png"])
    image = tmp_path / "own/b.png"
    image.write_bytes(image.read_bytes()[:-30])
    given = [*SMALL, f"encode.folder={tmp_path / 'own'}", f"output={tmp_path}", f"data.pack={pack}"]
    advice = r"b\.png \(.*; repair or remove them, or set data\.skip_damaged=true to leave them out"
    with pytest.raises(UserError, match=advice):
        encode(run_dir, given)
    folder = encode(run_dir, [*given, "data.check=decode", "data.skip_damaged=true"])
    rows = csv.DictReader((folder / "images.csv").read_text().splitlines())
    assert [row["name"] for row in rows] == [name for name in sorted(names) if name != "b.png"]


# ---- Processes and kills


def launched(server: ForkServer, size: int, command: str, run_dir: Path, *variants: list[str]) -> list[int]:
    """Encode on several processes, and return their exit codes."""
    jobs = Path.cwd() / "jobs.json"
    jobs.write_text(json.dumps([(command, str(run_dir), arguments) for arguments in variants]))
    program = (str(REPOSITORY / "tests/worker.py"), str(jobs))
    ended = server.launch(size, *program) if size > 1 else [server.run(*program)]
    return [process.returncode for process in ended]


@pytest.mark.parametrize("size", SIZES)
def test_the_number_of_processes_changes_no_byte(
    size: int, run_dir: Path, undisturbed: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    drawn = encode(run_dir, [*SMALL, *DRAWS, f"output={tmp_path / 'one'}"])
    few = ["encode.split=test", "evaluate.batch_size=48"]  # one shard: most processes have none
    alone = encode(run_dir, [*few, "train.threads=1", f"output={tmp_path / 'one'}"])
    several = ["train.threads=1", f"output={tmp_path / 'several'}"]
    variants = [[*SMALL, *several], [*SMALL, *several, *DRAWS], [*few, *several]]
    assert launched(fork_server, size, "encode", run_dir, *variants) == [0] * size
    for folder in (undisturbed, drawn, alone):
        assert contents(tmp_path / "several/latents" / folder.name) == contents(folder)


def test_a_killed_encoding_continues_to_the_same_bytes(
    run_dir: Path, undisturbed: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    arguments = [*SMALL, f"output={tmp_path}"]
    assert launched(fork_server, 1, "encode_until_killed", run_dir, arguments) == [-signal.SIGKILL]
    folder = tmp_path / "latents" / undisturbed.name
    (first,) = folder.iterdir()
    (folder / f".{first.name}.ffffffff0000000101234567").write_bytes(b"half of a shard")
    (folder / "notes.txt").write_text("mine")
    before = first.stat().st_ino
    assert encode(run_dir, [value for value in arguments if value != "train.threads=1"]) == folder  # that of the file
    assert contents(folder) == contents(undisturbed) | {"notes.txt": b"mine"}
    assert first.stat().st_ino == before  # it was not written again


def test_a_full_disk_is_one_message_and_the_next_command_continues(
    run_dir: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SMALL, f"output={tmp_path}"]

    def until_full(path: Path, content: bytes) -> None:
        if "00002" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(path, content)

    monkeypatch.setattr(shards, "write_atomically", until_full)
    with pytest.raises(UserError, match=r"can't write .*latents-00002.* \(No space left on device\); make room"):
        encode(run_dir, arguments)
    monkeypatch.setattr(shards, "write_atomically", write_atomically)
    assert contents(encode(run_dir, arguments)) == contents(undisturbed)


@pytest.mark.slow
def test_an_encoding_killed_on_three_processes_continues_on_two(
    run_dir: Path, undisturbed: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    arguments = [*SMALL, f"output={tmp_path}"]
    assert -signal.SIGKILL in launched(fork_server, 3, "encode_until_killed", run_dir, arguments)
    folder = tmp_path / "latents" / undisturbed.name
    assert "index.json" not in contents(folder)
    assert launched(fork_server, 2, "encode", run_dir, arguments) == [0, 0]
    assert contents(folder) == contents(undisturbed)


def test_a_finished_encoding_is_checked_and_not_written_again(
    run_dir: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_ino for path in finished.iterdir()}
    assert encode(run_dir, [*SMALL, f"output={finished.parents[1]}", "train.threads=2"]) == finished
    assert "5 of 5 files were there already, and are whole" in capsys.readouterr().err
    assert {path: path.stat().st_ino for path in finished.iterdir()} == before
    assert index_of(finished)["protocol"]["threads"] == 1  # of the command that computed them


def test_the_index_names_the_threads_that_computed_the_files(run_dir: Path, finished: Path) -> None:
    arguments = [*SMALL, f"output={finished.parents[1]}"]
    paths = sorted(finished.glob("*.safetensors"))
    (finished / "index.json").unlink()
    paths[0].unlink()
    assert encode(run_dir, [*arguments, "train.threads=2"]) == finished
    assert index_of(finished)["protocol"]["threads"] == [1, 2]
    assert [shards.threads_of(finished / "none"), shards.threads_of(finished)] == [[], [1, 2]]


def state_no_threads(path: Path) -> None:
    """Make a shard one of an old version, which did not state the threads."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[shards.METADATA])
    assert about.pop("threads") == 1
    save_file(load_file(path), path, {shards.METADATA: json.dumps(about, sort_keys=True)})


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_folder_of_an_old_version_is_continued(
    is_whole: bool, run_dir: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(finished.glob("*.safetensors"))
    index = index_of(finished)
    index["protocol"]["threads"] = 3
    for path, file in zip(paths, index["files"], strict=True):
        state_no_threads(path)
        content = path.read_bytes()
        file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (finished / "index.json").write_text(json.dumps(index))
    if not is_whole:
        paths[0].unlink()
        (finished / "index.json").unlink()
    kept = {path: path.stat().st_ino for path in paths[0 if is_whole else 1 :]}
    assert encode(run_dir, [*SMALL, f"output={finished.parents[1]}"]) == finished
    assert f"{len(kept)} of 5 files were there already, and are whole" in capsys.readouterr().err
    assert {path: path.stat().st_ino for path in kept} == kept
    assert index_of(finished)["protocol"]["threads"] == (3 if is_whole else 1)


# ---- Folders that hold something else


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def claim_other_images(path: Path) -> None:
    about = json.dumps({"request": None, "first": 0, "count": 3, "sha256": ""})
    save_file({"mean": torch.zeros(3)}, path, {shards.METADATA: about})


def hold_no_finite_numbers(path: Path) -> None:
    """Replace a shard by one that fits its own digest."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[shards.METADATA])
    tensors = {
        name: tensor * torch.nan if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
    }
    digest = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
    save_file(tensors, path, {shards.METADATA: json.dumps(about | {"sha256": digest})})


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_a_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip_a_bit,
    "the end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR."),
    "a long header": lambda path: path.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
    "no metadata": lambda path: save_file(load_file(path), path),
    "deep metadata": lambda path: save_file(load_file(path), path, {shards.METADATA: "[" * 10**5}),
    "other images": claim_other_images,
    "no finite numbers": hold_no_finite_numbers,
    "a pipe": make_a_pipe,
    "a link": make_a_link,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_made_again(
    damage: str, run_dir: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = contents(finished)
    damaged = finished / "latents-00002-of-00005.safetensors"
    DAMAGE[damage](damaged)
    encode(run_dir, [*SMALL, f"output={finished.parents[1]}"])
    (finished / "elsewhere").unlink(missing_ok=True)
    assert contents(finished) == whole and not damaged.is_symlink()
    assert f"{damaged} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("index", [b"[" * 10**5, b"\xff", b"[]", b'{"request": 1, "files": "x"}', b'{"images": NaN}'])
def test_a_hostile_index_is_written_again(index: bytes, run_dir: Path, finished: Path) -> None:
    whole = contents(finished)
    (finished / "index.json").write_bytes(index)
    encode(run_dir, [*SMALL, f"output={finished.parents[1]}"])
    assert contents(finished) == whole


def test_other_latents_are_refused_and_stay(run_dir: Path, finished: Path, make_config: MakeConfig) -> None:
    whole, output = contents(finished), f"output={finished.parents[1]}"
    with pytest.raises(UserError, match=r"evaluate.batch_size \(was 48, now 24\); remove .* or output=FOLDER"):
        encode(run_dir, [*SMALL, output, "evaluate.batch_size=24"])
    with pytest.raises(UserError, match=r"encode.shard_images \(was 240, now 96\)"):
        encode(run_dir, [*SMALL, output, "encode.shard_images=96"])
    another = train(make_config("name=a", "train.steps=10", "seed=1"))
    with pytest.raises(UserError, match=r"checkpoint \(was \w+, now \w+\)"):
        encode(another, [*SMALL, output])
    stray = finished / "latents-00007-of-00008.safetensors"
    stray.write_bytes(b"")
    with pytest.raises(UserError, match=r"holds latents-00007-of-00008\.safetensors, which is no file of these"):
        encode(run_dir, [*SMALL, output])
    stray.unlink()
    assert contents(finished) == whole


def test_two_commands_never_encode_into_one_folder(
    run_dir: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.1)
    lock = finished.with_name(f".{finished.name}.lock")
    with locked(lock, 0, ""), pytest.raises(UserError, match="another command encodes into"):
        encode(run_dir, [*SMALL, f"output={finished.parents[1]}"])


def test_images_that_a_run_lacks_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    run_dir = train(make_config("name=none", "train.steps=1", "data.validation_images=0"))
    with pytest.raises(UserError, match=r"no validation images .* use encode.split=test"):
        encode(run_dir, ["encode.split=validation"])
    with pytest.raises(UserError, match=r"encode.folder=.*nowhere does not exist"):
        encode(run_dir, [f"encode.folder={tmp_path / 'nowhere'}"])
    assert not (run_dir / "latents").exists()


def test_a_split_of_other_images_than_the_runs_is_refused(run_dir: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "own", ["a.png"])
    given = [*SMALL, f"encode.folder={tmp_path / 'own'}", f"output={tmp_path}"]
    for split in ("test", "train"):
        with pytest.raises(UserError, match=r"encode.split does not apply to encode.folder.*; give one$"):
            encode(run_dir, [*given, f"--encode.split={split}"])
    assert not (tmp_path / "latents").exists()
    encode(run_dir, given)
    encode(run_dir, ["encode.split=test", "encode.folder=null", *SMALL, f"output={tmp_path}"])


def small_request(dtype: torch.dtype) -> Request:
    return Request({}, 4, 2, 4, (4,), ("log_variance", "mean"), dtype, has_labels=False)


@pytest.mark.parametrize("shift", [1e5, float("nan")], ids=["too large", "diverged"])
def test_numbers_that_a_file_can_not_hold_are_refused(shift: float) -> None:
    vae, _ = linear_gaussian_vae(shift)
    settings = config.load(["encode.dtype=fp16"])
    source = of_pixels(torch.zeros(4, 1, 3, 4, dtype=torch.uint8))
    message = (
        r"up to 1e\+05 don't fit encode.dtype=fp16: use bf16 or fp32" if shift == 1e5 else "latents of image 2 are"
    )
    with pytest.raises(UserError, match=message):
        encode_images(vae, source, settings, small_request(torch.float16), range(2, 4), lambda _: None)


class TwoLevels(Linear):
    """A VAE with two groups of latents."""

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        return ((1,), (3,))


def test_latents_of_several_shapes_are_flat(run_dir: Path) -> None:
    checkpoint, settings, *_ = opened(run_dir)
    vae = TwoLevels(nn.Linear(12, 8), nn.Linear(4, 12))
    request = make_request(settings, checkpoint, vae, of_pixels(PIXELS).info)
    assert request.tensors(5) == dict.fromkeys(("mean", "log_variance"), ((5, 4), torch.float32))


# ---- The page


def test_the_pages_dataset_gives_scaled_draws(undisturbed: Path) -> None:
    page = (REPOSITORY / "docs/latents.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(block.replace("runs/mine/latents/step_00002750_train", str(undisturbed)), names)
    latents, label = names["latents"][999]
    tensors, statistics = joined(undisturbed), index_of(undisturbed)["statistics"]["latents"]
    assert label == tensors["labels"][999]
    every = torch.stack([names["latents"][index][0] for index in range(1000)]).double()
    assert every.std().item() == pytest.approx(1, abs=0.03)
    mean, deviation = statistics["overall_mean"], statistics["overall_standard_deviation"]
    noise = (every * deviation + mean - tensors["mean"]) / torch.exp(tensors["log_variance"] / 2)
    assert abs(noise.mean().item()) < 0.05 and noise.std().item() == pytest.approx(1, abs=0.03)
    assert latents.shape == (8,)
