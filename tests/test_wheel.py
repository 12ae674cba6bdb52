"""The package as a user installs it: a wheel, in a folder of its own, used from another folder."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import psutil
import pytest

import vae_dist
from tests.conftest import REPOSITORY, newest_checkpoint
from tests.forked import ForkServer
from tests.test_stopping import wait_for
from vae_dist.cli import COMMANDS

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
BUILD = [*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir"]
CPU = str(REPOSITORY / "launch/cpu.yaml")
INFO = f"vae_dist-{vae_dist.__version__}.dist-info"


def copy_of_the_checkout(folder: Path) -> Path:
    """A copy in which to build, since a build leaves files where it runs."""
    skipped = shutil.ignore_patterns("__pycache__")
    for name in ("configs", "docs", "launch", "tests", "vae_dist"):
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=skipped)
    for name in ("Makefile", "README.md", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy, folder = copy_of_the_checkout(tmp_path_factory.mktemp("copy")), tmp_path_factory.mktemp("wheel")
    subprocess.run([*BUILD, str(folder), str(copy)], check=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install = ["install", "--no-index", "--no-deps", "--no-compile", "--no-warn-script-location", "--target"]
    subprocess.run([*PIP, *install, str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture
def command(site: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The console command, which finds the installed package first."""
    monkeypatch.setenv("PYTHONPATH", str(site))
    return str(site / "bin/vae-dist")


@pytest.fixture
def tiny(smoke_arguments: list[str]) -> list[str]:
    """A training of 4 steps, by the name of a config."""
    return ["configs/smoke.yaml", *smoke_arguments[1:], "train.steps=4"]


def test_the_wheel_holds_the_package_with_its_configs_and_templates_alone(wheel: Path) -> None:
    package = REPOSITORY / "vae_dist"
    own = [*package.rglob("*.py"), *(package / "reports/templates").iterdir()]
    expected = {f"vae_dist/{path.relative_to(package)}" for path in own}
    expected |= {f"vae_dist/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.yaml")}
    expected |= {f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
    assert names_in(wheel) == expected | {"vae_dist/py.typed"}


def test_its_metadata_names_the_command_the_extras_and_the_version(site: Path) -> None:
    installed = PathDistribution(site / INFO)
    assert installed.version == vae_dist.__version__
    assert {(entry.group, entry.name, entry.value) for entry in installed.entry_points} == {
        ("console_scripts", "vae-dist", "vae_dist.cli:main")
    }
    assert {"export", "notebooks"} <= set(installed.metadata.get_all("Provides-Extra") or [])
    assert "Typing :: Typed" in (installed.metadata.get_all("Classifier") or [])
    required = [text for text in installed.requires or [] if "extra ==" not in text]
    assert len(required) > 10 and not [text for text in required if text.startswith(("onnx", "pandas", "pytest"))]


def test_it_trains_evaluates_and_samples_from_another_folder(
    fork_server: ForkServer, command: str, site: Path, tiny: list[str], tmp_path: Path
) -> None:
    place = fork_server.run("-c", "import vae_dist; print(vae_dist.__file__)")
    assert place.stdout.strip() == str(site / "vae_dist/__init__.py")
    trained = fork_server.run(command, "train", *tiny)
    assert trained.returncode == 0, trained.stderr
    (run_dir,) = (tmp_path / "runs").glob("smoke-*")
    evaluated = fork_server.run(command, "eval")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads((run_dir / "evaluation.json").read_text())["step"] == 4
    sampled = fork_server.run("-m", "vae_dist", "sample", str(run_dir), "sample.count=4")
    assert sampled.returncode == 0, sampled.stderr
    assert (run_dir / "samples/step_00000004_prior_seed_0/grid.png").exists()


def test_help_lists_the_commands_and_needs_no_torch(command: str) -> None:
    helped = subprocess.run([sys.executable, "-X", "importtime", command], capture_output=True, text=True)
    assert helped.returncode == 0
    assert helped.stdout.startswith("Train variational autoencoders, evaluate them and use them.\n\nvae-dist COMMAND [")
    listed = re.findall(r"^  ([\w-]+) +[A-Z].*\.$", helped.stdout, re.MULTILINE)
    assert listed == list(COMMANDS)
    imported = set(re.findall(r"\| +(\w+)", helped.stderr))
    assert "vae_dist" in imported and not imported & {"torch", "wandb", "matplotlib"}


def test_each_command_answers_help_as_its_script_does(fork_server: ForkServer, command: str) -> None:
    for name, module in COMMANDS.items():
        helped = fork_server.run(command, name, "--help")
        assert helped.returncode == 0 and f"\nvae-dist {name} " in helped.stdout
        if name in ("train", "eval"):
            assert helped.stdout == fork_server.run(str(REPOSITORY / f"vae_dist/{module}.py"), "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "unknown command 'evaluate'; did you mean eval?"),
        (["trian", "name=a"], "unknown command 'trian'; did you mean train?"),
        (["name=a"], "unknown command 'name=a'; the commands are train, eval, "),
        (["train", "configs/smok.yaml"], "No such file or directory; vae_dist has configs/burda.yaml, "),
        (["eval", "nowhere"], "there is no run at nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, fork_server: ForkServer, command: str
) -> None:
    refused = fork_server.run(command, *arguments)
    assert refused.returncode == 2 and refused.stdout == ""
    assert message in refused.stderr and refused.stderr.count("\n") == 1


def test_it_prints_its_version(fork_server: ForkServer, command: str) -> None:
    assert fork_server.run(command, "--version").stdout == f"vae_dist {vae_dist.__version__}\n"


@pytest.mark.slow
def test_a_report_and_an_offline_record_name_the_installed_command(
    fork_server: ForkServer, command: str, tiny: list[str], tmp_path: Path
) -> None:
    trained = fork_server.run(command, "train", *tiny, "tracking.wandb=offline", "name=a")
    assert trained.returncode == 0 and "`vae-dist runs` browses" in trained.stderr, trained.stderr
    reported = fork_server.run(command, "report", "runs/a")
    assert reported.returncode == 0, reported.stderr
    page = (tmp_path / "runs/a/report.html").read_text()
    assert "vae-dist eval runs/a\nvae-dist sample runs/a\nvae-dist report runs/a" in page
    assert "vae-dist train " in page and "make " not in page.partition("<main>")[2].partition("<script>")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch",
    [
        ["accelerate.commands.accelerate_cli", "launch", "--quiet", "--config_file", CPU],
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ],
)  # fmt: skip
def test_launchers_start_it_as_a_module(
    launch: list[str], command: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    words = [sys.executable, "-m", *launch, "-m", "vae_dist", "train", *tiny, "name=a"]
    trained = subprocess.run(words, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count("runs/a: 2 processes on cpu") == 1
    assert newest_checkpoint(tmp_path / "runs/a") is not None


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_command_after_a_checkpoint(
    number: signal.Signals, code: int, command: str, tiny: list[str], tmp_path: Path
) -> None:
    endless = [command, "train", *tiny, "name=a", "train.steps=1000000", "checkpoint.every=100"]
    training = subprocess.Popen(endless, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path, "runs/a/checkpoints/step_*")
    training.send_signal(number)
    _, messages = training.communicate(timeout=30)
    assert training.returncode == code and f"{number.name}: asked to stop; step" in messages


@pytest.mark.slow
def test_a_process_whose_launcher_is_killed_saves_and_ends(command: str, tiny: list[str], tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-m", "vae_dist", "train"]
    endless = [*launch, *tiny, "name=a", "train.steps=1000000", "checkpoint.every=100"]
    launcher = subprocess.Popen(endless, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path, "runs/a/checkpoints/step_*")
    (worker,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert not alive
    assert "SIGTERM: asked to stop; step" in (tmp_path / "runs/a/log.txt").read_text()


@pytest.mark.slow
def test_mypy_sees_its_types(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site))
    (tmp_path / "some.py").write_text(
        "from vae_dist import config\n\nlatents: int = config.load([]).seed\nname: int = config.load([]).runs_dir\n"
    )
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "some.py"], capture_output=True, text=True
    )
    (error,) = [line for line in checked.stdout.splitlines() if "error:" in line]
    assert error.startswith('some.py:4: error: Incompatible types in assignment (expression has type "str"')


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_holds_the_same(wheel: Path, tmp_path: Path) -> None:
    copy = copy_of_the_checkout(tmp_path / "copy")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    subprocess.run([*BUILD, str(tmp_path / "built"), str(source)], check=True)
    (built,) = (tmp_path / "built").iterdir()
    assert names_in(built) == names_in(wheel)


@pytest.mark.slow
def test_an_editable_installation_is_the_checkout_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copy_of_the_checkout(tmp_path / "copy")
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    use = f"""
import site
site.addsitedir({str(tmp_path / "site")!r})
import vae_dist
from vae_dist import config
print(vae_dist.__file__, config.load(["configs/smoke.yaml"]).name)
"""
    used = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True)
    assert used.stdout.split() == [str(copy / "vae_dist/__init__.py"), "smoke-{time}"], used.stderr
