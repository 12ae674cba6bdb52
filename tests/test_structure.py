"""The structure of the package: folders import one another in one direction, and libraries stay where they belong."""

import ast
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from vae_dist import cli

PACKAGE = REPOSITORY / "vae_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent.name for path in MODULES} - {PACKAGE.name})
COMMANDS = sorted(path.stem for path in PACKAGE.glob("*.py") if '__name__ == "__main__"' in path.read_text())
LIBRARIES = {
    "accelerate": ["distributed", "training/differentiate.py"],
    "wandb": ["runs"],
    "omegaconf": ["config"],
    "torchvision": ["data/mnist.py", "features/lpips.py", "features/inception.py"],
    "matplotlib": ["views/canvas.py", "views/plots.py"],
    "jinja2": ["reports/report.py"],
    "huggingface_hub": ["publishing/hub.py", "publishing/card.py"],
    "onnx": ["publishing/programs.py"],
    "onnxruntime": ["publishing/programs.py"],
    "onnxscript": ["publishing/programs.py"],
    "IPython": ["terminal/notebook.py"],
    "pandas": ["api/records.py"],
    "diffusers": ["models/autoencoder_kl.py"],
}


def name(path: Path) -> str:
    """The module's dotted name below the package; a folder's `__init__` has the folder's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere."""
    dotted_names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            dotted_names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            dotted_names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return dotted_names


def ours(path: Path) -> set[str]:
    """The modules of the package that a file imports, by their names below it."""
    known = {name(module) for module in MODULES}
    imported = {dotted.removeprefix("vae_dist.") for dotted in imports(path) if dotted.startswith("vae_dist.")}
    return (imported & known) - {name(path)}


def test_no_folder_imports_one_that_imports_it() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        unit = name(path).partition(".")[0]
        graph.setdefault(unit, set()).update({module.partition(".")[0] for module in ours(path)} - {unit})
    assert len(list(TopologicalSorter(graph).static_order())) > len(FOLDERS)  # a CycleError names the cycle


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_of_a_folder_imports_one_that_imports_it(folder: str) -> None:
    paths = list((PACKAGE / folder).glob("*.py"))
    inside = {name(path) for path in paths} - {folder}  # a module's import of its own folder is for other names
    graph = {name(path): ours(path) & inside for path in paths}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(paths)


def test_only_commands_import_the_reports_and_nothing_imports_a_command() -> None:
    assert len(COMMANDS) > 5
    for path in MODULES:
        for module in ours(path):
            assert module not in COMMANDS, path
            if module.partition(".")[0] == "reports":
                assert path.stem in COMMANDS or path.parent.name == "reports", path


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_in_one_place(library: str) -> None:
    users = [path for path in MODULES if library in {dotted.split(".")[0] for dotted in imports(path)}]
    assert users
    for path in users:
        assert str(path.relative_to(PACKAGE)).startswith(tuple(LIBRARIES[library]))


def test_no_module_is_long() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
    assert not {name: length for name, length in lengths.items() if length > 250}


def test_every_folder_has_a_docstring() -> None:
    for folder in FOLDERS:
        assert ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())), folder


def test_no_module_is_named_like_a_standard_or_installed_one() -> None:
    # `accelerate launch vae_dist/train.py` puts vae_dist/ first on sys.path.
    top = {path.stem for path in PACKAGE.glob("*.py")} | set(FOLDERS)
    assert not top & sys.stdlib_module_names
    assert not top & packages_distributions().keys()


def test_commands_hold_no_logic() -> None:
    for command in COMMANDS:
        tree = ast.parse((PACKAGE / f"{command}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_every_command_has_a_name_and_its_help_one_form() -> None:
    assert sorted(cli.COMMANDS.values()) == [command for command in COMMANDS if command != "__main__"]
    for name, module_name in cli.COMMANDS.items():
        module = import_module(f"vae_dist.{module_name}")
        assert callable(module.main) and isinstance(module.KEYS, tuple)
        title, usage, *rest = str(module.__doc__).split("\n\n")
        assert title.count("\n") == 0 and title.endswith("."), name
        first, *launched, last = usage.splitlines()
        arguments = first.removeprefix(f"vae-dist {name} ")
        assert arguments != first, name
        assert launched in ([], [f"accelerate launch -m vae_dist {name} {arguments}"])
        start = "accelerate launch" if launched else "python"
        assert last == f"{start} vae_dist/{module_name}.py {arguments}"
        assert "--help" in rest[0] and rest[0].rstrip().endswith("print this and exit")


def test_the_loop_is_short_and_knows_neither_rank_nor_device() -> None:
    path = PACKAGE / "training/loop.py"
    tree = ast.parse(path.read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno is not None and train.end_lineno - train.lineno + 1 <= 50
    loop = next(node for node in ast.walk(train) if isinstance(node, ast.For))
    source = ast.unparse(loop)
    for word in ("rank", "is_main", ".to(", "dtype", ".item()", "wandb"):
        assert word not in source


def test_nothing_is_unpickled() -> None:
    for path in MODULES:
        source = path.read_text()
        if path == PACKAGE / "features/published.py":  # files of known digests, by the reader of tensors alone
            assert source.count("torch.load(") == source.count("weights_only=True)") == 1
            source = source.replace("torch.load(", "")
        assert "torch.load" not in source and "pickle" not in imports(path), path
