import hashlib
import json
import logging
import math
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import REPOSITORY, MakeConfig, Parts, newest_checkpoint, opened, update_of
from tests.forked import ForkServer
from vae_dist.config import Config
from vae_dist.distributed import processes
from vae_dist.errors import RunError, UserError
from vae_dist.models import build_vae
from vae_dist.runs import checkpoint, manifest, saving
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.lookup import find, open_checkpoint
from vae_dist.runs.manifest import BadCheckpointError
from vae_dist.runs.run import RunDirectory
from vae_dist.runs.state import Best, TrainingState, parse_state, state_values
from vae_dist.training.meter import Meter
from vae_dist.training.optimizers import Adam

CRASH = str(REPOSITORY / "tests/crash.py")
SHAPE = [1, 6, 6]
WINDOW = ["loss", "reconstruction", "kl", "grad_norm", "updates"]
FILES = ["config.yaml", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def trained(config: Config, steps: int = 1) -> Parts:
    """A small model after a few real optimizer steps."""
    config.data.image_shape = SHAPE
    vae = build_vae(config, SHAPE)
    parts = Parts(vae, config)
    for _ in range(steps):
        total = vae(torch.rand(4, *SHAPE), torch.randn(1, 4, vae.latent_dim)).likelihood.mean.sum()
        parts.optimizer.step(torch.autograd.grad(total, list(vae.parameters())), torch.tensor(1e-3))
    return parts


def written(config: Config, tmp_path: Path, *steps: int) -> Path:
    parts = trained(config)
    for step in steps:
        last = RunDirectory(tmp_path / "run").save(config, parts, TrainingState(step))
    return last


def test_the_state_of_thousands_of_processes_can_be_read_back() -> None:
    sums = {f"adversarial_number_{number}": 1 / 3 for number in range(15)}
    state = TrainingState(12, world_size=4096, window=[sums] * 4096)
    content = manifest.to_json(state_values(state))
    assert len(content) < manifest.SMALL_FILE_BYTES
    assert parse_state(content, Path("state.json")) == state


def test_a_saved_checkpoint_loads_bitwise(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is flushed to the disk before the rename, the manifest as the last file, and the new name after it."""
    config = make_config()
    parts = trained(config, steps=3)
    window = [{"loss": 0.1 + 0.2, "updates": 3.0, "psnr": math.inf}, {"psnr": -math.inf}]  # an objective may log such
    state = TrainingState(12, window=window, features={"ema": {"decay": 0.9}})
    folder, synced = tmp_path / "run/checkpoints/step_00000012", []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_ino, folder.exists())))
        assert RunDirectory(tmp_path / "run").save(config, parts, state) == folder
    assert sorted(path.name for path in folder.iterdir()) == FILES
    inodes = {path.stat().st_ino: path.name for path in (*folder.iterdir(), folder, folder.parent)}
    *files, manifest_file, renamed, published = [(inodes[inode], is_there) for inode, is_there in synced]
    assert sorted(files) == [(name, False) for name in FILES if name != "manifest.json"]
    assert manifest_file == ("manifest.json", False)
    assert (renamed, published) == ((folder.name, False), ("checkpoints", True))

    other = trained(config)
    assert Checkpoint(folder).load_training(other) == state
    for ours, theirs in (parts.vae, other.vae), (parts.optimizer, other.optimizer):
        saved, loaded = ours.state_dict(), theirs.state_dict()
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_parameter_names_are_plain(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    names = set(load_file(folder / "model.safetensors"))
    assert all(name.startswith(("encoder.", "decoder.")) for name in names)
    moments = {f"{name}.{moment}" for name in names for moment in ("step", "exp_avg", "exp_avg_sq")}
    assert set(load_file(folder / "optimizer.safetensors")) == moments


def test_weights_and_config_are_enough_to_load_a_model(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    parts = trained(config)
    folder = RunDirectory(tmp_path / "run").save(config, parts, TrainingState(1))
    moved = folder.rename(tmp_path / "elsewhere")
    run = opened(moved)
    loaded = Checkpoint(moved).load_vae(run.config, torch.device("cpu"))
    assert run.output == moved
    latents = torch.randn(3, parts.vae.latent_dim)
    assert torch.equal(loaded.decode(latents).mean, parts.vae.decode(latents).mean)


@pytest.mark.parametrize(("umask", "files", "folders"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_the_umask_sets_the_files_permissions(
    umask: int, files: int, folders: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        folder = written(make_config(), tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in FILES} == {files}
    assert stat.S_IMODE(folder.stat().st_mode) == folders


def test_the_newest_are_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    written(make_config("checkpoint.keep=3"), tmp_path, 1, 2, 10, 9, 100_000_000)
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["step_00000009", "step_00000010", "step_100000000"]


def test_the_best_by_validation_is_kept_next_to_the_newest(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    parts = trained(config)
    for step in range(1, 6):
        state = TrainingState(step, best=Best(min(step, 2), 100.0))
        RunDirectory(tmp_path / "run").save(config, parts, state)
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["step_00000002", "step_00000004", "step_00000005"]
    assert find(tmp_path / "run/best", tmp_path).folder.name == "step_00000002"
    assert find(tmp_path / "run", tmp_path).folder.name == "step_00000005"


def test_without_a_validation_there_is_no_best(make_config: MakeConfig, tmp_path: Path) -> None:
    written(make_config(), tmp_path, 1)
    with pytest.raises(UserError, match="has no validation yet, so no best checkpoint"):
        find(tmp_path / "run/best", tmp_path)


def test_a_checkpoint_that_is_open_is_not_pruned_until_it_is_closed(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    with open_checkpoint(folder, []) as run:
        written(make_config(), tmp_path, 2, 3, 4)
        assert run.checkpoint.verify().step == 1
    written(make_config(), tmp_path, 5)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step_00000004", "step_00000005"]


def test_readers_get_a_whole_checkpoint_however_often_a_run_prunes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    written(config, tmp_path, 1, 2)
    stop = threading.Event()

    def keep_saving() -> None:
        for step in count(3):
            if stop.is_set():
                return
            written(config, tmp_path, step)

    writer = threading.Thread(target=keep_saving)
    writer.start()
    try:
        for _ in range(20):
            with open_checkpoint(tmp_path / "run", []) as run:
                run.checkpoint.load_vae(run.config, torch.device("cpu"))
    finally:
        stop.set()
        writer.join()


def test_a_failed_pruning_warns_and_the_run_continues(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(logging.getLogger("vae_dist"), "propagate", True)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        written(make_config(), tmp_path, 1, 2, 3)
    assert "can't be removed (Permission denied); the training continues" in caplog.text
    assert find(tmp_path / "run", tmp_path).folder.name == "step_00000003"
    saving.recover(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_00000002", "step_00000003"]


def test_a_full_disk_leaves_the_last_good_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    """A real limit of the operating system, on the size of files. An older one is pruned only after a save."""
    good = written(make_config(), tmp_path, 1, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match=r"step 3 can't be saved in .*: File too large; make room .*ulimit.*"):
            written(make_config("name=mine"), tmp_path, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in good.parent.iterdir()) == ["step_00000001", "step_00000002"]
    assert newest_checkpoint(tmp_path / "run") == good


def test_numbers_that_are_not_finite_are_never_published(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    parts = trained(config)
    parts.optimizer.state_dict()["encoder.layers.0.weight.exp_avg"].view(-1)[0] = torch.nan
    with pytest.raises(RunError, match=r"7 are not finite; they are not saved\. Start a new run with a lower"):
        RunDirectory(tmp_path / "run").save(config, parts, TrainingState(7))
    assert newest_checkpoint(tmp_path / "run") is None


def test_saving_a_step_again_replaces_it(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    parts = trained(config)
    for pending in (True, False):
        folder = RunDirectory(tmp_path / "run").save(config, parts, TrainingState(1, validation_pending=pending))
    assert not Checkpoint(folder).state.validation_pending
    assert [path.name for path in folder.parent.iterdir()] == ["step_00000001"]


def test_a_save_killed_at_any_point_leaves_a_resumable_run(fork_server: ForkServer, tmp_path: Path) -> None:
    """Before and after every file, the manifest, the renames and the pruning: wherever a save touches the disk."""
    result = fork_server.run(CRASH, str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    points = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(points) > 40
    for point in points:
        assert point["step"] == 2 or (point["step"] == 3 and not point["again"]), point
        assert len(point["after"]) == 2, point  # nothing is left of the killed save, and pruning works again
    assert {point["step"] for point in points if not point["again"]} == {2, 3}
    touched = " ".join(point["touched"] for point in points)
    for stage in (*FILES, ".writing-step_00000003", "os.rename", "shutil.rmtree", ".pruned-step_00000001"):
        assert stage in touched
    replaced = [point for point in points if point["again"] and "step_00000002" not in point["left"]]
    assert replaced, "a kill between the two renames of a replacement was tried"


def test_later_checkpoints_are_set_aside_on_an_earlier_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    written(make_config("checkpoint.keep=9"), tmp_path, 1, 2, 3)
    RunDirectory(tmp_path / "run").resume_from(1)
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000001"]
    assert len(list((tmp_path / "run/checkpoints").glob("set_aside-step_*"))) == 2


def test_a_directory_belongs_to_one_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_dist.runs.run.LOCK_SECONDS", 0.1)
    assert not RunDirectory(tmp_path).is_training
    with RunDirectory(tmp_path).claim():
        assert RunDirectory(tmp_path).is_training
        with pytest.raises(UserError, match="another training is writing"), RunDirectory(tmp_path).claim():
            pass
    assert not RunDirectory(tmp_path).is_training
    with RunDirectory(tmp_path).claim():
        pass


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    hold = "import pathlib, sys, time; from vae_dist.runs.run import RunDirectory\n"
    hold += "with RunDirectory(pathlib.Path(sys.argv[1])).claim(): print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    assert RunDirectory(tmp_path).is_training
    process.kill()
    process.wait()
    process.stdout.close()
    assert not RunDirectory(tmp_path).is_training


def test_a_checkpoint_that_is_visible_late_is_awaited(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system, where a rename by another machine shows later."""
    folder = written(make_config(), tmp_path, 1)
    hidden = folder.rename(tmp_path / "hidden")
    threading.Timer(0.5, lambda: hidden.rename(folder)).start()
    checkpoint.await_visible(folder)
    assert Checkpoint(folder).verify().step == 1
    monkeypatch.setattr(checkpoint, "VISIBLE_SECONDS", 0.3)
    with pytest.raises(RunError, match="can't be seen by all processes"):
        checkpoint.await_visible(tmp_path / "never")


DAMAGES = [(name, damage) for name in FILES for damage in ("cut", "flip", "delete", "swap", "link", "pipe")]
DAMAGES.remove(("manifest.json", "flip"))  # no hash covers it: a flipped bit in a version's number goes unnoticed


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_skipped(name: str, damage: str, make_config: MakeConfig, tmp_path: Path) -> None:
    written(make_config(), tmp_path, 1, 2)
    path = tmp_path / "run/checkpoints/step_00000002" / name
    content = bytearray(path.read_bytes())
    if damage in ("delete", "link", "pipe"):
        path.unlink()
    if damage == "swap":
        path.write_bytes((written(make_config("seed=1"), tmp_path / "other", 3) / name).read_bytes())
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "cut":
        path.write_bytes(content[:-10])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name == "step_00000001"


def test_only_damaged_checkpoints_are_an_error_and_never_a_fresh_start(make_config: MakeConfig, tmp_path: Path) -> None:
    (written(make_config(), tmp_path, 1) / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        newest_checkpoint(tmp_path / "run")


def test_unfinished_and_foreign_folders_are_no_checkpoints(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    for name in (".step_00000007.123", "step_abc", "best", "step_1"):
        (folder.parent / name).mkdir()
    assert newest_checkpoint(tmp_path / "run") == folder


@pytest.mark.parametrize("unfit", ["model.latent_dim=3", "optim.optimizer=adamax"])  # the first file, and the last
def test_nothing_is_changed_when_a_checkpoint_does_not_fit(unfit: str, make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    other = trained(make_config(unfit))
    before = {name: tensor.clone() for name, tensor in other.vae.state_dict().items()}
    with pytest.raises(BadCheckpointError, match="does not fit the config's model"):
        Checkpoint(folder).load_training(other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.vae.state_dict().items())


def test_the_newest_run_is_found_when_none_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    parts = trained(config)
    for age, name in enumerate(("b", "a")):
        folder = RunDirectory(tmp_path / "runs" / name).save(config, parts, TrainingState(1))
        os.utime(folder / "manifest.json", (1000 + age, 1000 + age))
    assert find(None, tmp_path / "runs").folder.parents[1].name == "a"


@pytest.mark.parametrize(
    ("path", "expected"), [(None, "no trained run in"), ("nowhere", "no run at"), ("empty", "has no checkpoint yet")]
)
def test_a_missing_run_or_checkpoint_is_named(path: str | None, expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=expected):
        find(tmp_path / path if path else None, tmp_path / "runs")


def test_a_folder_of_checkpoints_and_a_file_in_one_are_understood(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1, 2)
    assert find(folder.parent, tmp_path).folder == folder
    assert find(folder / "model.safetensors", tmp_path).folder == folder
    with pytest.raises(UserError, match=r"can't read a+ \(File name too long\)"):
        find(Path("a" * 300), tmp_path)


def test_a_manifest_states_sizes_hashes_and_versions(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_tensors_of_another_shape_or_type_are_refused_despite_a_valid_hash(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = written(make_config(), tmp_path, 1)
    tensors, name = load_file(folder / "model.safetensors"), "decoder.layers.0.bias"
    for other in (torch.zeros(1), tensors[name].double()):
        save_file({**tensors, name: other}, folder / "model.safetensors")
        reseal(folder)
        assert Checkpoint(folder).verify().step == 1
        config = opened(folder).config
        with pytest.raises(BadCheckpointError, match=r"does not fit the config's model: decoder.layers.0.bias"):
            Checkpoint(folder).load_vae(config, torch.device("cpu"))


def reseal(folder: Path) -> None:
    """Update the manifest to the current files, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../x.safetensors", "x.txt", "/x.safetensors", "A.safetensors", ".safetensors", "x/"])
def test_files_of_other_names_are_never_read(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["model.safetensors"]
    (folder.parent / "x.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadCheckpointError, match="is not a checkpoint's manifest"):
        Checkpoint(folder)


@pytest.mark.parametrize(("count", "accepted"), [(28, True), (29, False), (40, False)])
def test_a_manifest_lists_a_bounded_number_of_files(
    count: int, accepted: bool, make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = written(make_config(), tmp_path, 1)
    content = (folder / "model.safetensors").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    for number in range(count):
        (folder / f"network_{number}.safetensors").write_bytes(content)
        manifest["files"][f"network_{number}.safetensors"] = manifest["files"]["model.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if accepted:
        assert Checkpoint(folder).verify().step == 1
    else:
        with pytest.raises(BadCheckpointError, match="is not a checkpoint's manifest"):
            Checkpoint(folder)


def two_networks(config: Config, *, frozen_seed: int) -> Parts:
    """A model with a second network that is trained and a third one that is frozen."""
    parts = trained(config)
    torch.manual_seed(frozen_seed)
    second, third = nn.Linear(3, 2), nn.Linear(4, 5)
    parts.networks["critic"] = second
    parts.optimizers["critic_optimizer"] = Adam(second.named_parameters(), config.optim)
    parts.frozen["features"] = third
    return parts


def test_more_networks_are_saved_and_of_a_frozen_one_its_hash(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    saved = two_networks(config, frozen_seed=0)
    saved.optimizers["critic_optimizer"].step([torch.ones(2, 3), torch.ones(2)], torch.tensor(0.1))
    folder = RunDirectory(tmp_path / "run").save(config, saved, TrainingState(3))
    extra = {"critic.safetensors", "critic_optimizer.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*FILES, *extra}
    assert list(Checkpoint(folder).manifest.frozen) == ["features"]

    loaded = two_networks(config, frozen_seed=0)
    Checkpoint(folder).load_training(loaded)
    for name, network in saved.networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(loaded.networks[name].state_dict()[key], tensor)
    assert loaded.optimizers["critic_optimizer"].state_dict()["bias.step"] == 1

    other = two_networks(config, frozen_seed=1)
    before = [tensor.clone() for network in other.networks.values() for tensor in network.parameters()]
    with pytest.raises(BadCheckpointError, match="other weights of the frozen network 'features'"):
        Checkpoint(folder).load_training(other)
    after = [tensor for network in other.networks.values() for tensor in network.parameters()]
    assert all(map(torch.equal, before, after))
    with pytest.raises(BadCheckpointError, match="frozen network 'features'"):  # of a run that had none
        Checkpoint(written(config, tmp_path / "other", 1)).load_training(two_networks(config, frozen_seed=0))


@pytest.mark.parametrize("name", ["critic", "critic_optimizer"])
def test_a_checkpoint_without_a_network_of_the_recipe_is_refused(
    name: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config()
    saved = two_networks(config, frozen_seed=0)
    (saved.networks if name == "critic" else saved.optimizers).pop(name)
    folder = RunDirectory(tmp_path / "run").save(config, saved, TrainingState(3))
    with pytest.raises(BadCheckpointError, match=f"has no {name}.safetensors"):
        Checkpoint(folder).load_training(two_networks(config, frozen_seed=0))


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ([dict(zip(WINDOW, [6.0, 4.0, 2.0, 3.0, 2.0], strict=True))], [6.0, 4.0, 2.0, 3.0, 2.0]),
        ([{"reconstruction": 4.0, "kl": 2.0, "updates": 2.0}], [0.0, 4.0, 2.0, 0.0, 2.0]),
        ([{"loss": 6.0, "adversarial": 7.0, "updates": 1.0}, {"loss": 1.5}], [7.5, 0.0, 0.0, 0.0, 1.0]),
        ([], [0.0] * 5),
    ],
)
def test_a_window_with_fewer_or_other_names_is_read(
    window: list[dict[str, float]], expected: list[float], make_config: MakeConfig, tmp_path: Path
) -> None:
    """Of a checkpoint of an earlier version, another recipe, or more processes."""
    config = make_config("train.precision=fp32")
    folder = RunDirectory(tmp_path / "run").save(config, trained(config), TrainingState(1, window=window))
    with processes.join(config) as world:
        update = update_of(config, world, SHAPE)
        state = update.restore(Checkpoint(folder))
        (sums,) = Meter(update, world, 50, state.window).window()
    assert list(sums) == WINDOW and list(sums.values()) == expected


def test_nothing_is_allocated_for_a_model_that_only_a_config_claims(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    for claim in ("[20000,20000]", "[3000,7,3000]"):
        text = (folder / "config.yaml").read_text()
        hidden = text.partition("hidden_dims:")[2].partition("\nobjective")[0]
        (folder / "config.yaml").write_text(text.replace(hidden, f" {claim}"))
        reseal(folder)
        config = opened(folder).config
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(BadCheckpointError, match=r"does not fit the config's model|can't be built"):
            Checkpoint(folder).load_vae(config, torch.device("cpu"))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes; it would be 40 GB


def test_a_file_of_another_size_than_promised_is_not_read(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    for name in FILES:
        content = (folder / name).read_bytes()
        os.truncate(folder / name, 2**40)  # a sparse terabyte
        with pytest.raises(BadCheckpointError, match=r"bytes, not|Has more than"):
            Checkpoint(folder).verify()
        (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"]["bytes"] = 2**40
    os.truncate(folder / "state.json", 2**40)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadCheckpointError, match="too many for such a file"):
        Checkpoint(folder).verify()


STATES = [
    {"step": -1}, {"step": True}, {"step": 1.5}, {"step": 10**30}, {"step": "1"}, {"step": None}, {"unknown": 1},
    {"window": [{"loss": "high"}]}, {"window": [1]}, {"window": {"loss": 1.0}}, {"window": None},
    {"window": [{"loss": 10**309}]}, {"best": {"step": 1}}, {"best": 7},
    {"best": {"step": 1, "negative_elbo": None}}, {"validation_pending": "no"}, {"features": []}, {"loss_scale": 3},
]  # fmt: skip


@pytest.mark.parametrize("values", STATES, ids=str)
def test_a_state_that_no_run_writes_is_refused(
    values: dict[str, object], make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = written(make_config(), tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | values))
    reseal(folder)
    with pytest.raises(BadCheckpointError):
        Checkpoint(folder).verify()


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"{}", b"[]", b"null", b"1" * 10_000, b"\xff\xfe", b'{"format": NaN}', b""],
    ids=range(8),
)
def test_a_malformed_manifest_or_state_is_refused(content: bytes, make_config: MakeConfig, tmp_path: Path) -> None:
    for name in ("manifest.json", "state.json"):
        folder = written(make_config(), tmp_path / name, 1)
        (folder / name).write_bytes(content)
        if name == "state.json":
            reseal(folder)
        if (name, content) != ("state.json", b"{}"):
            with pytest.raises(BadCheckpointError):
                Checkpoint(folder).verify()


def test_another_format_is_refused_with_a_remedy(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(BadCheckpointError, match="has format 3, and this version reads 2; use the version of vae_dist"):
        Checkpoint(folder).verify()


def test_a_checkpoint_that_is_not_finite_is_not_loaded(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.layers.0.bias"][0] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)
    with pytest.raises(BadCheckpointError, match="holds numbers that are not finite"):
        Checkpoint(folder).load_vae(opened(folder).config, torch.device("cpu"))


class Malicious:
    """Its pickle runs code when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("touched",)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"])
def test_a_pickle_in_a_checkpoint_is_never_run(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    torch.save(Malicious(), folder / name)
    reseal(folder)
    config = make_config()
    parts = trained(config)
    with pytest.raises(UserError):
        run = opened(folder)
        Checkpoint(run.checkpoint.folder).load_training(parts)
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    "line",
    ["${oc.env:HOME}", "${oc.coerce:this.x,1}", "${oc.create:{}}", "${seed}", "!!python/object/apply:os.mkdir [x]"],
)
def test_an_untrusted_config_reads_no_environment_or_file(line: str, make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        text.replace("runs_dir:", f"output: {line}\nruns_dir:").replace("output: null\n", "")
    )
    reseal(folder)
    with pytest.raises(UserError):
        opened(folder)
    assert not Path("x").exists() and "this" not in sys.modules


def test_an_untrusted_run_redirects_no_write(make_config: MakeConfig, tmp_path: Path) -> None:
    run_dir = written(make_config(), tmp_path, 1).parents[1]
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("samples", "images", "evaluations", "evaluation.json", "metrics.jsonl", "wandb", "log.txt"):
        (run_dir / name).symlink_to(mine)
        with pytest.raises(UserError, match=f"{name} is a symbolic link"):
            opened(run_dir)
        opened(run_dir, [f"output={tmp_path / 'out'}"])  # read, with the files elsewhere
        (run_dir / name).unlink()
    assert not list(mine.iterdir())


def test_a_pipe_in_the_place_of_the_lock_of_an_untrusted_run_blocks_no_command(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    run_dir = written(make_config(), tmp_path, 1).parents[1]
    (run_dir / ".lock").unlink(missing_ok=True)
    os.mkfifo(run_dir / ".lock")
    assert not opened(run_dir, [f"output={tmp_path / 'out'}"]).live


def test_the_best_validation_of_an_earlier_version_is_read() -> None:
    written = json.dumps({"step": 7, "best": {"step": 3, "negative_elbo": 101.5}}).encode()
    assert parse_state(written, Path("state.json")).best == Best(3, 101.5, "negative_elbo")
    for best in {"negative_elbo": 1.0}, {"step": 3, "value": 1.0, "metric": 5}, {"step": 3, "value": "1"}:
        with pytest.raises(BadCheckpointError, match="is not a training's state"):
            parse_state(json.dumps({"step": 7, "best": best}).encode(), Path("state.json"))


def test_the_config_is_that_of_the_verified_bytes(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config("seed=7"), tmp_path, 1)
    checkpoint = Checkpoint(folder).verify()
    (folder / "config.yaml").unlink()  # another process prunes the checkpoint
    assert checkpoint.config.seed == 7


def test_a_checkpoint_that_was_pruned_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    shutil.rmtree(folder)
    message = f"^there is no checkpoint at {folder}: .*; load {folder.parents[1]} for the newest$"
    with pytest.raises(UserError, match=message):
        find(folder, tmp_path)
