"""The house: who may import whom, and what no module may be called."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "vae_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each floor imports from its own and from those below it.
FLOORS = [
    ["train", "evaluate", "sample", "compare", "study", "report", "browse"],
    [
        "trainer",
        "milestones",
        "update",
        "batches",
        "start",
        "meter",
        "evaluation",
        "sampling",
        "latents",
        "comparison",
        "page",
        "record",
        "plane",
    ],
    [
        "checkpoint",
        "tracking",
        "console",
        "images",
        "plots",
        "data",
        "mnist",
        "digits",
        "stopping",
        "runtime",
        "launcher",
        "caller",
    ],
    ["objective", "mixture", "model", "adam", "gradients", "cuda_graph"],
    ["plan", "philox", "compiled", "products", "config", "manifest", "markup", "files", "wandb_records"],
    ["launcher", "caller", "errors"],
]
ONLY_IN = {
    "accelerate": {"runtime", "launcher", "caller"},
    "wandb": {"tracking"},
    "omegaconf": {"config"},
    "torchvision": {"mnist"},
    "matplotlib": {"plots"},
}


def name(path: Path) -> str:
    """`model` for all of model/, otherwise the module's own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_its_floor() -> None:
    assert {name(path) for path in MODULES} - {"__init__"} == {module for floor in FLOORS for module in floor}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_never_go_upwards(path: Path) -> None:
    floor_of = {module: number for number, floor in enumerate(FLOORS) for module in floor}
    ours = {dotted.split(".")[1] for dotted in imports(path) if dotted.startswith("vae_dist.")}
    for imported in ours & floor_of.keys():
        assert floor_of[imported] >= floor_of.get(name(path), len(FLOORS)), f"{path.name} imports {imported}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_rooms(library: str) -> None:
    users = {name(path) for path in MODULES if library in {dotted.split(".")[0] for dotted in imports(path)}}
    assert users <= ONLY_IN[library]


def test_no_module_is_named_like_another_ones() -> None:
    ours = {path.stem for path in PACKAGE.glob("*.py")} | {"model"}
    assert not ours & sys.stdlib_module_names
    assert not ours & packages_distributions().keys()


def test_no_door_holds_a_class_or_a_rank() -> None:
    for door in FLOORS[0]:
        tree = ast.parse((PACKAGE / f"{door}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_the_loop_is_short_and_knows_neither_rank_nor_device() -> None:
    path = PACKAGE / "trainer.py"
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
        assert "torch.load" not in source and "pickle" not in imports(path), path
