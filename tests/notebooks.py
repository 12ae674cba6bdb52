"""Run the notebooks of docs/notebooks in a kernel: for the tests, and to make the outputs that they are committed with.

    python tests/notebooks.py DATA [NAME ...]    run them as they are, and write their outputs into them

It takes some minutes. DATA has the data sets in torchvision's layout; MNIST is downloaded if it's missing there.
"""

import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SETTINGS = "parameters"  # the tag of the cell that holds a notebook's settings, as papermill has it


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_settings(notebook: Any, settings: Mapping[str, object]) -> Any:
    """Give other values to names that the notebook's settings assign. Raises ValueError for others."""
    (cell,) = [cell for cell in code_cells(notebook) if SETTINGS in cell.metadata.get("tags", ())]
    for name, value in settings.items():
        cell.source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"the settings have {count} lines {name} = ...")
    return notebook


def run(notebook: Any, folder: Path, seconds: int) -> Any:
    """Execute a notebook in a folder, in a kernel that sees no settings of the user's, and return it with its outputs.

    Raises nbclient's CellExecutionError if a cell fails, and CellTimeoutError if one takes longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as own:
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR", "HOME")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
        environment = inherited | dict.fromkeys(names, own) | {"PYTHONPATH": str(REPOSITORY)}
        client = NotebookClient(
            notebook,
            timeout=seconds,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        manager = client.create_kernel_manager()
        manager.transport = "ipc"  # sockets in a folder: no ports
        manager.connection_file = f"{own}/kernel.json"
        return client.execute(env=environment)


def _tidied(notebook: Any) -> Any:
    """Keep one small PNG of each picture, as a PIL image comes as a PNG and as a JPEG, and nothing of this machine."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in (data := output.get("data", {})):
                data.pop("image/jpeg", None)
                data["image/png"] = min(_pngs(base64.b64decode(data["image/png"])), key=len)
        cell.metadata.pop("execution", None)
    return notebook


def _pngs(content: bytes) -> Iterator[str]:
    """Encode a picture again: as it is, and with at most 256 colours."""
    read = Image.open(io.BytesIO(content))
    image = read.convert("RGB" if read.mode == "RGBA" else read.mode)
    for version in (image, image.quantize(256, dither=Image.Dither.NONE)):
        file = io.BytesIO()
        version.save(file, "PNG", optimize=True)
        yield base64.b64encode(file.getvalue()).decode()


def main(data: Path, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "data"  # what the runs put there isn't kept
        own.mkdir()
        for path in data.glob("*"):
            (own / path.name).symlink_to(path.resolve())
        for name in names or NAMES:
            done = _tidied(run(read(name), Path(folder), 3600))
            nbformat.write(done, FOLDER / f"{name}.ipynb")
            print(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
