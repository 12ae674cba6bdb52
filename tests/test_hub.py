"""Uploads to the Hugging Face Hub and downloads from it, by its real client, on a loopback port."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import _cache_assets

import vae_dist
from tests.conftest import opened
from tests.hub_server import HubServer
from vae_dist import config
from vae_dist.errors import UserError
from vae_dist.publishing import hub
from vae_dist.publishing.export import export
from vae_dist.publishing.inference import FILES
from vae_dist.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own

TOKEN = "hf_" + 34 * "x"
NAME = "somebody/digits"


@pytest.fixture(scope="module")
def exported(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("runs")
    run_dir = train(config.load([*smoke_arguments, f"runs_dir={runs_dir}", "name=a", "train.steps=5"]))
    return export(run_dir, ["export.formats=[]"])


def use(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client, which reads its environment when it is imported, at a server and at caches below `home`."""
    pages = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}{pages}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(home / "assets"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer(TOKEN)
    use(server.url, tmp_path, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


def test_what_is_pushed_is_what_is_fetched(
    server: HubServer, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = hub.push(exported, NAME)
    assert url == f"{server.url}/{NAME}" and server.repositories[NAME].visibility == "private"
    stored = list(server.repositories[NAME].commits.values())[-1]
    assert stored == {".gitattributes": b"", **{path.name: path.read_bytes() for path in exported.iterdir()}}

    use(server.url, tmp_path / "another", monkeypatch)
    killed = Path(huggingface_hub.cached_assets_path("vae_dist", "models", NAME.replace("/", "--"))) / ".writing-0123"
    killed.mkdir()
    folder = hub.fetch(f"hf://{NAME}")
    assert folder.parent == killed.parent and list(killed.parent.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert not [path for path in folder.iterdir() if path.is_symlink()]
    assert all((folder / name).read_bytes() == (exported / name).read_bytes() for name in FILES)
    fetched, own = opened(folder), opened(exported)
    weights, others = (run.checkpoint.load_vae(run.config, torch.device("cpu")).state_dict() for run in (fetched, own))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_the_export_command_uploads(server: HubServer, exported: Path, tmp_path: Path) -> None:
    arguments = [f"output={tmp_path / 'out'}", "export.formats=[]", f"export.push={NAME}", "export.private=false"]
    folder = export(exported, arguments)
    assert server.repositories[NAME].visibility == "public"
    assert f'vae_dist.load("hf://{NAME}")' in (folder / "README.md").read_text()


def test_a_run_is_pushed_and_loaded_from_python(server: HubServer, exported: Path, tmp_path: Path) -> None:
    own = vae_dist.load(exported)
    name = own.push(NAME, "export.formats=[]", f"output={tmp_path / 'out'}")
    run = vae_dist.load(name)
    assert (name, run.step) == (f"hf://{NAME}", 5)
    assert torch.equal(run.sample(3), own.sample(3))


def test_a_later_push_deletes_files_of_the_earlier_one_and_no_others(
    server: HubServer, exported: Path, tmp_path: Path
) -> None:
    hub.push(exported, NAME)
    files = list(server.repositories[NAME].commits.values())[-1]
    server.repositories[NAME].add({**files, "encoder.onnx": b"old", "mine.txt": b"x"})
    (exported / "notes.txt").write_text("private")
    hub.push(exported, NAME)
    files = list(server.repositories[NAME].commits.values())[-1]
    assert "encoder.onnx" not in files and "notes.txt" not in files and files["mine.txt"] == b"x"
    (exported / "notes.txt").unlink()


def test_programs_and_unknown_files_are_never_downloaded(server: HubServer, exported: Path) -> None:
    hub.push(exported, NAME)
    files = list(server.repositories[NAME].commits.values())[-1]
    others = ["encoder.pt2", "decoder.onnx", "pytorch_model.bin", "model.py", "a/model.safetensors", "x.safetensors"]
    server.repositories[NAME].add({**files, **dict.fromkeys(others, b"hostile")})
    folder = hub.fetch(f"hf://{NAME}")
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert not [request for request in server.requests for name in others if request.endswith(f"/{name}")]


def test_a_revision_is_fetched_by_its_name(server: HubServer, exported: Path) -> None:
    hub.push(exported, NAME)
    first = list(server.repositories[NAME].commits)[-1]
    server.repositories[NAME].add({"README.md": b"nothing else"})
    assert opened(hub.fetch(f"hf://{NAME}@{first}")).step == 5
    with pytest.raises(UserError, match=rf"hf://{NAME} holds no model of vae_dist: it has no manifest.json"):
        hub.fetch(f"hf://{NAME}")
    with pytest.raises(UserError, match=r"can't download hf://somebody/digits@v2: it has no such revision"):
        hub.fetch(f"hf://{NAME}@v2")


def test_without_a_network_the_cache_serves(
    server: HubServer, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(exported, NAME)
    folder = hub.fetch(f"hf://{NAME}")
    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert hub.fetch(f"hf://{NAME}") == folder
    with pytest.raises(UserError, match="the Hugging Face Hub can't be reached, and it was not downloaded before"):
        hub.fetch("hf://somebody/other")
    with pytest.raises(UserError, match=f"can't upload to {NAME} .*check the network"):
        hub.push(exported, NAME)


def test_a_hub_that_accepts_and_says_nothing_is_given_up(
    server: HubServer, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(exported, NAME)
    folder = hub.fetch(f"hf://{NAME}")
    hooks = huggingface_hub.get_session().event_hooks
    monkeypatch.setattr(hub, "SILENT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, monkeypatch)
        assert hub.fetch(f"hf://{NAME}") == folder
        with pytest.raises(UserError, match="the Hugging Face Hub can't be reached, and it was not downloaded before"):
            hub.fetch("hf://somebody/other")
        with pytest.raises(UserError, match=rf"can't upload to {NAME} \(ReadTimeout: .*\); check the network"):
            hub.push(exported, NAME)
    assert huggingface_hub.get_session().event_hooks == hooks


def test_what_the_cache_has_in_part_is_no_model_and_is_completed_later(
    server: HubServer, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(exported, NAME)
    huggingface_hub.hf_hub_download(NAME, "manifest.json", cache_dir=tmp_path / "hub")
    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"no whole model of vae_dist: model.safetensors, .*check the network"):
        hub.fetch(f"hf://{NAME}")
    use(server.url, tmp_path, monkeypatch)
    opened(hub.fetch(f"hf://{NAME}"))


def test_a_damaged_download_is_refused_until_its_copy_is_removed(
    server: HubServer, exported: Path, tmp_path: Path
) -> None:
    hub.push(exported, NAME)
    files = list(server.repositories[NAME].commits.values())[-1]
    weights = files["model.safetensors"]
    files["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])  # on its way
    cached = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    for _ in range(2):
        with pytest.raises(UserError, match=rf"sha256 is not the manifest's\); if it .*, remove {cached} and try"):
            hub.fetch(f"hf://{NAME}")
        files["model.safetensors"] = weights
    shutil.rmtree(cached)
    opened(hub.fetch(f"hf://{NAME}"))


def test_a_push_needs_a_token_and_a_whole_export(
    server: HubServer, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="can't be read"):
        hub.push(tmp_path, NAME)
    monkeypatch.delenv("HF_TOKEN")
    arguments = [f"output={tmp_path / 'out'}", f"export.push={NAME}"]
    with pytest.raises(UserError, match=r"uploading needs a Hugging Face token: run `hf auth login`, or set HF_TOKEN"):
        export(exported, arguments)
    assert not (tmp_path / "out").exists() and not server.requests


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_is_one_message_without_the_token(server: HubServer, exported: Path, status: int) -> None:
    server.status = status
    for call in (lambda: hub.push(exported, NAME), lambda: hub.fetch(f"hf://{NAME}")):
        with pytest.raises(UserError) as refusal:
            call()
        assert "\n" not in str(refusal.value) and TOKEN not in str(refusal.value)


def test_an_error_of_the_client_that_quotes_the_token_is_told_without_it(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError(f"bad header: Bearer {TOKEN}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"\(ValueError: bad header: Bearer \*\*\*\); check the network"):
        hub.fetch(f"hf://{NAME}")


def test_a_token_that_can_not_be_sent_is_named_without_it(
    server: HubServer, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(problem: str) -> None:
        for call in (lambda: hub.push(exported, NAME), lambda: hub.fetch(f"hf://{NAME}")):
            with pytest.raises(UserError, match=rf"^the Hugging Face token {problem}; run `hf auth login`, or set HF_"):
                call()

    monkeypatch.setenv("HF_TOKEN", "hf_é" + 30 * "x")
    check("has a character that no token has")
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_bytes(b"hf_\xe9")
    check(r"can't be read \(.*\)")
    assert not server.requests


@pytest.mark.parametrize("status", [403, 429, 500])
def test_an_answer_of_the_hub_is_no_broken_network(server: HubServer, exported: Path, status: int) -> None:
    hub.push(exported, NAME)
    server.status = status
    with pytest.raises(UserError, match=rf"^can't download hf://{NAME}: the Hub answered with status {status}; "):
        hub.fetch(f"hf://{NAME}")
    server.status, server.failing = None, ("/objects/store/", 403)
    with pytest.raises(UserError, match="the Hub answered with status 403; your token may not do this"):
        hub.push(exported, NAME)


def test_a_download_of_another_length_is_no_fault_of_the_cache(server: HubServer, exported: Path) -> None:
    hub.push(exported, NAME)
    server.failing = ("/resolve/", 200)
    with pytest.raises(UserError, match=r"; check the network, or try again later$"):
        hub.fetch(f"hf://{NAME}")


@pytest.mark.parametrize(
    "name", ["hf://", "hf://a", "hf://a/b/c", "hf://../x", "hf://a/b@", "hf://a/b@-x y", "hf://a/b--c", "a/b", "hf://a/b@../x"]
)  # fmt: skip
def test_names_are_checked_before_the_network_is_used(server: HubServer, name: str) -> None:
    with pytest.raises(UserError, match="of the Hugging Face Hub: give"):
        hub.fetch(name)
    assert not server.requests
