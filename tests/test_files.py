import inspect
import os
import stat
import sys
from pathlib import Path

import pytest

from vae_dist import leftovers
from vae_dist.errors import UserError
from vae_dist.files import make_folder, open_regular, read_bounded, require_no_links, write_atomically


def test_a_write_replaces_the_whole_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    for content in (b"first", b"", b"a longer second"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["some.json"]


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_sets_the_permissions(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "some.json", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "some.json").stat().st_mode) == mode


def test_a_link_in_the_files_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "some.json").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "some.json", b"new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "some.json").is_symlink() and (tmp_path / "some.json").read_bytes() == b"new"


def test_a_link_planted_under_a_predictable_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".some.json.{os.getpid()}").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "some.json", b"new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "some.json").read_bytes() == b"new"


def test_a_temporary_file_s_name_is_unpredictable(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with pytest.raises(OSError) as failed:
            write_atomically(tmp_path / "nowhere" / "some.json", b"")
        names.add(failed.value.filename)
    assert len(names) == 3


def test_what_a_killed_process_has_left_goes_with_the_next_write(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # it dies between its two files
        leftovers.temporary(tmp_path / "some.json").write_bytes(b"half")
        leftovers.temporary(tmp_path / "probe").touch()
        os._exit(0)
    written = temporary_files(tmp_path)
    while len(written) < 2:
        written = temporary_files(tmp_path)
    write_atomically(tmp_path / "some.json", b"1")
    assert temporary_files(tmp_path) == written  # a process that is not yet reaped is there
    os.waitpid(child, 0)
    live, foreign = leftovers.temporary(tmp_path / "a"), tmp_path / (written[0][:-24] + 8 * "f" + written[0][-16:])
    for path in (live, foreign, tmp_path / ".other.0123456789abcdef"):
        path.touch()
    (tmp_path / "new").mkdir()
    write_atomically(tmp_path / "new/other.json", b"1")
    assert set(written) < set(temporary_files(tmp_path))  # of another folder
    make_folder(tmp_path, "")
    assert set(temporary_files(tmp_path)) == {live.name, foreign.name, ".other.0123456789abcdef"}


def temporary_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(OSError, match="Has more than 4 bytes"):
        read_bounded(path, 4)
    os.truncate(path, 2**36)  # of which the disk holds nothing
    with pytest.raises(OSError, match="Has more than"):
        read_bounded(path, 2**30)


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/tty")):
        with pytest.raises(OSError, match=r"not a regular file|No such device"):
            read_bounded(path, 10)
    with pytest.raises(OSError, match="Is a directory"):
        read_bounded(tmp_path, 10)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "nothing", 10)


def test_a_link_is_followed_unless_that_is_forbidden(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_bounded(tmp_path / "link", 5) == read_bounded(tmp_path / "file", 5, follow=False) == b"12345"
    for reading in (read_bounded, open_regular):
        with pytest.raises(OSError, match="symbolic links"):
            reading(tmp_path / "link", 5, follow=False)
    descriptors = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(50):
        with pytest.raises(OSError, match="Has more"):
            open_regular(tmp_path / "file", 4)
    assert not descriptors or len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's directory, with the links that W&B makes."""
    folder = tmp_path / "runs/a"
    for inside in ("checkpoints/step_00000001", "images", "wandb/offline-run-1/logs"):
        (folder / inside).mkdir(parents=True)
    (folder / "config.yaml").write_text("name: a")
    (folder / "checkpoints/step_00000001/state.json").write_text("{}")
    (folder / "wandb/latest-run").symlink_to("offline-run-1")
    (folder / "wandb/offline-run-1/logs/debug-core.log").symlink_to("/somewhere/else")
    return folder


def test_a_run_directory_without_links_is_accepted(run_dir: Path, tmp_path: Path) -> None:
    require_no_links(run_dir)
    (tmp_path / "alias").symlink_to(run_dir)  # a link to the directory itself is allowed
    require_no_links(tmp_path / "alias")
    require_no_links(tmp_path / "not-made-yet")


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("metrics.jsonl", "/etc/passwd"),
        ("evaluations", "/tmp"),
        ("checkpoints/step_00000001/model.safetensors", "../../config.yaml"),
        ("images/wandb", "nowhere"),
        (".hidden", "."),
    ],
)
def test_a_link_in_a_run_directory_is_named(place: str, target: str, run_dir: Path) -> None:
    (run_dir / place).symlink_to(target)
    with pytest.raises(UserError, match="is a symbolic link") as refused:
        require_no_links(run_dir)
    assert str(run_dir / place) in str(refused.value)


def test_the_first_of_several_links_is_named(run_dir: Path) -> None:
    for name in ("z", "checkpoints/y", "b"):
        (run_dir / name).symlink_to("x")
    with pytest.raises(UserError, match="/a/b is a symbolic link"):
        require_no_links(run_dir)


def test_wandb_itself_must_not_be_a_link(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "wandb").rename(tmp_path / "records")
    (run_dir / "wandb").symlink_to(tmp_path / "records")
    with pytest.raises(UserError, match="wandb is a symbolic link"):
        require_no_links(run_dir)


def test_a_pipe_in_a_run_directory_is_named(run_dir: Path) -> None:
    os.mkfifo(run_dir / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl is neither a file nor a folder"):
        require_no_links(run_dir)


def test_folders_may_be_nested_deeper_than_python_can_recurse(run_dir: Path) -> None:
    deepest = run_dir / "/".join(["d"] * 400)
    deepest.mkdir(parents=True)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        require_no_links(run_dir)
        (deepest / "link").symlink_to("x")
        with pytest.raises(UserError, match="d/link is a symbolic link"):
            require_no_links(run_dir)
    finally:
        sys.setrecursionlimit(limit)


def test_a_path_that_is_no_folder_is_refused(run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"can't read .*Not a directory"):
        require_no_links(run_dir / "config.yaml" / "below")
