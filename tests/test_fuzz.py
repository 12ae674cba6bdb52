"""Hostile and broken configs: each is either accepted or refused in one line, and has no other effect."""

import dataclasses
import json
import math
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from vae_dist import config
from vae_dist.config import Config
from vae_dist.errors import UserError

pytestmark = pytest.mark.timeout(900)  # the deep ones take minutes

KEYS = [option.key for option in config.options()]
GROUPS = sorted({key.rpartition(".")[0] for key in KEYS} - {""})
SECRET = "hunter2-which-only-the-environment-knows"


@pytest.fixture(params=[1, pytest.param(20, marks=pytest.mark.slow)], ids=["quick", "deep"])
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Factor on the number of examples."""
    monkeypatch.setenv("SECRET", SECRET)
    torch.set_flush_denormal(False)  # hypothesis draws denormals, and a training in this process flushes them
    Path("first.yaml").write_text("seed: 1")
    config.load(["first.yaml"])  # Python's imports on first use are no effect of the input
    return int(request.param)


# Effects in addition to the result.

_done: list[str] | None = None
_doer = threading.get_ident()
_AUDITED = ("open", "import", "exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _done is None or not event.startswith(_AUDITED) or threading.get_ident() != _doer:
        return
    first = arguments[0] if arguments else ""
    if not (event == "open" and (isinstance(first, int) or first == "/proc/meminfo")):  # a descriptor; psutil's
        _done.append(f"{event} {first}")


sys.addaudithook(_audit)


@contextmanager
def touching_only(path: Path | None) -> Iterator[None]:
    """Assert that the block opens `path` and raises no other audit event of Python's."""
    global _done
    _done = []
    try:
        yield
    finally:
        done, _done = _done, None
        assert not [what for what in done if path is None or what != f"open {path}"]


def accepted(load: Callable[[], Config], path: Path | None = None) -> Config | None:
    """The loaded config, or None if it is refused in one printable line."""
    try:
        with touching_only(path):
            loaded = load()
    except UserError as error:
        assert_short_line(str(error))
        assert SECRET not in str(error)
        return None
    assert_sound(loaded)
    return loaded


def assert_short_line(message: str) -> None:
    """Assert that a terminal shows the whole message and obeys nothing in it."""
    assert 10 < len(message) < 3000
    assert not {unicodedata.category(letter) for letter in message} & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(letter) for letter in message} & {"LRE", "RLE", "LRO", "RLO", "LRI", "RLI"}


def assert_sound(loaded: Config) -> None:
    """Assert that every value has its type and is within bounds, and that the config survives a save."""
    assert_typed(loaded)
    for value in leaves(dataclasses.asdict(loaded)):
        if isinstance(value, str):
            assert "${" not in value and value != "???" and SECRET not in value
            assert len(os.fsencode(value)) < 4096 and "\0" not in value and len(value.splitlines()) < 2
        if isinstance(value, float):
            assert math.isfinite(value)
        if isinstance(value, int):
            assert torch.tensor(value).item() == value
    saved = Path("saved.yaml")
    config.save(loaded, saved)
    assert config.read(saved) == loaded


def assert_typed(section: Any) -> None:
    hints = get_type_hints(type(section))
    for item in dataclasses.fields(section):
        value, hint = getattr(section, item.name), hints[item.name]
        if dataclasses.is_dataclass(hint):
            assert_typed(value)
        elif str(hint).startswith("typing.Literal"):
            assert value in hint.__args__
        else:
            assert has_type(value, str(hint).removeprefix("<class '").removesuffix("'>")), (item.name, value)


def has_type(value: Any, hint: str) -> bool:
    if hint.endswith(" | None"):
        return value is None or has_type(value, hint.removesuffix(" | None"))
    if hint.startswith("list["):
        return type(value) is list and all(has_type(item, hint[5:-1]) for item in value)
    return type(value).__name__ == hint


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


# Texts of attacks and of typing errors.

SNIPPETS = [
    "", " ", "null", "~", "???", "nan", "-inf", "1e999", "1e5", "-0", "0x10", "007", "no", "true", "1_000", "٣",
    "1" * 400, "1" * 5000, str(2**63), str(-(2**63)), str(2**64), str(10**18), "3", "[]", "{}", "[[]]", "[1,2]",
    "[[0,1],[2,3]]", "[a", "{a: b}", "'", '"', '"\\x00"', '"\\ud800"', '"\\UFFFFFFFF"', '"\\e[2J"', "\x00", "\x1b[2J",
    "\ud800", "\u2028", "\u202e", "\ufeff", "é", "😀", "a: b", "a #b", "a\nb", "\t", "---", "...", "%YAML 9.9",
    "%TAG ! x", "!", "!!", "!x", "!!python/object/apply:os.system [id]", "!!binary aGk=", "!!float 1", "&a", "*a",
    "&a [*a]", "<<", "<<: *a", "? ", ": ", "- ", "|", ">", "@", "`", "$", "${", "${}", "${name}",
    "${model.latent_dim}", "${datasets.root}", "${model}", "${nothing}", "${oc.env:SECRET}", "${oc.env:HOME,x}",
    "${oc.coerce:this.x,1}", "${oc.create:{a: 1}}", "${oc.decode:1}", "${oc.select:name}", "${oc.dict.keys:model}",
    "${oc.dict.values:model}", "\\${name}", "$${name}", "${${name}}", "${.name}", "${..name}", "${name",
    "${model[latent_dim]}", "../..", "/etc/passwd", "~root", "~nobody-there", "a" * 300, "https://user:token@host/",
    "https://host/data", "file:///etc", "http://[", "http://host:99999", "{time}", "mnist", "[" * 2000, "{a: " * 2000,
    "x" * 5000, "conv",
]  # fmt: skip
snippets = st.sampled_from(SNIPPETS)
scalars = st.one_of(
    snippets, st.text(max_size=20), st.integers().map(str), st.floats().map(str), st.sampled_from(KEYS),
    st.lists(snippets, max_size=4).map("".join),
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=8,
)
known = st.sampled_from(KEYS)
keys = known | st.sampled_from(GROUPS) | scalars


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, last = key.split(".")
        inside = nested
        for group in groups:
            inside = inside.setdefault(group, {})
            if not isinstance(inside, dict):
                break
        else:
            inside[last] = value
    return nested


documents = st.dictionaries(known, values, max_size=4).map(nest) | st.dictionaries(keys, values, max_size=4) | values
files = documents.map(lambda document: json.dumps(document).encode("utf-8", "surrogatepass")) | documents.map(
    lambda document: yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")
)


@st.composite
def mutated(draw: st.DrawFn, contents: st.SearchStrategy[bytes], pieces: st.SearchStrategy[bytes]) -> bytes:
    """Content with a few places overwritten, cut out or inserted."""
    content = draw(contents)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(start + draw(st.integers(0, 20)), len(content))
        content = content[:start] + draw(pieces) + content[stop:]
    return content


own = [path.read_bytes() for path in sorted((REPOSITORY / "configs").glob("*.yaml"))]
own += [config.to_yaml(config.load([])).encode()]
own += [config.to_yaml(config.load(["tracking.tags=[a,b]", "sample.codes=[[0,1]]", "name=a"])).encode()]
changed = mutated(st.sampled_from(own), (snippets | st.text(max_size=3)).map(lambda s: s.encode("utf-8", "replace")))


@pytest.mark.parametrize("kind", ["bytes", "structured", "changed"])
def test_any_config_file_is_accepted_or_refused(kind: str, depth: int, tmp_path: Path) -> None:
    contents = {"bytes": st.binary(max_size=100), "structured": files, "changed": changed}[kind]
    path = tmp_path / "any.yaml"

    @settings(max_examples=60 * depth)
    @given(contents)
    def claim(content: bytes) -> None:
        path.write_bytes(content)
        accepted(lambda: config.load([str(path)]), path)
        accepted(lambda: config.read(path), path)

    claim()


def test_any_arguments_are_accepted_or_refused(depth: int) -> None:
    arguments = st.tuples(keys, scalars).map("=".join) | scalars.filter(lambda text: "/" not in text)

    @settings(max_examples=60 * depth)
    @given(st.lists(arguments, min_size=1, max_size=4))
    def claim(given: list[str]) -> None:
        if all("=" in argument for argument in given):
            accepted(lambda: config.load(given))
        stored = config.load(["name=stored"])
        accepted(lambda: config.load_reader(stored, given))
        accepted(lambda: dataclasses.replace(stored, runs_dir=config.take(given, "runs_dir")[0]))
        accepted(lambda: (config.split_run(given), stored)[1])

    claim()


def test_text_that_is_accepted_is_what_was_typed(depth: int) -> None:
    plain = scalars.filter(lambda text: "${" not in text and text[:1] not in ("[", "{", '"', "'", "~"))

    @settings(max_examples=40 * depth)
    @given(plain)
    def claim(text: str) -> None:
        loaded = accepted(lambda: config.load([f"tracking.project={text}"]))
        assert loaded is None or loaded.tracking.project == text

    claim()
