"""The data set `folder`: one set of images, however they are read and wherever they are."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, MakeConfig, newest_checkpoint
from tests.forked import ForkServer
from tests.image_folders import image_bytes, numbered, write_images
from tests.sources import whole
from vae_dist import config
from vae_dist.config import DataConfig
from vae_dist.data import datasets, folder, source
from vae_dist.data.pixels import Rule, decode
from vae_dist.data.source import InMemory, Source, every_name, read
from vae_dist.errors import RunError, UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

NAMES = numbered(60)
PARTS = [*numbered(20, "Train/a/"), *numbered(5, "Train/c/"), *numbered(6, "valid/a/"), *numbered(7, "test/b/")]


@pytest.fixture(autouse=True)
def looked_at_anew() -> None:
    datasets.forget()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pictures", NAMES)


def of_folder(path: Path, *arguments: str) -> DataConfig:
    """The data of a config, with packs beside the folder."""
    given = ["data.name=folder", f"data.path={path}", f"data.root={path.parent / 'data'}", "data.size=8", *arguments]
    return config.load(given).data


def everything(data: DataConfig) -> list[Source]:
    return [*datasets.load_training(data), datasets.load_test(data)]


def names(images: Source) -> list[str]:
    found = every_name(images)
    assert found is not None
    return list(found)


@pytest.mark.parametrize(
    "arguments",
    [*(["data.pack=never", f"data.workers={workers}"] for workers in (0, 1, 7)), ["data.pack=always"], []],
    ids=" ".join,
)
def test_every_image_is_its_file_decoded(arguments: list[str], pictures: Path) -> None:
    """The oracle: `decode`, file by file."""
    data = of_folder(pictures, *arguments)
    seen: list[str] = []
    for images in everything(data):
        assert images.info.image_shape == (3, 8, 8) and images.info.classes is None
        for name, pixels in zip(names(images), whole(images).pixels, strict=True):
            assert torch.equal(pixels, torch.from_numpy(decode(pictures / name, Rule(8))))
        seen += names(images)
    assert sorted(seen) == sorted(NAMES)
    assert (pictures.parent / "data/packed").exists() == ("data.pack=never" not in arguments)


def test_a_folder_always_has_test_images_that_training_never_sees(pictures: Path) -> None:
    training, validation, test = everything(of_folder(pictures))
    assert (test.info.count, validation.info.count) == (6, 5)
    more = everything(of_folder(pictures, "data.test_images=20", "data.validation_images=0"))
    assert [images.info.count for images in more] == [40, 0, 20]
    alike = {images.info.identity for images in (training, validation, test, *more)}
    assert len(alike) == 6
    few = everything(of_folder(write_images(pictures.parent / "few", NAMES[:4])))
    assert few[2].info.count == 1


def test_parts_are_folders_and_classes_are_numbered_alike_in_all(tmp_path: Path) -> None:
    data = of_folder(write_images(tmp_path / "pictures", PARTS))
    training, validation, test = everything(data)
    for images, start in (training, "Train/"), (validation, "valid/"), (test, "test/"):
        assert names(images) == sorted(name for name in PARTS if name.startswith(start))
        assert images.info.class_names == ("a", "b", "c") and images.info.classes == 3
        labels = whole(images).labels
        assert [("a", "b", "c")[label] for label in labels] == [name.split("/")[1] for name in names(images)]
    assert datasets.has_validation_part(data)
    for key in "test_images", "validation_images":
        with pytest.raises(UserError, match=f"of its own: use data.{key}=null"):
            everything(of_folder(tmp_path / "pictures", f"data.{key}=3"))
    (tmp_path / "pictures/valid").rename(tmp_path / "pictures/loose")
    with pytest.raises(UserError, match=r"also images in loose: move these into train, or rename train if it is a cl"):
        datasets.forget()
        everything(of_folder(tmp_path / "pictures"))


@pytest.mark.parametrize(
    ("listed", "classes", "parts"),
    [
        (["a/0.png", "b/1.png", "b/c/2.png"], ("a", "b"), set()),
        (["a/0.png", "1.png"], None, set()),
        (["train/a/0.png", "train/a/1.png", "validation/2.png"], None, {"validation"}),
        (["train/0.png", "train/1.png", "train/2.png", "cover.png"], None, set()),
        (
            ["train/a/0.png", "train/b/1.png", "VAL/b/2.png", "TEST/a/3.png"],
            ("a", "b"),
            {"train", "validation", "test"},
        ),
        (["val/0.png", "test/1.png", "car/2.png"], ("car", "test", "val"), set()),
    ],
)
def test_what_folders_mean(listed: list[str], classes: Sequence[str] | None, parts: set[str], tmp_path: Path) -> None:
    data = of_folder(write_images(tmp_path / "pictures", listed), "data.test_images=1", "data.validation_images=0")
    if "test" in parts:
        data.test_images = None
    if "validation" in parts:
        data.validation_images = None
    training, validation, test = everything(data)
    assert training.info.class_names == classes and test.info.count == 1
    assert (validation.info.count > 0) == ("validation" in parts)
    assert "cover.png" not in names(training)


def test_two_folders_of_one_part_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", ["train/0.png", "val/1.png", "valid/2.png"])
    with pytest.raises(UserError, match="two folders of validation images, val and valid; keep one"):
        datasets.load_test(of_folder(tmp_path / "pictures"))


# ---- Identity


def identities(data: DataConfig) -> list[str]:
    datasets.forget()
    return [images.info.identity for images in everything(data)]


def test_a_folder_and_its_pack_are_the_same_images_on_any_machine(pictures: Path, tmp_path: Path) -> None:
    before = identities(of_folder(pictures, "data.pack=never"))
    assert identities(of_folder(pictures)) == before
    pack = next((tmp_path / "data/packed").glob("[!.]*"))
    elsewhere = tmp_path / "other"
    shutil.copytree(pack, elsewhere / "moved")
    shutil.copytree(pictures, elsewhere / "copied", copy_function=shutil.copy)  # with other times
    shutil.rmtree(pictures)
    assert identities(of_folder(elsewhere / "moved")) == before
    assert identities(of_folder(elsewhere / "moved", "data.size=null")) == before
    assert identities(of_folder(elsewhere / "copied")) == before


@pytest.mark.parametrize("change", ["size", "resize", "channels", "name", "content", "class"])
def test_other_images_have_another_identity(change: str, pictures: Path) -> None:
    before = identities(of_folder(pictures))
    arguments = {"size": ["data.size=9"], "resize": ["data.resize=lanczos"], "channels": ["data.channels=1"]}
    if change == "name":
        (pictures / NAMES[0]).rename(pictures / "x.png")
    elif change == "content":
        (pictures / NAMES[0]).write_bytes(image_bytes(77, size=(13, 10)))
    elif change == "class":
        for name in NAMES:
            write_images(pictures.parent / "moved/a", [name], NAMES.index(name))
        pictures = pictures.parent / "moved"
    assert not set(before) & set(identities(of_folder(pictures, *arguments.get(change, []))))


def test_a_pack_of_another_rule_is_refused(pictures: Path, tmp_path: Path) -> None:
    datasets.load_test(of_folder(pictures))
    pack = next((tmp_path / "data/packed").glob("[!.]*"))
    for argument in "data.size=16", "data.channels=1", "data.resize=lanczos", "data.background=black":
        with pytest.raises(UserError, match=r"is packed with data\.size=8 data\.channels=3 data\.resize=adm "):
            datasets.load_test(of_folder(pack, argument))
    (pack / "names.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a pack that can't be used: .*names\.npy.*; pack the images again"):
        datasets.load_test(of_folder(pack))


def test_where_the_images_lie_changes_no_bit(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = everything(of_folder(pictures))
    assert all(isinstance(images, InMemory) for images in held)
    monkeypatch.setattr(source, "MEMORY_SHARE", 2**60)
    mapped = everything(of_folder(pictures))
    assert not any(isinstance(images, InMemory) for images in mapped)
    for ours, theirs in zip(held, mapped, strict=True):
        assert ours.info == theirs.info and torch.equal(whole(ours).pixels, whole(theirs).pixels)
        assert names(ours) == names(theirs)


def test_all_images_of_another_folder_have_the_runs_shape(pictures: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", PARTS, first=100)
    run = of_folder(pictures, "data.size=null", "data.channels=null")
    run.image_shape, run.identity = [1, 6, 6], "the run's"
    images = folder.all_images(replace(run, path=str(other)))
    assert images.info.image_shape == (1, 6, 6) and sorted(names(images)) == sorted(PARTS)
    assert torch.equal(read(images, [3])[0], torch.tensor(decode(other / names(images)[3], Rule(6, 1))))


# ---- What can't be used


def test_paths_that_are_no_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.npy").touch()
    for name, message in ("none", "does not exist$"), ("file.npy", "is not a folder; data.name=array reads a file"):
        with pytest.raises(UserError, match=message):
            datasets.load_test(of_folder(tmp_path / name))
    monkeypatch.chdir(tmp_path)  # a run that was trained with a relative path, used in another folder
    with pytest.raises(UserError, match=f"data.path=pictures does not exist in {tmp_path}"):
        datasets.load_test(of_folder(Path("pictures")))


@pytest.mark.parametrize("arguments", [[], ["data.pack=never", "data.check=decode"]], ids=["packed", "decoded"])
def test_damaged_files_are_refused_or_left_out(
    arguments: list[str], pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "x.jpg").write_bytes(image_bytes(9, "JPEG")[:-60])
    (pictures / "x.heic").write_bytes(b"heic")
    with pytest.raises(UserError, match=r"1 of 61 images .* x\.jpg \(cut off.*data\.skip_damaged=true"):
        datasets.load_test(of_folder(pictures, *arguments))
    with caplog.at_level("INFO", "vae_dist"):
        images = everything(of_folder(pictures, *arguments, "data.skip_damaged=true"))
    assert sorted(name for part in images for name in names(part)) == sorted(NAMES)
    assert "1 damaged file is left out: x.jpg (cut off" in caplog.text and "1 .heic (export them" in caplog.text
    with pytest.raises(UserError, match=r"1 of 61 images .* x\.jpg"):
        datasets.load_test(of_folder(pictures, *arguments))


def test_a_file_that_can_not_be_decoded_ends_the_run_with_its_name(pictures: Path) -> None:
    data = of_folder(pictures, "data.pack=never")
    training = datasets.load_training(data)[0]
    name = names(training)[5]
    status = (pictures / name).stat()
    (pictures / name).write_bytes(bytes(status.st_size))
    with pytest.raises(RunError, match=f"{name} has changed since the start"):
        read(training, range(10))
    os.utime(pictures / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(RunError, match=rf"{name} can't be decoded \(.*data\.check=decode"):
        read(training, range(10))


def test_a_set_that_takes_half_the_disk_is_not_packed(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 30_000}))
    with caplog.at_level("INFO", "vae_dist"):
        everything(of_folder(pictures))
    assert "is not packed: it would take" in caplog.text and "is decoded in every epoch" in caplog.text
    caplog.clear()
    monkeypatch.undo()
    with caplog.at_level("INFO", "vae_dist"):
        everything(of_folder(pictures, f"data.pack_dir={pictures / NAMES[0] / 'x'}"))
    assert "is not packed: can't write to" in caplog.text


# ---- Runs


def weights(run_dir: Path) -> bytes:
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    return (checkpoint / "model.safetensors").read_bytes()


def losses(run_dir: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], value) for record in records for key, value in record.items() if key.endswith("elbo")]


COMMON = ["data.name=folder", "data.size=8", "data.validation_images=6", "train.batch_size=12", "train.log_every=1",
          "data.synthetic_images=6", "objective.reconstruction=gaussian", "data.flip=true"]  # fmt: skip


@pytest.mark.slow
def test_a_run_is_the_same_on_a_folder_and_on_its_pack_on_another_machine(
    make_config: MakeConfig, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [*COMMON, f"data.path={pictures}", f"data.root={tmp_path / 'data'}", "train.steps=8"]
    packed = train(make_config("name=packed", *common, "data.pack=always"))
    decoded = train(make_config("name=decoded", *common, "data.pack=never", "data.workers=7"))
    assert weights(decoded) == weights(packed) and losses(decoded) == losses(packed)
    with monkeypatch.context() as patch:
        patch.setattr(source, "MEMORY_SHARE", 2**60)
        assert weights(train(make_config("name=mapped", *common))) == weights(packed)

    stopped = train(make_config("name=stopped", *common, "train.steps=3"))
    moved = tmp_path / "elsewhere"
    next((tmp_path / "data/packed").glob("[!.]*")).rename(moved)
    shutil.rmtree(pictures)
    given = [f"data.path={moved}", f"data.root={tmp_path / 'nowhere'}"]
    train(make_config("name=stopped", *common, *given))
    assert weights(stopped) == weights(packed)
    assert set(losses(stopped)) - set(losses(packed)) <= {
        loss for loss in losses(stopped) if loss[0] == 3
    }  # its last one
    assert evaluate(stopped, ["evaluate.importance_samples=0"])["images"] == 6
    sample(packed, ["sample.kind=neighbours", *given])


def test_readers_and_resumed_runs_refuse_other_images(make_config: MakeConfig, pictures: Path, tmp_path: Path) -> None:
    common = [*COMMON, f"data.path={pictures}", f"data.root={tmp_path / 'data'}"]
    run_dir = train(make_config("name=a", *common, "train.steps=2"))
    (pictures / NAMES[0]).unlink()
    with pytest.raises(UserError, match="are not those that run a was started with"):
        train(make_config("name=a", *common, "train.steps=4"))
    with pytest.raises(UserError, match="are not those that the run was trained on"):
        evaluate(run_dir, [])


def test_counts_are_logged_once(make_config: MakeConfig, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", PARTS)
    common = [*COMMON, f"data.path={tmp_path / 'pictures'}", f"data.root={tmp_path / 'data'}", "train.steps=2"]
    run_dir = train(make_config("name=a", *common, "data.validation_images=null"))
    log = (run_dir / "log.txt").read_text()
    assert log.count("25 training, 6 validation and 7 test images of 3 classes") == 1
    assert log.count("is packed in") == log.count(" pictures is packed in data/packed/pictures-") == 1  # no home's name
    assert "not used" not in log


def test_images_beside_the_parts_are_counted_in_one_warning(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_images(tmp_path / "pictures", [*PARTS, *numbered(3)])
    common = [*COMMON, f"data.path={path}", f"data.root={tmp_path / 'data'}", "train.steps=2"]
    run_dir = train(make_config("name=a", *common, "data.validation_images=null"))
    warning = f"{path}: 3 of 41 images are in no folder of a part and are not used; move them into the folder of train"
    assert (run_dir / "log.txt").read_text().count(warning) == 1
    caplog.clear()
    assert folder.all_images(of_folder(path)).info.count == 41  # an evaluation of this folder uses all
    assert "not used" not in caplog.text
    assert len(folder.pack(of_folder(path)).names) == 41
    assert caplog.text.count(warning) == 1


SLOW_TO_PACK = """
import sys, time
from vae_dist import config
from vae_dist.data import decoding
from vae_dist.errors import UserError
from vae_dist.training.loop import train

decode = decoding.decode
def slow(path, rule):
    time.sleep(0.2)
    return decode(path, rule)
decoding.decode = slow
try:
    train(config.load(sys.argv[1:]))
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_processes_wait_longer_for_the_pack_than_for_a_collective(
    fork_server: ForkServer, make_config: MakeConfig, smoke_arguments: list[str], pictures: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    common = [
        *smoke_arguments, *COMMON, f"data.path={pictures}", f"data.root={tmp_path / 'data'}", "train.steps=8",
        f"runs_dir={tmp_path / 'runs'}", "data.workers=1", "runtime.start_timeout=6",
    ]  # fmt: skip
    ended = fork_server.launch(2, "-c", SLOW_TO_PACK, *common, "name=two")
    assert not any(result.returncode for result in ended), ended
    assert newest_checkpoint(tmp_path / "runs/two") is not None
    assert "".join(result.stderr for result in ended).count("training, 6 validation") == 1
    (pictures / "x.jpg").write_bytes(image_bytes(9, "JPEG")[:-60])
    ended = fork_server.launch(2, "-c", SLOW_TO_PACK, *common, "name=refused")
    assert [result.stdout.count("1 of 61 images") for result in ended] == [1, 1]


def test_a_forked_process_decodes_in_threads_of_its_own(tmp_path: Path) -> None:
    """Those of its parent are not there: it would wait for them for ever."""
    path = write_images(tmp_path / "pictures", numbered(40))
    code = f"""
import os, signal, torch
torch.set_num_threads(1)  # or its own threads would be missing, too
from vae_dist.config import DataConfig
from vae_dist.data import datasets
from vae_dist.data.source import read
data = DataConfig(name="folder", path={str(path)!r}, root={str(tmp_path)!r}, size=8, pack="never", workers=2)
before = read(datasets.load_training_set(data), range(30))
if (child := os.fork()) == 0:
    signal.alarm(60)
    os._exit(not read(datasets.load_training_set(data), range(30)).equal(before))
raise SystemExit(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
