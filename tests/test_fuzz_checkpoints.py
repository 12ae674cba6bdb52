"""Checkpoints of arbitrary content: each is read or refused, without any other effect."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import MakeConfig, Parts, opened
from tests.test_checkpoint import SHAPE, trained
from vae_dist.config import Config
from vae_dist.errors import UserError
from vae_dist.models import build_vae
from vae_dist.runs import manifest as manifests
from vae_dist.runs.checkpoint import OPTIMIZER, Checkpoint
from vae_dist.runs.manifest import MANIFEST
from vae_dist.runs.run import RunDirectory
from vae_dist.runs.state import Best, TrainingState

FILES = (*manifests.FILES, OPTIMIZER)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=8),
    st.sampled_from(["../x", "/etc/passwd", "${oc.env:HOME}", 2**63, -1, 10**400, "step"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(params=[20, pytest.param(1000, marks=pytest.mark.slow)], ids=["quick", "deep"])
def examples(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config("model.hidden_dims=[4]", "model.latent_dim=2")


@pytest.fixture
def whole(config: Config, tmp_path: Path) -> Path:
    state = TrainingState(7, window=[{"loss": 1.5}], best=Best(7, 100.0))
    return RunDirectory(tmp_path / "whole").save(config, trained(config), state)


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """`value` with `new` at a path of keys and indices."""
    if not path:
        return new
    result = value.copy()
    result[path[0]] = replaced(value[path[0]], path[1:], new)
    return result


def places(value: Any) -> list[tuple[Any, ...]]:
    """The paths of every value inside a JSON value, and of the value itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [(), *((key, *rest) for key, inner in items for rest in places(inner))]


def reseal(folder: Path) -> None:
    """Update the manifest to the current files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in FILES:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def read(folder: Path, config: Config) -> None:
    """Find a checkpoint, open it for inference, and resume from it."""
    config.data.image_shape = SHAPE
    vae = build_vae(config, SHAPE)
    before = [parameter.clone() for parameter in vae.parameters()]
    try:
        run = opened(folder)
        run.checkpoint.load_vae(run.config, torch.device("cpu"))
        Checkpoint(folder).load_training(Parts(vae, config))
    except UserError as refusal:
        assert "\n" not in str(refusal)
        assert all(torch.equal(old, new) for old, new in zip(before, vae.parameters(), strict=True))


def fuzzed(whole: Path, name: str, content: bytes, config: Config, *, seal: bool) -> None:
    folder = whole.parents[2] / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / name).write_bytes(content)
    if seal:
        reseal(folder)
    read(folder, config)


@pytest.mark.parametrize("name", [MANIFEST, "state.json"])
def test_json_of_any_form(name: str, whole: Path, config: Config, examples: int) -> None:
    original = json.loads((whole / name).read_text())

    @settings(max_examples=examples)
    @given(st.sampled_from(places(original)), VALUES)
    def check(path: tuple[Any, ...], value: Any) -> None:
        content = json.dumps(replaced(original, path, value)).encode()
        fuzzed(whole, name, content, config, seal=name != MANIFEST)

    check()


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_bytes_of_any_kind(name: str, whole: Path, config: Config, examples: int) -> None:
    original = (whole / name).read_bytes()

    @settings(max_examples=examples)
    @given(st.one_of(st.binary(max_size=200), st.tuples(st.integers(0, len(original)), st.binary(max_size=4))))
    def check(change: bytes | tuple[int, bytes]) -> None:
        """Something else altogether, or the original with some bytes overwritten."""
        content = change
        if not isinstance(change, bytes):
            start, new = change
            content = original[:start] + new + original[start + len(new) :]
        assert isinstance(content, bytes)
        fuzzed(whole, name, content, config, seal=name != MANIFEST)

    check()


def test_tensor_files_with_any_header(whole: Path, config: Config, examples: int) -> None:
    """A header is JSON behind its length, and its sizes and offsets can be anything."""
    content = (whole / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]

    @settings(max_examples=examples)
    @given(st.sampled_from(places(header)), VALUES, st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]))
    def check(path: tuple[Any, ...], value: Any, longer: int) -> None:
        text = json.dumps(replaced(header, path, value)).encode()
        stated = max(len(text) + longer, 0).to_bytes(8, "little")
        fuzzed(whole, "model.safetensors", stated + text + rest, config, seal=True)

    check()
