"""Weights from the network: a local server, small stand-ins for the published files, and whatever goes wrong."""

import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.file_server import FileServer
from vae_dist.data import download
from vae_dist.data.download import Published
from vae_dist.errors import UserError
from vae_dist.features.lpips import LPIPS
from vae_dist.features.published import WEIGHTS, Weights, fetch


class Small(nn.Module):
    """A stand-in for LPIPS: names as its own, a layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg = nn.Sequential(nn.Conv2d(3, 4, 3))
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(4))])


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.close()


def saved(tensors: Mapping[str, object]) -> bytes:
    file = io.BytesIO()
    torch.save(dict(tensors), file)
    return file.getvalue()


def small_tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    backbone = {
        "features.0.weight": torch.randn(4, 3, 3, 3),
        "features.0.bias": torch.randn(4),
        "classifier.0.weight": torch.randn(5, 5),
    }
    return backbone, {"lin0.model.1.weight": torch.rand(1, 4, 1, 1)}


def table(server: FileServer, contents: Mapping[str, bytes]) -> dict[str, Weights]:
    """Serve these files in place of those of LPIPS."""
    server.contents = dict(contents)
    files = [
        Published(server.url, name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    ]
    return {"lpips_vgg": Weights(files, WEIGHTS["lpips_vgg"].convert, lambda: Small)}


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_the_published_tensors_become_one_safetensors_file(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, heads = small_tensors()
    small = table(server, {"vgg16.pth": saved(backbone), "heads.pth": saved(heads)})
    path = fetch([f"output={tmp_path}/weights"], small)["lpips_vgg"]
    kept = load_file(path)
    assert kept.keys() == {"vgg.0.weight", "vgg.0.bias", "heads.0"}
    assert torch.equal(kept["vgg.0.weight"], backbone["features.0.weight"])
    assert torch.equal(kept["heads.0"], heads["lin0.model.1.weight"].flatten())
    assert left(path.parent) == {"lpips_vgg.safetensors"}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert capsys.readouterr().out == f"{path}  sha256 {digest}\n"
    requests = len(server.requests)
    fetch(["lpips_vgg", f"--output={tmp_path}/weights"], small)  # is there already
    assert len(server.requests) == requests and digest in capsys.readouterr().out


def test_another_digest_is_refused_and_nothing_stays(server: FileServer, tmp_path: Path) -> None:
    backbone, _ = small_tensors()
    small = table(server, {"vgg16.pth": saved(backbone)})
    server.contents["vgg16.pth"] = server.contents["vgg16.pth"][:-1] + b"?"
    with pytest.raises(UserError, match=r"can't download vgg16.pth \(http://.*/files/vgg16.pth is corrupt: its sha256"):
        fetch([f"output={tmp_path}"], small)
    assert left(tmp_path) == set()


def test_a_pickle_that_does_more_than_hold_tensors_is_never_run(server: FileServer, tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "run",)

    small = table(server, {"vgg16.pth": saved({"features.0.weight": Malice()})})
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):  # though its digest is expected
        fetch([f"output={tmp_path}/weights"], small)
    assert not (tmp_path / "run").exists()


def test_tensors_of_another_network_are_refused(server: FileServer, tmp_path: Path) -> None:
    _, heads = small_tensors()
    small = table(server, {"heads.pth": saved(heads)})
    with pytest.raises(UserError, match=r"not hold the weights of lpips_vgg: vgg.0.bias is missing; install another"):
        fetch([f"output={tmp_path}"], small)
    assert "lpips_vgg.safetensors" not in left(tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_breaks_off_continues_where_it_was(ranges: bool, server: FileServer, tmp_path: Path) -> None:
    backbone, heads = small_tensors()
    small = table(server, {"vgg16.pth": saved(backbone), "heads.pth": saved(heads)})
    server.sends, server.ranges = 1000, ranges
    with pytest.raises(UserError, match=r"it is truncated: 1000 of \d+ bytes came"):
        fetch([f"output={tmp_path}"], small)
    server.sends = None
    path = fetch([f"output={tmp_path}"], small)["lpips_vgg"]
    assert server.requests[1] == ("/files/vgg16.pth", "bytes=1000-")
    assert torch.equal(load_file(path)["vgg.0.bias"], backbone["features.0.bias"])
    assert left(tmp_path) == {"lpips_vgg.safetensors"}


def test_a_page_in_the_place_of_a_file_spoils_no_transfer(server: FileServer, tmp_path: Path) -> None:
    """A proxy that wants a login sends its page with status 200."""
    backbone, heads = small_tensors()
    small = table(server, {"vgg16.pth": saved(backbone), "heads.pth": saved(heads)})
    server.sends = 1000
    with pytest.raises(UserError, match="it is truncated: 1000"):
        fetch([f"output={tmp_path}"], small)
    server.sends, server.ranges = None, False
    content, server.contents["vgg16.pth"] = server.contents["vgg16.pth"], b"<html>"
    with pytest.raises(UserError, match=r"it is another file, such as a page of a proxy: 6 of \d+ bytes\); try again"):
        fetch([f"output={tmp_path}"], small)
    server.ranges, server.contents["vgg16.pth"] = True, content
    fetch([f"output={tmp_path}"], small)
    assert server.requests[2] == ("/files/vgg16.pth", "bytes=1000-") and left(tmp_path) == {"lpips_vgg.safetensors"}


def test_a_file_that_is_there_and_does_not_fit_is_to_be_deleted(server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "lpips_vgg.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"is no safetensors file \(.*\); delete it, and run this again"):
        fetch([f"output={tmp_path}"], table(server, {}))
    assert path.read_bytes() == b"junk" and not server.requests


def test_a_transfer_that_was_killed_at_its_end_is_complete(server: FileServer, tmp_path: Path) -> None:
    backbone, heads = small_tensors()
    small = table(server, {"vgg16.pth": saved(backbone), "heads.pth": saved(heads)})
    (tmp_path / "..vgg16.pth.part").write_bytes(server.contents["vgg16.pth"])
    fetch([f"output={tmp_path}"], small)
    assert server.requests == [("/files/heads.pth", None)]


def test_a_link_in_the_place_of_a_part_is_not_followed(server: FileServer, tmp_path: Path) -> None:
    small = table(server, {"vgg16.pth": saved(small_tensors()[0])})
    (tmp_path / "weights").mkdir()
    (tmp_path / "mine").write_bytes(b"")
    (tmp_path / "weights/..vgg16.pth.part").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"can't download vgg16.pth"):
        fetch([f"output={tmp_path}/weights"], small)
    assert (tmp_path / "mine").read_bytes() == b""


def test_a_part_that_is_too_long_is_loaded_again(server: FileServer, tmp_path: Path) -> None:
    backbone, heads = small_tensors()
    small = table(server, {"vgg16.pth": saved(backbone), "heads.pth": saved(heads)})
    (tmp_path / "..vgg16.pth.part").write_bytes(bytes(len(server.contents["vgg16.pth"]) + 1))
    fetch([f"output={tmp_path}"], small)
    assert left(tmp_path) == {"lpips_vgg.safetensors"}


def test_a_file_that_came_stays_for_the_next_call(server: FileServer, tmp_path: Path) -> None:
    backbone, heads = small_tensors()
    small = table(server, {"vgg16.pth": saved(backbone), "heads.pth": saved(heads)})
    content = server.contents.pop("heads.pth")
    with pytest.raises(UserError, match=r"can't download heads.pth \(.*: 404 .*\); try again, or give mirror=URL"):
        fetch([f"output={tmp_path}"], small)
    server.contents["heads.pth"] = content
    fetch([f"output={tmp_path}"], small)
    assert [path for path, _ in server.requests].count("/files/vgg16.pth") == 1
    assert left(tmp_path) == {"lpips_vgg.safetensors"}


def test_a_mirror_replaces_the_published_addresses(server: FileServer, tmp_path: Path) -> None:
    small = table(server, {f"{name}.pth": saved(part) for name, part in zip("ab", small_tensors(), strict=True)})
    elsewhere = [file._replace(folder="http://127.0.0.1:9") for file in small["lpips_vgg"].files]
    moved = {"lpips_vgg": small["lpips_vgg"]._replace(files=elsewhere)}
    assert fetch([f"output={tmp_path}", f"mirror={server.url.rstrip('/')}"], moved)["lpips_vgg"].exists()


def test_a_file_longer_than_published_is_given_up(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = table(server, {"vgg16.pth": saved(small_tensors()[0])})
    server.contents["vgg16.pth"] += b"more"
    with pytest.raises(UserError, match=r"it exceeds 3600 s or \d+ bytes"):
        fetch([f"output={tmp_path}"], small)
    assert all((tmp_path / name).stat().st_size == 0 for name in left(tmp_path))
    monkeypatch.setattr(download, "FILE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"takes more than 0\.0 s|exceeds 0\.0 s"):
        fetch([f"output={tmp_path}"], small)


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    for argument in ("lpips_alex", "outputs=here", "output=", "--help-me"):
        with pytest.raises(UserError, match="give names out of lpips_vgg, fid_inception, output=FOLDER or mirror=URL"):
            fetch([argument])


def test_the_table_holds_the_digests_that_the_files_names_begin() -> None:
    for weights in WEIGHTS.values():
        for file in weights.files:
            assert len(file.sha256) == 64 and file.folder.startswith("https://")
            prefix = file.name.removesuffix(".pth").rpartition("-")[2]
            assert file.sha256.startswith(prefix) or file.name == "vgg.pth"  # which names none


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_published_names_are_the_networks(name: str) -> None:
    with torch.device("meta"):
        expected = WEIGHTS[name].network()().state_dict()
        if name == "lpips_vgg":
            channels = enumerate((64, 128, 256, 512, 512))
            names = torchvision.models.vgg16(weights=None, init_weights=False).state_dict()
            names |= {f"lin{index}.model.1.weight": torch.empty(1, count, 1, 1) for index, count in channels}
        else:
            names = torchvision.models.inception_v3(
                weights=None, num_classes=1008, aux_logits=False, init_weights=False
            ).state_dict()
    shapes = {key: tensor.shape for key, tensor in WEIGHTS[name].convert(names).items()}
    assert shapes == {key: tensor.shape for key, tensor in expected.items()}


def test_the_published_heads_are_those_that_torchmetrics_ships() -> None:
    shipped = pytest.importorskip("torchmetrics.functional.image.lpips")
    path = Path(shipped.__file__).with_name("lpips_models") / "vgg.pth"
    heads = next(file for file in WEIGHTS["lpips_vgg"].files if file.name == "vgg.pth")
    assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (heads.bytes, heads.sha256)
    converted = WEIGHTS["lpips_vgg"].convert(torch.load(path, map_location="cpu", weights_only=True))
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in LPIPS().state_dict().items() if name.startswith("heads")}
    assert {name: tensor.shape for name, tensor in converted.items()} == expected
    assert all(bool((tensor >= 0).all()) for tensor in converted.values())
