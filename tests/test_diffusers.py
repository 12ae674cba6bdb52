"""Autoencoders to diffusers and from it, and the training of a decoder under a frozen encoder."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load, load_file, save_file
from torch import Tensor

import vae_dist
from tests.conftest import REPOSITORY, newest_checkpoint, update_of
from tests.forked import ForkServer
from tests.test_autoencoder_kl import KL, SHAPE, batch, make
from tests.test_conv import DIGITS, records, tensors
from vae_dist import config
from vae_dist.config import AutoencoderKLConfig, Config, ConvConfig
from vae_dist.data.batches import Batch
from vae_dist.data.source import in_memory
from vae_dist.distributed import processes
from vae_dist.encoding.encode import encode
from vae_dist.errors import UserError
from vae_dist.models import build_vae
from vae_dist.models.autoencoder_kl import AutoencoderKLVAE
from vae_dist.models.diffusers_files import CONFIG, WEIGHTS, Scaling, diffusers_files
from vae_dist.models.diffusers_start import resolve_start, start_vae
from vae_dist.models.vae import VAE
from vae_dist.publishing.export import export
from vae_dist.training.loop import train

# The published autoencoders' options at a small width.
NARROW = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sd": {"latent_channels": 4, "sample_size": 512},
    "sdxl": {"latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "flux": {
        "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "f16": {
        "latent_channels": 16, "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
}  # fmt: skip


def save(folder: Path, **options: Any) -> Path:
    """A folder that diffusers writes, with random weights."""
    torch.manual_seed(1)
    AutoencoderKL(**{**NARROW, **BLOCKS, **options}).save_pretrained(folder)
    return folder


def change(folder: Path, **values: Any) -> Path:
    """Change keys of a folder's config.json."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def start(folder: Path, *arguments: str, channels: int = 3) -> tuple[Config, AutoencoderKLVAE]:
    """The config of a run that starts from a folder, and its first weights."""
    given = config.load([KL, "objective.reconstruction=laplace", f"model.init_from={folder}", *arguments])
    shape = (channels, 16, 16)
    resolved = resolve_start(replace(given, data=replace(given.data, image_shape=list(shape))), shape)
    vae = start_vae(resolved, in_memory("images", torch.zeros(1, *shape, dtype=torch.uint8), None, "").info)
    assert isinstance(vae, AutoencoderKLVAE)
    return resolved, vae.eval()


# ---- To diffusers


def written(vae: VAE, folder: Path, scaling: Scaling | None = None) -> Path:
    """Write the files that `AutoencoderKL.from_pretrained(folder)` reads."""
    for name, content in diffusers_files(vae, scaling).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["model.quant_conv=false", "model.channels=[4,8,8]"], ["model.mid_attention=false"],
        ["model.attention=[2]", "model.channels=[4,8,8]"],
    ],
)  # fmt: skip
def test_diffusers_reads_a_model_and_computes_the_same_bits(arguments: list[str], tmp_path: Path) -> None:
    vae = make(SHAPE, *arguments)
    folder = written(vae, tmp_path, Scaling(factor=0.5))
    theirs, information = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert not any(information.values())  # no weight is missing, unexpected or of another shape
    images, _ = batch(vae, 3)
    with torch.no_grad():
        posterior, read = vae.infer(images), theirs.encode(2 * images - 1).latent_dist
        assert torch.equal(posterior.mean, read.mean.flatten(1))
        assert torch.equal(posterior.log_variance, read.logvar.flatten(1))
        decoded = theirs.decode(posterior.mean.view(read.mean.shape)).sample
        assert torch.equal(vae.decode(posterior.mean).mean, ((decoded + 1) / 2).clamp(0, 1))


def test_config_json_has_the_keys_that_diffusers_writes(tmp_path: Path) -> None:
    vae = make()
    ours = json.loads(diffusers_files(vae)[CONFIG])
    again = AutoencoderKL.from_pretrained(written(vae, tmp_path))
    again.save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    theirs.pop("_name_or_path", None)
    assert ours == theirs
    assert ours["sample_size"] == 12 and ours["scaling_factor"] is None


def test_latents_are_scaled_by_a_factor_or_by_mean_and_deviation() -> None:
    vae = make()

    def scaling(**given: Any) -> list[Any]:
        values = json.loads(diffusers_files(vae, Scaling(**given))[CONFIG])
        return [values[key] for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]

    assert scaling() == [None, None, None, None]
    assert scaling(factor=0.2, shift=0.1) == [0.2, 0.1, None, None]
    # Pipelines multiply latents_std with 1 / scaling_factor, and would multiply with nothing if it were null.
    assert scaling(mean=[0.0] * 4, std=[2.0] * 4) == [1.0, None, [0.0] * 4, [2.0] * 4]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"factor": 0.2, "mean": [0.0] * 4, "std": [1.0] * 4}, "would scale latents twice"),
        ({"std": [1.0] * 4}, "given together"),
        ({"mean": [0.0] * 3, "std": [1.0] * 3}, "a number for each of the 4 latent channels"),
    ]
    for wrong, message in cases:
        with pytest.raises(UserError, match=message):
            diffusers_files(vae, Scaling(**wrong))


def test_another_architecture_is_refused() -> None:
    with pytest.raises(UserError, match=r"only model.architecture=autoencoder_kl can be exported"):
        diffusers_files(build_vae(Config(model=ConvConfig()), (1, 28, 28)))


# ---- From diffusers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_diffusers_comes_back_as_the_same_bytes_of_weights(layout: str, tmp_path: Path) -> None:
    folder = save(tmp_path / layout, **LAYOUTS[layout])
    resolved, vae = start(folder)
    model = resolved.model
    assert isinstance(model, AutoencoderKLConfig)
    assert (model.channels, model.blocks, model.norm_groups) == ([8, 16], 1, 4)
    assert (model.latent_channels, model.quant_conv) == (LAYOUTS[layout]["latent_channels"], layout != "flux")
    assert model.attention == ([2] if layout == "f16" else [])
    content = (folder / WEIGHTS).read_bytes()
    assert model.init_sha256 == hashlib.sha256(content).hexdigest()
    assert diffusers_files(vae)[WEIGHTS] == content
    theirs = AutoencoderKL.from_pretrained(folder)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(vae.infer(images).mean, theirs.encode(2 * images - 1).latent_dist.mode().flatten(1))


@pytest.mark.parametrize(("layout", "renamed"), [("sd", 16), ("f16", 40)])
def test_a_file_of_old_versions_has_other_names_and_fewer_options(layout: str, renamed: int, tmp_path: Path) -> None:
    folder = save(tmp_path / "old", **LAYOUTS[layout])
    state = load_file(folder / WEIGHTS)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state.items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = tensor
    assert len(old.keys() - state.keys()) == renamed
    save_file(old, folder / WEIGHTS)
    newer = ["latents_mean", "latents_std", "shift_factor", "use_quant_conv", "use_post_quant_conv"]
    newer += ["mid_block_add_attention", "force_upcast", "scaling_factor"]
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({key: values[key] for key in values.keys() - set(newer)}))
    written = load(diffusers_files(start(folder)[1])[WEIGHTS])
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)


def test_weights_in_half_precision_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "half")
    AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float16).save_pretrained(folder)
    stored = load_file(folder / WEIGHTS)
    weights = load(diffusers_files(start(folder)[1])[WEIGHTS])
    assert stored["encoder.conv_in.weight"].dtype == torch.float16
    assert all(torch.equal(weights[name], stored[name].float()) for name in stored)


def _weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS)


ATTENTION, WRONG = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ["AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D"]
NAME = "encoder.conv_in.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "attention of the encoder alone": (
        lambda folder: change(folder, down_block_types=ATTENTION),
        r"has up_block_types=.*'UpDecoderBlock2D'\], .* that would be AttnUpDecoderBlock2D, UpDecoderBlock2D$",
    ),
    "attention at two places": (
        lambda folder: change(folder, down_block_types=ATTENTION, up_block_types=WRONG),
        "has up_block_types=.* that would be AttnUpDecoderBlock2D, UpDecoderBlock2D$",
    ),
    "block": (
        lambda folder: change(folder, down_block_types=["DownBlock2D", "DownEncoderBlock2D"]),
        "has down_block_types=.*DownBlock2D.*, but only DownEncoderBlock2D and AttnDownEncoderBlock2D are known",
    ),
    "blocks without channels": (
        lambda folder: change(folder, down_block_types=[*ATTENTION, *ATTENTION]),
        "has down_block_types=.* are known here, one for each of block_out_channels",
    ),
    "text for blocks": (lambda folder: change(folder, down_block_types="Attn"), "has down_block_types=Attn, but only"),
    "activation": (lambda folder: change(folder, act_fn="gelu"), "has act_fn=gelu, but only silu is known here"),
    "option": (lambda folder: change(folder, dropout=0.1), "describes the option dropout, which"),
    "class": (lambda folder: change(folder, _class_name="AutoencoderTiny"), "describes a AutoencoderTiny, which"),
    "one quant_conv": (lambda folder: change(folder, use_quant_conv=False), "has use_post_quant_conv=True, but"),
    "size": (lambda folder: change(folder, layers_per_block=10**9), "1000000000 where a whole number from 1"),
    "type": (lambda folder: change(folder, latent_channels="4"), "4 where a whole number from 1"),
    "list": (lambda folder: change(folder, block_out_channels=[8] * 99), "which must be a list of 1 to 16 numbers"),
    "groups": (lambda folder: change(folder, norm_num_groups=3), "model.norm_groups=3 does not divide 8"),
    "shape": (lambda folder: change(folder, latent_channels=3), r"of \[16, 4, 3, 3\], and its config.json of \[16, "),
    "blocks": (lambda folder: change(folder, layers_per_block=2), "lacks the weight .*, and .* others differ"),
    "JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is not valid JSON"),
    "no object": (lambda folder: (folder / CONFIG).write_text("[]"), "does not hold a JSON object"),
    "long": (lambda folder: (folder / CONFIG).write_text(" " * 2**21), "Has more than"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "can't read .*config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "can't read .*safetensors"),
    "half precision alone": (
        lambda folder: (folder / WEIGHTS).rename((folder / WEIGHTS).with_suffix(".fp16.safetensors")),
        "can't read .*; give 'diffusion_pytorch_model.fp16.safetensors' this name",
    ),
    "pickle": (
        lambda folder: (folder / WEIGHTS).rename((folder / WEIGHTS).with_suffix(".bin")),
        "has its weights in diffusion_pytorch_model.bin alone, a pickle",
    ),
    "damaged": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), "can't be read"),
    "additional": (
        lambda folder: _weights(folder, lambda state: state.update(other=torch.zeros(1))),
        "has, unlike its config.json, the weight other, and 0 others differ",
    ),
    "infinite": (
        lambda folder: _weights(folder, lambda state: state[NAME].fill_(torch.inf)),
        f"has numbers in {NAME} that are not finite floats",
    ),
    "whole": (
        lambda folder: _weights(folder, lambda state: state.update({NAME: state[NAME].int()})),
        f"has numbers in {NAME} that are not finite floats",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "vae")


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_known_is_refused(case: str, saved: Path, tmp_path: Path) -> None:
    damage, message = REFUSED[case]
    folder = shutil.copytree(saved, tmp_path / "vae")
    damage(folder)
    with pytest.raises(UserError, match=message):
        start(folder)


def test_options_that_contradict_the_folder_are_refused(saved: Path) -> None:
    assert start(saved, "model.channels=[8,16]")[0].model == start(saved)[0].model
    with pytest.raises(UserError, match=r"model.channels=\[8\] contradicts .*config.json, which has \[8, 16\]"):
        start(saved, "model.channels=[8]")
    with pytest.raises(UserError, match=r"model.attention=\[16\] contradicts .*config.json, which has \[\]"):
        start(saved, "model.attention=[16]")
    with pytest.raises(UserError, match=r"in_channels=3, but the images have 1: use data.channels"):
        start(saved, channels=1)
    with pytest.raises(UserError, match=r"is another file than model.init_sha256 says"):
        start(saved, f"model.init_sha256={'0' * 64}")
    with pytest.raises(UserError, match=r"; use model.init_from=.*vae$"):  # the folder of a whole pipeline
        start(saved.parent)


def test_a_folder_without_the_files_of_diffusers_says_what_to_give(saved: Path, tmp_path: Path) -> None:
    for name in ("run/checkpoints", "checkpoint", "export"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "checkpoint/manifest.json").touch()
    (tmp_path / "export/config.yaml").touch()
    for name in ("run", "checkpoint", "export"):
        message = rf"vae-dist export {re.escape(str(tmp_path / name))} 'export\.formats=\[diffusers\]' writes it$"
        with pytest.raises(UserError, match=message):
            start(tmp_path / name)
    shutil.copytree(saved, tmp_path / "run/export/step_00000002")
    with pytest.raises(UserError, match=r"; use model\.init_from=.*run/export/step_00000002$"):
        start(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json \(No such file or directory\)$"):
        start(tmp_path / "empty")


# ---- Runs


@pytest.fixture(scope="module")
def common(smoke_arguments: list[str]) -> list[str]:
    options = ["train.batch_size=10", "train.log_every=1", "objective.sigma_kind=learned", "ema.decay=0.9"]
    return [*smoke_arguments[1:], *DIGITS, KL, "objective.reconstruction=laplace", *options, "checkpoint.every=2"]


def test_a_run_under_a_frozen_encoder_changes_the_rest_and_resumes_without_the_folder(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "vae", in_channels=1, out_channels=1)
    common = [*common, f"runs_dir={tmp_path / 'runs'}", f"model.init_from={folder}", "train.freeze=encoder"]
    straight = train(config.load([*common, "name=straight", "train.steps=4"]))
    parts = train(config.load([*common, "name=parts", "train.steps=2"]))
    stored = load_file(folder / WEIGHTS)
    shutil.rmtree(folder)
    train(config.load([*common, "name=parts", "train.steps=4"]))
    expected, found = tensors(straight), tensors(parts)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    for name, tensor in stored.items():
        frozen = name.startswith(("encoder.", "quant_conv."))
        for file in ("model", "ema"):
            trained = expected[f"{file} {'encoder' if frozen else 'decoder'}.{name}"]
            assert torch.equal(trained, tensor) == frozen, name
    exported = load_file(export(parts, ["export.formats=[diffusers]", f"output={tmp_path / 'out'}"]) / WEIGHTS)
    unchanged = {name for name, tensor in stored.items() if torch.equal(exported[name], tensor)}
    assert unchanged == {name for name in stored if name.startswith(("encoder.", "quant_conv."))}
    assert "scaling_factor: the frozen encoder's latents keep that of model.init_from" in capsys.readouterr().err
    moments = {name for name in expected if name.startswith("optimizer ")}
    assert moments and not [name for name in moments if name.startswith("optimizer encoder.")]
    with pytest.raises(UserError, match=r"can't be resumed with another train.freeze"):
        train(config.load([*common, "name=parts", "train.freeze=none", "train.steps=4"]))
    with pytest.raises(UserError, match=r"can't be resumed with another model.channels"):
        train(config.load([*common, "name=parts", "model.channels=[8]", "model.norm_groups=4", "train.steps=4"]))
    checkpoint = newest_checkpoint(parts)
    assert checkpoint is not None
    model = config.read(checkpoint / "config.yaml").model
    assert isinstance(model, AutoencoderKLConfig) and model.channels == [8, 16] and model.init_sha256


def test_without_a_frozen_encoder_all_weights_are_trained_from_the_folders(common: list[str], tmp_path: Path) -> None:
    folder = save(tmp_path / "vae", in_channels=1, out_channels=1)
    arguments = [f"runs_dir={tmp_path / 'runs'}", f"model.init_from={folder}", "optim.learning_rate=1e-5"]
    run = train(config.load([*common, *arguments, "name=a", "train.steps=1"]))
    trained = {name.partition(".")[2]: tensor for name, tensor in tensors(run).items() if name.startswith("model ")}
    for name, tensor in load_file(folder / WEIGHTS).items():
        assert 0 < (trained[name] - tensor).abs().max() <= 1.1e-5, name


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_of_a_frozen_encoder_are_not_in_the_norm_or_in_an_update(flat: bool, saved: Path) -> None:
    resolved, vae = start(
        saved, "train.freeze=encoder", "ema.decay=0.5", "train.batch_size=4", "train.precision=fp64", "device=cpu"
    )
    vae = vae.double()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    with processes.join(resolved) as world:
        update = update_of(resolved, world, (3, 16, 16), flat=flat, vae=vae)
        pixels = torch.randint(0, 256, (1, 4, 3, 16, 16), dtype=torch.uint8)
        noise = torch.randn(1, 4, 1, vae.latent_dim, dtype=torch.float64)
        update(Batch(pixels, noise, torch.empty(1, 0, dtype=torch.int64)), [update.recipe.values(0)])
    for network in update.recipe.networks.values():
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name


@pytest.mark.slow
def test_two_processes_start_from_a_folder_and_train_as_one(
    common: list[str], fork_server: ForkServer, tmp_path: Path
) -> None:
    folder = save(tmp_path / "vae", in_channels=1, out_channels=1)
    common = [*common, f"model.init_from={folder}", "train.freeze=encoder", "train.precision=fp64", "train.steps=3"]
    losses, weights = [], []
    for count in 1, 2:
        runs = tmp_path / f"runs{count}"
        jobs = tmp_path / f"jobs{count}.json"
        jobs.write_text(json.dumps([("train", "", [*common, f"runs_dir={runs}", "name=a"])]))
        ended = fork_server.launch(count, str(REPOSITORY / "tests/worker.py"), str(jobs), timeout=200)
        assert not any(result.returncode for result in ended), "".join(r.stdout + r.stderr for r in ended)[-4000:]
        losses.append(records(runs / "a", "train/loss"))
        weights.append(tensors(runs / "a"))
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-9)
    for name, value in weights[1].items():
        torch.testing.assert_close(value, weights[0][name], rtol=1e-6, atol=1e-9)


# ---- The export of a run


def test_an_export_is_a_model_of_diffusers_with_the_scaling_of_its_latents(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "secret" / "vae", in_channels=1, out_channels=1, **LAYOUTS["f16"])
    arguments = [f"runs_dir={tmp_path / 'runs'}", f"model.init_from={folder}", "name=a", "train.steps=1"]
    run = train(config.load([*common, *arguments]))
    latents = encode(run, ["encode.split=validation", "train.threads=1"])
    statistics = json.loads((latents / "index.json").read_text())["statistics"]["latents"]
    formats = ["export.formats=[diffusers]", f"export.latents={latents}"]
    exported = export(run, [*formats, f"output={tmp_path / 'out'}"])
    written = json.loads((exported / CONFIG).read_text())
    assert written["scaling_factor"] == 1 / statistics["overall_standard_deviation"]
    assert written["shift_factor"] == statistics["overall_mean"]
    assert written["latents_mean"] is None and written["sample_size"] == 28
    theirs, information = AutoencoderKL.from_pretrained(exported, output_loading_info=True)
    assert not any(information.values())
    images = torch.rand(2, 1, 28, 28)
    for ours in vae_dist.load(run), vae_dist.load(exported):  # the moving average
        with torch.no_grad():
            mean = theirs.encode(2 * images - 1).latent_dist.mode()
            assert torch.equal(ours.encode(images).mean.flatten(1), mean.flatten(1))
    card = (exported / "README.md").read_text()
    assert "AutoencoderKL.from_pretrained(" in card and "- diffusers" in card
    assert not [path for path in exported.iterdir() if b"secret" in path.read_bytes()]
    exported = export(run, [*formats, "export.scaling=channels", f"output={tmp_path / 'out'}"])
    written = json.loads((exported / CONFIG).read_text())
    assert written["latents_std"] == statistics["standard_deviation"] and written["scaling_factor"] == 1
    export(run, ["export.formats=[diffusers]", f"output={tmp_path / 'out'}"])
    assert "config.json has no scaling_factor: `vae-dist encode` computes it" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"index.json is not of this checkpoint's latents: encode images by it first"):
        export(run, [*formats, "weights=raw"])
    with pytest.raises(UserError, match=r"export.latents=.*none has no index.json that can be read: give the folder"):
        export(run, ["export.formats=[diffusers]", f"export.latents={tmp_path / 'none'}"])
    with pytest.raises(UserError, match=r"export.latents is for export.formats=\[diffusers\]"):
        export(run, ["export.formats=[]", f"export.latents={latents}"])
    index = json.loads((latents / "index.json").read_text())
    index["statistics"]["latents"] |= {"overall_standard_deviation": 0.0, "standard_deviation": [-1.0, *4 * [1.0]]}
    (latents / "index.json").write_text(json.dumps(index))
    for scaling in "factor", "channels":
        with pytest.raises(UserError, match="latents without deviation, which no scaling brings to 1"):
            export(run, [*formats, f"export.scaling={scaling}"])
