import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("processes", "kills"), [(1, 2), (3, 6)])
def test_a_training_killed_again_and_again_loses_nothing(processes: int, kills: int, tmp_path: Path) -> None:
    """Bitwise the weights and moments of the undisturbed run, the same records, and never half a checkpoint."""
    options = [f"--kills={kills}", f"--processes={processes}", "--epochs=10", f"--folder={tmp_path}"]
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/chaos.py"), *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert f"{kills} kills" in result.stdout and "bitwise as undisturbed, the rows too" in result.stdout
