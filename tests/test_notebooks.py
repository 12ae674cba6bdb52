"""The notebooks of docs/notebooks run from their first cell to the last one, and have the outputs of such a run."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests import notebooks
from tests.conftest import REPOSITORY
from vae_dist.terminal import progress as progress_module
from vae_dist.terminal.progress import progress

FAST = ["tracking.wandb=disabled", "device=cpu", "train.threads=1", "train.compile=false", "train.log_every=1"]
DIGITS = [*FAST, "data.name=synthetic_digits", "data.synthetic_images=600", "model.hidden_dims=[16]"]
SHAPES = [*FAST, "data.size=32", "train.precision=fp32", "data.test_images=20"]
SMALL: dict[str, dict[str, object]] = {
    "tutorial": {"EPOCHS": 1, "LATENTS": [2, 3], "OPTIONS": DIGITS},
    "own_images": {"COUNT": 150, "EPOCHS": 1, "OPTIONS": [*SHAPES, "model.channels=[8,16]"]},
    "latent_space": {"EPOCHS": 1, "LATENTS": 3, "SAMPLES": [1, 2], "OPTIONS": DIGITS},
}
SLOW = ("own_images", "latent_space")
LARGEST = 700_000  # bytes of a notebook with its outputs
PRIVATE = re.compile(r"Traceback|Warning|WARNING|/home/|/root|/tmp|/var/|/usr/|/mnt/|site-packages|[A-Z]:\\\\")


def outputs(notebook: Any, kind: str) -> list[Any]:
    """The outputs of a kind of all cells, such as `image/png` or `stderr`."""
    every = [output for cell in notebooks.code_cells(notebook) for output in cell.outputs]
    return [output for output in every if kind in (output.get("name"), *output.get("data", ()))]


def assert_complete(notebook: Any) -> None:
    """Assert that every cell has run once, in order and without a message of an error, and has the output it is for."""
    cells = notebooks.code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not outputs(notebook, "stderr")
    for cell in cells:
        last = cell.source.splitlines()[-1]
        kinds = {kind for output in cell.outputs for kind in output.get("data", ())}
        if re.match(r"\w+\.show_|plt\.show", last):
            assert "image/png" in kinds, last
    bars = [output.data["text/html"] for output in outputs(notebook, "text/html") if "<progress" in str(output.data)]
    assert bars and all('value="1.0000"' in bar for bar in bars)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SMALL]
)
def test_a_notebook_runs_from_its_first_cell_to_its_last(name: str, tmp_path: Path) -> None:
    notebook = notebooks.with_settings(notebooks.read(name), SMALL[name])
    for cell in notebooks.code_cells(notebook):
        cell.outputs = []
    assert_complete(notebooks.run(notebook, tmp_path, 120))


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_has_the_outputs_of_a_whole_run_and_nothing_of_the_machine(name: str) -> None:
    notebook = notebooks.read(name)
    assert_complete(notebook)
    path = notebooks.FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < LARGEST
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, "a tool has written into the cell"
        without_pictures = [
            {key: value for key, value in output.items() if key != "data"}
            | {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
            for output in cell.get("outputs", ())
        ]
        assert not PRIVATE.search(cell.source + json.dumps(without_pictures)), cell.source
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_every_notebook_is_run_and_every_link_leads_somewhere() -> None:
    assert sorted(SMALL) == notebooks.NAMES
    for name in notebooks.NAMES:
        for cell in notebooks.read(name).cells:
            for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", cell.source if cell.cell_type == "markdown" else ""):
                assert (notebooks.FOLDER / link).exists(), link
            for path in re.findall(r"configs/\w+\.yaml", cell.source):
                assert (REPOSITORY / path).exists(), path


@pytest.mark.slow
def test_interrupting_a_kernel_saves_the_run_and_the_same_cell_resumes_it(
    smoke_arguments: list[str], tmp_path: Path
) -> None:
    arguments = [
        *smoke_arguments,
        "name=a",
        "train.log_every=1",
        "train.validate_every=1000000",
        "checkpoint.every=1000000",
    ]
    stopped = new_code_cell(f"run = vae_dist.fit(*{[*arguments, 'train.steps=1000000']})")
    stopped.metadata["tags"] = ["raises-exception"]
    cells = [
        new_code_cell("import os\nfrom pathlib import Path\nimport vae_dist\nPath('pid').write_text(str(os.getpid()))"),
        stopped,
        new_code_cell("print(vae_dist.load('runs/a').step)"),
        new_code_cell(f"run = vae_dist.fit(*{arguments}, f\"train.steps={{vae_dist.load('runs/a').step + 1}}\")"),
        new_code_cell("print(run.step)"),
    ]
    interrupting = threading.Thread(target=_interrupt_after_the_first_step, args=[tmp_path])
    interrupting.start()
    done = notebooks.run(new_notebook(cells=cells), tmp_path, 120)
    interrupting.join()
    (error,) = [output for output in done.cells[1].outputs if output.output_type == "error"]
    assert error.ename == "StoppedError" and "SIGINT" in error.evalue
    saved, resumed = (int(done.cells[at].outputs[0].text) for at in (2, 4))
    assert 0 < saved == resumed - 1
    assert "resuming after step" in "".join(output.get("text", "") for output in done.cells[3].outputs)


def _interrupt_after_the_first_step(folder: Path) -> None:
    """Send the signal that Jupyter's stop button sends."""
    log, deadline = folder / "runs/a/log.txt", time.monotonic() + 60
    while not (log.exists() and "the first step is done" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(int((folder / "pid").read_text()), signal.SIGINT)


class _Shell:
    """What `IPython` has in the process of a kernel, and the contents of one output of its cell."""

    kernel = None

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.contents: list[str] = []
        ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
        setattr(ipython, "get_ipython", lambda: self)  # noqa: B010
        setattr(display, "display", self.display)  # noqa: B010
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", display)
        monkeypatch.setattr(progress_module, "BAR_SECONDS", -1)

    def display(self, content: dict[str, str], raw: bool, display_id: bool) -> "_Shell":
        assert raw and display_id and not self.contents  # one output for each bar
        self.update(content, raw)
        return self

    def update(self, content: dict[str, str], raw: bool) -> None:
        self.contents.append(content["text/plain"])


def test_a_bar_ends_at_all_of_its_parts_even_if_fewer_were_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = _Shell(monkeypatch)
    with progress("fitting", 8, is_main=True) as advance:
        advance(2)
    assert [text.split("%")[0].strip() for text in shell.contents] == ["25", "100"]


def test_a_bar_of_a_failed_computation_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = _Shell(monkeypatch)
    with pytest.raises(ArithmeticError), progress("fitting", 8, is_main=True) as advance:
        advance(2)
        raise ArithmeticError
    assert [text.split("%")[0].strip() for text in shell.contents] == ["25"]


def test_a_computation_that_ends_at_once_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = _Shell(monkeypatch)
    monkeypatch.setattr(progress_module, "BAR_SECONDS", 60)
    with progress("fitting", 8, is_main=True) as advance:
        advance(8)
    assert not shell.contents
