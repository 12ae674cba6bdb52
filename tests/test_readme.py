"""What the README promises is there: its tests, files, commands and keys."""

import re

import pytest

from tests.conftest import REPOSITORY
from vae_dist import config

README = (REPOSITORY / "README.md").read_text()
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md"))
}


@pytest.mark.parametrize("page", ["README.md", "docs/promises.md"])
def test_every_test_that_backs_a_promise_exists(page: str) -> None:
    sources = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGES[page]))
    assert len(named) > 5
    assert not {name for name in named if f"def {name}(" not in sources}


def test_the_map_names_every_folder_and_module_of_the_package_and_no_other() -> None:
    listed = README.partition("## The code")[2].partition("| to change")[0].partition("vae_dist/\n")[2]
    package = REPOSITORY / "vae_dist"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"\b(\w+\.py)\b", listed)) == {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"^  (\w+)/", listed, re.MULTILINE)) == folders


def test_every_make_command_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_key_and_every_link_leads_somewhere(page: str) -> None:
    keys = {option.key for option in config.options()}
    for key in re.findall(
        r"\b((?:data|model|objective|optim|train|checkpoint|tracking|runtime|evaluate|sample)\.\w+)=", PAGES[page]
    ):
        assert key in keys
    for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        if not link.startswith("https://"):
            assert (REPOSITORY / page).parent.joinpath(link).exists(), link
    for path in re.findall(r"\b((?:configs|launch|docs)/[\w/]+\.(?:yaml|sh|md|png))", PAGES[page]):
        assert (REPOSITORY / path).exists(), path
