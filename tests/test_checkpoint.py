import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import MakeConfig, opened
from vae_dist import checkpoint
from vae_dist.checkpoint import TrainingState
from vae_dist.config import Config
from vae_dist.errors import UserError
from vae_dist.manifest import BadCheckpointError
from vae_dist.model import build_vae
from vae_dist.model.vae import VAE

SHAPE = [1, 6, 6]
FILES = ["config.yaml", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def trained(config: Config, steps: int = 1) -> tuple[VAE, torch.optim.Adam]:
    """A small model after a few real optimizer steps."""
    config.data.image_shape = SHAPE
    vae = build_vae(config, SHAPE)
    optimizer = torch.optim.Adam(vae.parameters(), lr=torch.tensor(1e-3), fused=True)
    for _ in range(steps):
        vae(torch.rand(4, *SHAPE), torch.randn(4, vae.latent_dim)).likelihood.mean.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return vae, optimizer


def written(config: Config, tmp_path: Path, *steps: int) -> Path:
    vae, optimizer = trained(config)
    for step in steps:
        last = checkpoint.write(tmp_path / "run", config, vae, optimizer, TrainingState(step))
    return last


def test_what_is_written_comes_back_bitwise(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    vae, optimizer = trained(config, steps=3)
    state = TrainingState(12, window={"loss": 0.1 + 0.2, "steps": 3.0}, features={"ema": {"decay": 0.9}})
    folder = checkpoint.write(tmp_path / "run", config, vae, optimizer, state)
    assert sorted(path.name for path in folder.iterdir()) == FILES

    other, other_optimizer = trained(config)
    assert checkpoint.load_training(folder, other, other_optimizer) == state
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    for ours, theirs in zip(vae.parameters(), other.parameters(), strict=True):
        for moment, value in optimizer.state[ours].items():
            assert torch.equal(value, other_optimizer.state[theirs][moment])


def test_parameter_names_are_plain(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    names = set(load_file(folder / "model.safetensors"))
    assert all(name.startswith(("encoder.", "decoder.")) for name in names)
    moments = {f"{name}.{moment}" for name in names for moment in ("step", "exp_avg", "exp_avg_sq")}
    assert set(load_file(folder / "optimizer.safetensors")) == moments


def test_weights_and_config_are_enough_to_look_at_a_model(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    vae, optimizer = trained(config)
    folder = checkpoint.write(tmp_path / "run", config, vae, optimizer, TrainingState(1))
    moved = folder.rename(tmp_path / "elsewhere")
    found = opened(moved)
    loaded = checkpoint.load_vae(moved, found.config, torch.device("cpu"))
    assert found.output == moved
    latents = torch.randn(3, vae.latent_dim)
    assert torch.equal(loaded.decode(latents).mean, vae.decode(latents).mean)


def test_files_can_be_read_by_whom_the_umask_lets(make_config: MakeConfig, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = written(make_config(), tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in FILES} == {0o644}


def test_the_newest_are_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    written(make_config("checkpoint.keep=3"), tmp_path, 1, 2, 10, 9, 100_000_000)
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["step_00000009", "step_00000010", "step_100000000"]


def test_saving_a_step_again_replaces_it(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1, 1)
    assert checkpoint.verify(folder) == 1


DAMAGES = [(name, damage) for name in FILES for damage in ("cut", "flip", "delete")]
DAMAGES.remove(("manifest.json", "flip"))  # hashed by nobody: a flipped bit in a version's number goes unnoticed


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(name: str, damage: str, make_config: MakeConfig, tmp_path: Path) -> None:
    written(make_config(), tmp_path, 1, 2)
    path = tmp_path / "run/checkpoints/step_00000002" / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-10])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None and newest.name == "step_00000001"


def test_only_damaged_checkpoints_are_an_error_and_never_a_fresh_start(make_config: MakeConfig, tmp_path: Path) -> None:
    (written(make_config(), tmp_path, 1) / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        checkpoint.newest(tmp_path / "run")


def test_unfinished_and_foreign_folders_are_no_checkpoints(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    for name in (".step_00000007.123", "step_abc", "best", "step_1"):
        (folder.parent / name).mkdir()
    assert checkpoint.newest(tmp_path / "run") == folder


def test_nothing_is_changed_when_a_checkpoint_does_not_fit(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    other, optimizer = trained(make_config("model.latent_dim=3"))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(BadCheckpointError, match="does not fit the config's model"):
        checkpoint.load_training(folder, other, optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_the_newest_run_is_found_when_none_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    vae, optimizer = trained(config)
    for age, name in enumerate(("b", "a")):
        folder = checkpoint.write(tmp_path / "runs" / name, config, vae, optimizer, TrainingState(1))
        os.utime(folder / "manifest.json", (1000 + age, 1000 + age))
    assert checkpoint.find(None, tmp_path / "runs").parents[1].name == "a"


@pytest.mark.parametrize(
    ("path", "expected"), [(None, "no trained run in"), ("nowhere", "no run at"), ("empty", "has no checkpoint yet")]
)
def test_what_cannot_be_found_is_said(path: str | None, expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=expected):
        checkpoint.find(tmp_path / path if path else None, tmp_path / "runs")


def test_a_manifest_states_sizes_hashes_and_versions(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_tensors_of_another_shape_are_refused_though_their_hash_holds(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = written(make_config(), tmp_path, 1)
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.layers.0.bias"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(folder) == 1
    config = opened(folder).config
    with pytest.raises(BadCheckpointError, match=r"does not fit the config's model: decoder.layers.0.bias"):
        checkpoint.load_vae(folder, config, torch.device("cpu"))
