"""README.md and docs/ name only what exists: tests, files, commands, options, links."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from vae_dist import cli, config

README = (REPOSITORY / "README.md").read_text()
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md"))
}
MOST_WORDS = 1400
SECTIONS = "data|model|objective|first_stage|optim|ema|train|checkpoint|tracking|runtime|evaluate|sample|encode|export"
SUFFIXES = {"json", "md", "npy", "py", "safetensors"}  # train.npy, train.py and model.safetensors are no options


def code(page: str) -> str:
    """The document's code blocks and code spans, one per line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`]+)`", prose)])


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def python_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def test_the_readme_stays_short() -> None:
    assert len(README.split()) <= MOST_WORDS


def test_the_readme_links_to_every_document() -> None:
    assert {page for page in PAGES if f"]({page})" in README} == PAGES.keys() - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_every_named_test_exists(page: str) -> None:
    sources = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGES[page]))
    assert not {name for name in named if f"def {name}(" not in sources}


def test_every_promise_and_every_fault_has_a_test() -> None:
    for title in "## Exactness", "## Every fault and its test":
        section = re.split(r"\n##+ (?:Where|Ends)", PAGES["docs/promises.md"].partition(f"\n{title}\n")[2])[0]
        rows = [line for line in section.splitlines() if line.startswith("|")]
        claims = [row for row in rows if not re.match(r"\| (?:---|promise|fault) \|", row)]
        assert len(claims) > 20
        assert not [row for row in claims if not re.search(r"`(?:tests/)?test_\w+", row)]


def test_the_map_names_exactly_the_folders_and_modules() -> None:
    listed = README.partition("## The code")[2].partition("## Develop")[0].partition("vae_dist/\n")[2]
    package = REPOSITORY / "vae_dist"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"\b(\w+\.py)\b", listed)) == {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"^  (\w+)/", listed, re.MULTILINE)) == folders


def test_names_to_add_to_are_in_the_files_of_their_rows() -> None:
    table = PAGES["docs/extending.md"].partition("| to add | write | in |\n")[2].partition("\n\n")[0]
    rows = [row for row in table.splitlines() if re.search(r"`[A-Z_]+`", row)]
    assert len(rows) > 5
    for row in rows:
        files = [file for path in re.findall(r"`(vae_dist/[^`]*)`", row) for file in python_files(REPOSITORY / path)]
        source = "".join(file.read_text() for file in files)
        for name in re.findall(r"`([A-Z_]+)`", row):
            assert re.search(rf"^{name}\b.* = ", source, re.MULTILINE), row


@pytest.mark.parametrize("page", PAGES)
def test_every_make_command_is_a_target(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", code(page))) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_console_command_exists(page: str) -> None:
    named = re.findall(r"(?:\bvae-dist|-m vae_dist) ([a-z][a-z-]+)", code(page))
    assert set(named) <= cli.COMMANDS.keys()


@pytest.mark.parametrize("page", PAGES)
def test_every_option_exists(page: str) -> None:
    keys = {option.key for option in config.options()}
    named = re.findall(rf"(?<![\w/.])((?:{SECTIONS})\.(\w+))", code(page))
    assert not {key for key, name in named if name not in SUFFIXES and key not in keys}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_path_leads_somewhere(page: str) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        target = (REPOSITORY / page).parent.joinpath(link) if link else REPOSITORY / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), (link, anchor)
    folders = "configs|docs|launch|tests|vae_dist"
    for path in re.findall(rf"(?<![\w/])(?:{folders})/[\w/.]*\w(?:\.\w+)?", PAGES[page]):
        assert (REPOSITORY / path).exists(), path
