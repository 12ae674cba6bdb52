"""Packs: every image decoded once, the same to the byte however the packing went, and safe to open if a stranger's."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from tests.forked import ForkServer
from tests.image_folders import image_bytes, numbered, packing, write_images
from tests.test_mnist import without_privileges
from vae_dist import locks
from vae_dist.data import decoding, pack_file, pack_journal
from vae_dist.data import packing as packings
from vae_dist.data.folder_index import listed
from vae_dist.data.image_set import packed_set
from vae_dist.data.pack_file import BadPackError, Pack, is_pack, open_pack, sampled
from vae_dist.data.packing import packed
from vae_dist.data.pixels import Rule, decode
from vae_dist.data.source import read
from vae_dist.errors import RunError, UserError

LABELLED = [
    *numbered(9, "train/cat/"),
    *numbered(7, "train/äpfel/"),
    *numbered(3, "Val/cat/"),
    *numbered(4, "test/cow/"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip(path: Path, place: int) -> None:
    """Change a bit of a byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def pack(folder: Path, place: Path, size: int = 8, workers: int | None = 0, *, skip_damaged: bool = False) -> Pack:
    return packed(listed(folder), packing(place, size, workers, skip_damaged=skip_damaged))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded."""
    names: list[str] = []

    def spy(path: Path, rule: Rule) -> Any:
        names.append(path.name)
        return decode(path, rule)

    monkeypatch.setattr(decoding, "decode", spy)
    return names


def test_a_pack_holds_each_decoded_image_under_its_name(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", LABELLED)
    made = pack(folder, tmp_path / "packed")
    names = sorted(LABELLED, key=str.encode)
    assert list(made.names) == names and made.names[3:5] == names[3:5] and made.names[-1] == names[-1]
    for name, pixels, size in zip(names, np.load(made.folder / "pixels.npy"), made.sizes, strict=True):
        assert np.array_equal(pixels, decode(folder / name, Rule(8)))
        assert size == (folder / name).stat().st_size
    parts, classes, labels = made.arrangement
    assert classes == ("cat", "cow", "äpfel") and labels is not None
    for part, beginning in ("train", "train/"), ("validation", "Val/"), ("test", "test/"):
        assert [names[index] for index in parts[part]] == [name for name in names if name.startswith(beginning)]
        assert all(classes[labels[index]] == names[index].split("/")[1] for index in parts[part])
    about = json.loads((made.folder / "index.json").read_text())
    assert about["versions"]["pillow"] and about["count"] == len(names)
    assert made.is_intact() and is_pack(made.folder) and not is_pack(folder)


@pytest.mark.parametrize("workers", [1, 7, None])
def test_threads_change_no_byte(workers: int | None, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", numbered(70))
    (folder / "041.jpg").write_bytes(image_bytes(41, "JPEG")[:-60])
    alone = pack(folder, tmp_path / "alone", skip_damaged=True)
    together = pack(folder, tmp_path / "together", workers=workers, skip_damaged=True)
    assert len(alone.names) == 69 and contents(alone.folder) == contents(together.folder)


def test_a_second_start_decodes_nothing(tmp_path: Path, decoded: list[str]) -> None:
    folder = write_images(tmp_path / "pictures", numbered(5))
    pack(folder, tmp_path / "packed")
    assert len(decoded) == 5
    pack(folder, tmp_path / "packed")
    assert len(decoded) == 5
    pack(folder, tmp_path / "packed", size=9)  # another rule, another pack
    assert len(decoded) == 10 and len([path for path in (tmp_path / "packed").iterdir() if path.is_dir()]) == 2


KILLED = """
import os, sys
from pathlib import Path
from tests.image_folders import packing
from vae_dist.data import decoding, pack_journal
from vae_dist.data.folder_index import listed
from vae_dist.data.packing import packed

pack_journal.COMMIT_SECONDS = 0.0
decoding.IMAGES_PER_TASK = 4
decode = decoding.decode
calls = 0
def counted(path, rule):
    global calls
    calls += 1
    if calls > int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    return decode(path, rule)
decoding.decode = counted
packed(listed(Path(sys.argv[1])), packing(Path(sys.argv[2]), workers=int(sys.argv[4]), skip_damaged=True))
print("decoded", calls)
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_packing_continues_to_the_same_bytes(
    workers: str, fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    folder = write_images(tmp_path / "pictures", numbered(60))
    (folder / "013.jpg").write_bytes(image_bytes(13, "JPEG")[:-60])
    whole = pack(folder, tmp_path / "whole", skip_damaged=True)
    calls: list[int] = []
    for limit in "30", "17", "1000":
        ended = fork_server.run("-c", KILLED, str(folder), str(tmp_path / "killed"), limit, workers)
        killed = limit != "1000"
        assert ended.returncode == (-signal.SIGKILL if killed else 0), ended.stderr
        assert [path.name for path in (tmp_path / "killed").glob("[!.]*")] == ([] if killed else [whole.folder.name])
        calls += [int(limit)] if killed else map(int, re.findall(r"decoded (\d+)", ended.stdout))
    assert sum(calls) < 60 + 2 * 30  # what was done was not done again, but for what was under way
    assert contents(tmp_path / "killed" / whole.folder.name) == contents(whole.folder)
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.parametrize(
    "fault",
    [
        "pixels cut", "a pixel", "half a line", "a number", "damaged files without reasons", "damaged files of others",
        "another version", "nothing",
    ],
)  # fmt: skip
def test_what_a_killed_packing_left_is_used_as_far_as_it_is_right(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    """The oracle: a packing that was not killed."""
    monkeypatch.setattr(pack_journal, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(decoding, "IMAGES_PER_TASK", 3)
    folder = write_images(tmp_path / "pictures", numbered(20))
    whole = pack(folder, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(packings, "_finish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(folder, tmp_path / "killed")
    part = next((tmp_path / "killed").glob(".*.part"))
    pixels, journal = part / "pixels.npy", part / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    if fault == "pixels cut":
        os.truncate(pixels, 128 + 7 * 192)
    elif fault == "a pixel":
        flip(pixels, 128 + 7 * 192)
    elif fault == "half a line":
        journal.write_text("".join(lines[:4]) + lines[4][:7])
    elif fault == "a number":
        journal.write_text("".join([*lines[:3], "7\n", *lines[4:]]))
    elif fault.startswith("damaged files"):
        entries = [8] if fault == "damaged files without reasons" else [[6, "cut off"], [99, "cut off"]]
        journal.write_text("".join([*lines[:3], json.dumps([6 + len(entries), 0, 0, entries]) + "\n"]))
    elif fault == "another version":
        journal.write_text("".join([lines[0].replace("pillow", "other"), *lines[1:]]))
    decoded.clear()
    again = pack(folder, tmp_path / "killed")
    assert contents(again.folder) == contents(whole.folder)
    expected = {"half a line": 11, "another version": 20, "nothing": 0}
    assert len(decoded) == expected.get(fault, 14)


def test_a_link_in_the_place_of_a_pack_is_removed_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", numbered(6))
    made, shared = pack(folder, tmp_path / "packed").folder, tmp_path / "shared"
    before = contents(made)
    made.rename(shared)
    made.symlink_to(shared)
    assert pack(folder, tmp_path / "packed").folder.is_symlink()
    (folder / "new.png").write_bytes(image_bytes(7))
    assert len(pack(folder, tmp_path / "packed").names) == 7
    assert contents(shared) == before and not [path for path in (tmp_path / "packed").iterdir() if path.is_symlink()]


def test_a_link_in_the_place_of_a_half_written_pack_is_refused(tmp_path: Path) -> None:
    folder, theirs = write_images(tmp_path / "pictures", numbered(6)), tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "pixels.npy").write_bytes(b"precious")
    target = packing(tmp_path / "packed", 8).target(folder)
    target.parent.mkdir()
    target.with_name(f".{target.name}.part").symlink_to(theirs)
    with pytest.raises(UserError, match=r"\.part is a symbolic link, .*; remove it"):
        pack(folder, tmp_path / "packed")
    assert contents(theirs) == {"pixels.npy": b"precious"} and not target.exists()


def test_of_several_processes_one_packs(
    fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    folder = write_images(tmp_path / "pictures", numbered(300))
    command = ["-c", KILLED, str(folder), str(tmp_path / "packed"), "1000", "1"]
    ended = fork_server.run_group([dict(os.environ)] * 3, *command)
    assert not any(result.returncode for result in ended), ended
    assert sorted(re.findall(r"decoded (\d+)", "".join(result.stdout for result in ended))) == ["0", "0", "300"]


def test_without_locks_each_packs_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks, "_try_lock", unsupported)
    folder = write_images(tmp_path / "pictures", numbered(6))
    publish = packings._publish

    def second(part: Path, target: Path) -> None:
        monkeypatch.setattr(packings, "_publish", publish)
        pack(folder, tmp_path / "packed")  # another process is faster
        publish(part, target)

    monkeypatch.setattr(packings, "_publish", second)
    assert len(pack(folder, tmp_path / "packed").names) == 6
    assert [path.name for path in (tmp_path / "packed").iterdir() if path.is_dir()] == [
        packing(tmp_path / "packed").target(folder).name
    ]


@pytest.mark.parametrize("change", ["content", "time", "new", "removed", "renamed"])
def test_a_changed_folder_is_packed_again(change: str, tmp_path: Path, decoded: list[str]) -> None:
    folder = write_images(tmp_path / "pictures", numbered(6))
    before = pack(folder, tmp_path / "packed")
    pixels = before.pixels.copy()
    if change == "content":
        (folder / "003.png").write_bytes(image_bytes(99))
    elif change == "time":
        os.utime(folder / "003.png", ns=(1, 1))
    elif change == "new":
        write_images(folder, ["x.png"], first=50)
    elif change == "removed":
        (folder / "003.png").unlink()
    else:
        (folder / "003.png").rename(folder / "x.png")
    after = pack(folder, tmp_path / "packed")
    assert len(decoded) == 6 + len(after.names)
    assert sorted(after.names) == sorted(path.name for path in folder.iterdir())
    kept = read(packed_set(before).source, range(6)).numpy()
    assert np.array_equal(kept, pixels)  # a training that has mapped it keeps what it had
    assert len([path for path in (tmp_path / "packed").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("skip_damaged", [True, False])
def test_a_file_that_was_made_readable_is_packed(skip_damaged: bool) -> None:
    with TemporaryDirectory() as temporary:  # pytest's is its user's alone
        Path(temporary).chmod(0o777)
        with without_privileges():
            folder, place = write_images(Path(temporary) / "pictures", numbered(6)), Path(temporary) / "packed"
            (folder / "003.png").chmod(0o200)
            if skip_damaged:
                assert len(pack(folder, place, skip_damaged=True).names) == 5
            else:
                with pytest.raises(UserError, match=r"1 of 6 images .* 003\.png \(this user may not read it\)"):
                    pack(folder, place)
            (folder / "003.png").chmod(0o400)
            after = pack(folder, place, skip_damaged=skip_damaged)
    assert len(after.names) == 6 and after.refused == ()


def test_a_pack_that_is_overwritten_is_not_read_on(tmp_path: Path) -> None:
    made = pack(write_images(tmp_path / "pictures", numbered(6)), tmp_path / "packed")
    path = made.folder / "pixels.npy"
    content, time = path.read_bytes(), (1, 1)
    os.utime(path, ns=time)
    source = packed_set(open_pack(made.folder)).source
    for change in content[:-1] + b"?", content[:-8], b"":
        path.write_bytes(change)
        with pytest.raises(RunError, match=r"pixels.npy has changed since the start; put it back"):
            read(source, range(6))
        path.write_bytes(content)
        os.utime(path, ns=time)
        assert np.array_equal(read(source, range(6)).numpy(), np.load(path))


@pytest.mark.parametrize("name", ["labels.npy", "names.npy", "offsets.npy", "sizes.npy"])
def test_labels_and_names_of_a_pack_that_are_overwritten_are_not_read_on(name: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", [f"{kind}/{number}.png" for kind in "ab" for number in range(3)])
    made = pack(folder, tmp_path / "packed")
    path, images = made.folder / name, torch.arange(6)
    content, time = path.read_bytes(), (1, 1)
    os.utime(path, ns=time)
    source = packed_set(open_pack(made.folder)).source
    for change in content[:-1] + b"\1", content[:-8], b"":
        path.write_bytes(change)
        for use in source.labels, source.names, lambda chosen: read(source, chosen):
            with pytest.raises(RunError, match=rf"{name} has changed since the start; put it back"):
                use(images)
        path.write_bytes(content)
        os.utime(path, ns=time)
    assert source.labels(images).tolist() == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]
    assert list(source.names(images) or ()) == list(made.names)


@pytest.mark.parametrize("change", ["content", "new", "removed"])
def test_a_folder_that_changes_meanwhile_is_noticed(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "pictures", numbered(6))

    def meanwhile(path: Path, rule: Rule) -> Any:
        pixels = decode(path, rule)
        if path.name == "003.png":
            if change == "content":
                path.write_bytes(image_bytes(99)[:40])
            elif change == "new":
                write_images(folder, ["x.png"], first=50)
            else:
                path.unlink()
        return pixels

    monkeypatch.setattr(decoding, "decode", meanwhile)
    with pytest.raises(UserError, match="changed while they were packed; run the same command again"):
        pack(folder, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("[!.]*"))


def test_damaged_files_are_collected_over_the_whole_folder(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "pictures", numbered(40))
    for name in "001.jpg", "038.jpg":
        (folder / name).write_bytes((folder / name).read_bytes()[:-60])
    with pytest.raises(UserError, match=r"2 of 40 images .* 001\.jpg \(cut off.*038\.jpg \(cut off.*skip_damaged=true"):
        pack(folder, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("[!.]*"))
    decoded.clear()
    made = pack(folder, tmp_path / "packed", skip_damaged=True)
    assert decoded == []  # what was decoded is kept
    assert len(made.names) == len(made.pixels) == 38 and "001.jpg" not in made.names
    assert [name for name, _ in json.loads((made.folder / "index.json").read_text())["refused"]] == [
        "001.jpg",
        "038.jpg",
    ]
    assert np.array_equal(made.pixels[-1], decode(folder / "039.png", Rule(8)))
    (folder / "empty.png").touch()
    with pytest.raises(UserError, match=r"empty\.png \(empty\)"):
        pack(folder, tmp_path / "packed")
    assert decoded == []  # the header has said it


@pytest.mark.parametrize(("least", "before"), [(0, 0), (2**40, 5)], ids=["large files", "small files"])
def test_what_a_header_shows_is_known_before_hours_of_decoding(
    least: int, before: int, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packings, "CHECKED_BYTES", least)
    folder = write_images(tmp_path / "pictures", numbered(4))
    (folder / "x.jpg").write_text("<html></html>")
    with pytest.raises(UserError, match=r"1 of 5 images .* x\.jpg \(not an image, but HTML or XML\)"):
        pack(folder, tmp_path / "packed")
    assert len(decoded) == before


@pytest.mark.parametrize("count", [0, 1])
def test_a_folder_without_usable_images_is_refused(count: int, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(count):
        (tmp_path / f"pictures/{number}.png").write_bytes(image_bytes(number)[:200])
    with pytest.raises(UserError, match="has no images that can be used"):
        pack(tmp_path / "pictures", tmp_path / "packed", skip_damaged=True)


def test_too_little_space_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / "pictures", numbered(6))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(UserError, match=r"packing 6 images takes .* GiB.* set data\.pack_dir .*data\.pack=never"):
            pack(folder, tmp_path / "packed")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't write to .*file/packed .*data\.pack_dir"):
        pack(folder, tmp_path / "file/packed")


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
"""


def test_a_disk_that_is_full_meanwhile_is_one_message_and_the_next_start_continues(
    fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    folder = write_images(tmp_path / "pictures", numbered(60))
    ended = fork_server.run("-c", FULL + KILLED, str(folder), str(tmp_path / "packed"), "1000", "1")
    assert ended.returncode == 1 and re.search(r"UserError: can't write .* \(File too large\); make room", ended.stderr)
    assert not list((tmp_path / "packed").glob("[!.]*"))
    assert contents(pack(folder, tmp_path / "packed").folder) == contents(pack(folder, tmp_path / "whole").folder)


# ---- A stranger's pack


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    return pack(write_images(root / "pictures", LABELLED), root / "packed").folder


def require_bounds(folder: Path) -> None:
    """Open a pack: it is refused, or everything in it can be read."""
    try:
        opened = open_pack(folder)
    except BadPackError:
        return
    count = len(opened.names)
    assert opened.pixels.shape == (count, opened.rule.channels, opened.rule.size, opened.rule.size)
    assert all(isinstance(name, str) and name for name in opened.names)
    parts, classes, labels = opened.arrangement
    assert all(0 <= images.start < images.stop <= count for images in parts.values())
    if classes is not None:
        assert labels is not None and all(classes[label] for label in labels)
    int(opened.pixels.sum()), int(opened.sizes.sum())


odd = st.one_of(
    st.integers(-3, 30), st.integers(), st.floats(), st.text(max_size=5), st.none(), st.booleans(),
    st.lists(st.integers(-1, 30), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=60)
@given(st.data())
def test_any_index_is_refused_or_right(original: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    about = json.loads((original / "index.json").read_text())
    key = data.draw(st.sampled_from([*about, *(f"rule.{name}" for name in about["rule"]), "parts.train", "parts.odd"]))
    section, _, inside = key.partition(".")
    if inside:
        about[section][inside] = data.draw(odd)
    elif data.draw(st.booleans()):
        about[section] = data.draw(odd)
    else:
        del about[section]
    with_index(original, tmp_path_factory, json.dumps(about).encode())


@given(st.binary(max_size=40) | st.integers(0, 700))
def test_any_bytes_as_an_index_are_refused(
    original: Path, tmp_path_factory: pytest.TempPathFactory, change: bytes | int
) -> None:
    content = (original / "index.json").read_bytes()
    with_index(original, tmp_path_factory, content[:change] if isinstance(change, int) else change)


def with_index(original: Path, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        shutil.copytree(original, folder)
    (folder / "index.json").write_bytes(content)
    require_bounds(folder)


@given(
    st.sampled_from(["pixels.npy", "names.npy", "offsets.npy", "sizes.npy", "labels.npy"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.integers(-200, 200),
)
def test_any_arrays_are_refused_or_right(
    original: Path, tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[int, int]], longer: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed_arrays"
    if not folder.exists():
        shutil.copytree(original, folder)
    content = bytearray((original / name).read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    (folder / name).write_bytes(bytes(content) + bytes(longer) if longer > 0 else bytes(content)[: longer or None])
    require_bounds(folder)
    (folder / name).write_bytes((original / name).read_bytes())


def link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("fault", [Path.unlink, link, pipe, lambda path: (path.unlink(), path.mkdir())])
@pytest.mark.parametrize("name", pack_file.FILES)
def test_what_is_no_regular_file_is_refused_at_once(
    name: str, fault: Callable[[Path], None], original: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(original, tmp_path / "pack")
    fault(folder / name)
    with pytest.raises(BadPackError):
        open_pack(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("parts", {"train": [0, 20], "test": [16, 23]}), ("classes", ["cat", "cow", "cat"]), ("rule.channels", 3.0)],
)
def test_an_index_that_contradicts_itself_is_refused(key: str, value: Any, original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "pack")
    about = json.loads((folder / "index.json").read_text())
    section, _, inside = key.partition(".")
    changed = {**about, section: {**about[section], inside: value} if inside else value}
    (folder / "index.json").write_text(json.dumps(changed))
    with pytest.raises(BadPackError, match=section):
        open_pack(folder)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("labels.npy", -1, 3), ("labels.npy", 0, -1), ("sizes.npy", 0, -1), ("offsets.npy", 0, 1),
        ("offsets.npy", 2, 0), ("offsets.npy", -1, 0), ("pixels.npy", 0, 255),
    ],
)  # fmt: skip
def test_an_array_that_contradicts_the_index_is_refused(
    name: str, place: int, value: int, original: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(original, tmp_path / "pack")
    array = np.load(folder / name, mmap_mode="r+")
    chosen = sampled(len(array))[0] if name == "pixels.npy" else place
    assert (array[chosen] != value).any()
    array[chosen] = value
    array.flush()
    with pytest.raises(BadPackError, match=name):
        open_pack(folder)


def test_a_count_beyond_the_memory_is_refused(original: Path, tmp_path: Path) -> None:
    """Sparse files, so that each has the size that the index claims."""
    folder = shutil.copytree(original, tmp_path / "pack")
    about = json.loads((folder / "index.json").read_text())
    about["count"] = 2**60
    (folder / "index.json").write_text(json.dumps(about))
    with pytest.raises(BadPackError, match="count"):
        open_pack(folder)


def test_a_damaged_pack_is_packed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, decoded: list[str]) -> None:
    folder = write_images(tmp_path / "pictures", numbered(6))
    made = pack(folder, tmp_path / "packed")
    expected = contents(made.folder)
    with open(made.folder / "names.npy", "ab") as file:
        file.write(b"more")
    with caplog.at_level("WARNING", "vae_dist"):
        assert contents(pack(folder, tmp_path / "packed").folder) == expected
    assert "names.npy" in caplog.text and len(decoded) == 12
    flip(made.folder / "pixels.npy", 128 + 3 * 192)
    assert not open_if_not_noticed(made.folder)


def open_if_not_noticed(folder: Path) -> bool:
    try:
        return open_pack(folder).is_intact()
    except BadPackError:  # the image is among those in the digest
        return False


MEASURED = """
import resource, sys
from pathlib import Path
from tests.image_folders import packing
from vae_dist.data.folder_index import listed
from vae_dist.data.packing import packed

packed(listed(Path(sys.argv[1])), packing(Path(sys.argv[2]), 64, workers=2))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_images(
    fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    used = []
    for count in 500, 8000:  # 6 and 94 MiB of pixels
        folder = write_images(tmp_path / f"{count}", ["0.png"])
        for number in range(1, count):
            os.link(folder / "0.png", folder / f"{number}.png")
        ended = fork_server.run("-c", MEASURED, str(folder), str(tmp_path / "packed"))
        assert ended.returncode == 0, ended.stderr
        used.append(int(ended.stdout) / 1024)
    assert used[1] - used[0] < 15, used
