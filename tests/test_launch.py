from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.conftest import REPOSITORY

FILES = sorted((REPOSITORY / "launch").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_accepts_every_launch_file(path: Path) -> None:
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_launch_file_says_when_and_how_to_use_it_and_sets_no_hyper_parameter(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    assert f"accelerate launch --config_file launch/{path.name} vae_dist/train.py" in text
