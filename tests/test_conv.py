"""The convolutional VAE: its network, and that everything around it works with latents that have a shape."""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from tests import worker
from tests.conftest import REPOSITORY, newest_checkpoint
from tests.forked import ForkServer
from tests.image_folders import numbered, write_images
from vae_dist import config
from vae_dist.config import DataConfig
from vae_dist.data import datasets
from vae_dist.data.datasets import Part
from vae_dist.data.source import InMemory, in_memory
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.blocks import ResidualBlock
from vae_dist.models.conv import ConvVAE
from vae_dist.models.norms import norm_groups
from vae_dist.models.tensors import Shape
from vae_dist.reports.comparison import compare
from vae_dist.reports.report import report
from vae_dist.reports.study import study
from vae_dist.training.loop import train
from vae_dist.views.making import KINDS
from vae_dist.views.sampling import sample

CONV = "model.architecture=conv"
DIGITS = ["data.name=synthetic_digits", "data.synthetic_images=1200", "data.validation_images=200"]  # smoke.yaml's
TINY = [CONV, "model.channels=[4,8,8]"]  # latents (4, 7, 7) of 28 x 28 pixels
WORLD_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in (2, 3)]


@pytest.fixture(scope="module")
def common(smoke_arguments: list[str]) -> list[str]:
    """A small training's arguments: those of the tests without the file, which has the options of another network."""
    return [*smoke_arguments[1:], *DIGITS, "train.batch_size=20", "train.log_every=1"]


def make(shape: Shape, *arguments: str) -> ConvVAE:
    vae = build_vae(config.load([CONV, *arguments]), shape)
    assert isinstance(vae, ConvVAE)
    return vae


def batch(vae: ConvVAE, count: int) -> tuple[Tensor, Tensor]:
    """Images, and noise for two draws of each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, *vae.image_shape, generator=generator, dtype=vae.dtype)
    return images, torch.randn(2, count, vae.latent_dim, generator=generator, dtype=vae.dtype)


SHAPES: list[tuple[Shape, int, Shape]] = [  # of images; patch; of latents, with two halvings
    ((1, 28, 28), 1, (4, 7, 7)),
    ((3, 128, 128), 1, (4, 32, 32)),
    ((2, 4, 12), 1, (4, 1, 3)),
    ((3, 64, 64), 4, (4, 4, 4)),
    ((1, 12, 24), 3, (4, 1, 2)),
]


@pytest.mark.parametrize(("shape", "patch", "latents"), SHAPES)
def test_images_and_latents_have_their_shapes_and_all_weights_take_part(
    shape: Shape, patch: int, latents: Shape
) -> None:
    vae = make(shape, "model.channels=[4,6,8]", f"model.patch={patch}")
    assert vae.latent_shapes(shape) == (latents,)
    assert vae.latent_dim == vae.prior_numbers == math.prod(latents)
    arguments = config.load([CONV, "model.channels=[4,6,8]", f"model.patch={patch}"])
    assert arguments.model.latents(shape) == vae.latent_dim
    assert arguments.model.weights_at_least(shape) <= sum(weight.numel() for weight in vae.parameters())
    images, noise = batch(vae, 3)
    inference = vae(images, noise)
    assert inference.latents.shape == inference.kl.shape == noise.shape
    assert inference.likelihood.mean.shape == (6, *shape)
    (inference.kl.sum() - inference.log_likelihood(images).sum()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_elbo_of_shaped_latents_is_that_of_torchs_distributions() -> None:
    vae = make((3, 8, 12), "model.channels=[4,8]", "model.latent_channels=2").double()
    images, noise = batch(vae, 3)
    mean, raw = vae.encoder(images).split(2, dim=1)  # (3, 2, 4, 6) each: channels of means, then of log-variances
    posterior = Normal(mean, torch.exp(0.5 * 10 * torch.tanh(raw / 10)))
    inference = vae(images, noise)
    torch.testing.assert_close(
        inference.kl.sum(2), kl_divergence(posterior, Normal(0.0, 1.0)).sum((1, 2, 3)).expand(2, 3)
    )
    for number in range(2):
        latents = posterior.mean + posterior.stddev * noise[number].view(3, 2, 4, 6)
        decoded = torch.distributions.Bernoulli(logits=vae.decoder(latents), validate_args=False)
        torch.testing.assert_close(
            inference.log_likelihood(images)[number], decoded.log_prob(images).sum((1, 2, 3))
        )  # of grey pixels, which torch takes as well


def test_codes_are_the_same_for_images_in_any_memory_format() -> None:
    vae = make((3, 16, 16), "model.channels=[4,8]").double()
    images, _ = batch(vae, 3)
    mean = vae.infer(images).mean
    torch.testing.assert_close(vae.infer(images.to(memory_format=torch.channels_last)).mean, mean)
    assert torch.equal(mean.view(3, 4, 8, 8), vae.encoder(images)[:, :4])  # C, H, W order


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 32, 32), (1, 12, 40)])
def test_a_model_takes_images_of_other_sizes(shape: Shape) -> None:
    vae = make((1, 28, 28), "model.channels=[4,8,8]")
    (latents,) = vae.latent_shapes(shape)
    assert latents == (4, shape[1] // 4, shape[2] // 4)
    images = torch.rand(2, *shape)
    inference = vae(images, torch.randn(1, 2, math.prod(latents)))
    assert inference.log_likelihood(images).shape == (1, 2)


def test_images_that_cannot_be_encoded_are_refused_with_what_to_do() -> None:
    message = (
        "images of 30 x 28 can't be encoded: use sizes that 4 divides, fewer model.channels or a smaller model.patch"
    )
    with pytest.raises(UserError, match=f"model.architecture=conv can't be built: {message}"):
        make((1, 30, 28))
    vae = make((1, 28, 28), "model.channels=[4,8,8]")
    with pytest.raises(ValueError, match=message):
        vae.infer(torch.rand(1, 1, 30, 28))
    with pytest.raises(ValueError, match="images for this model have channels=1, not 3"):
        vae.infer(torch.rand(1, 3, 28, 28))


def test_a_training_that_is_refused_makes_no_directory(common: list[str], tmp_path: Path) -> None:
    for compiled in "null", "false":
        options = [CONV, "model.channels=[4,4,4,4]", f"runs_dir={tmp_path / 'runs'}", f"train.compile={compiled}"]
        with pytest.raises(UserError, match="images of 28 x 28 can't be encoded: use sizes that 8 divides"):
            train(config.load([*common, *options]))
        assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("channels", ["[1]", "[7,11]", "[8,16]", "[16,16,16,16,16]"])
@pytest.mark.parametrize("blocks", [1, 4])
def test_a_fresh_model_is_finite_and_starts_near_the_prior(channels: str, blocks: int) -> None:
    vae = make((1, 16, 32), f"model.channels={channels}", f"model.blocks={blocks}")
    _, noise = batch(vae, 4)
    images = torch.cat([torch.rand(2, 1, 16, 32), torch.zeros(1, 1, 16, 32), torch.ones(1, 1, 16, 32)])
    inference = vae(images, noise)
    assert inference.kl.mean() < 0.02  # nats per latent
    assert (inference.likelihood.mean - 0.5).abs().max() < 0.2
    (inference.kl.sum() - inference.log_likelihood(images).sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in vae.parameters())


@pytest.mark.parametrize(
    ("options", "branches", "outputs"),
    [
        (["conv"], {"encoder": 4, "decoder": 4}, r"encoder\.8|decoder\.9"),
        (["resnet", "model.attention=[2]"], {"encoder": 6 + 3, "decoder": 9 + 3}, r"encoder\.13|decoder\.17"),
        (
            ["ladder", "model.levels=[2,3]"], {"encoder": 4, "decoder": 2 + 5},
            r"encoder\.posteriors\.\d\.3|.*log_variance\.2|decoder\.layers\.6\.2",
        ),
    ],
)  # fmt: skip
def test_branches_start_scaled_by_the_root_of_their_number_and_outputs_by_a_tenth(
    options: list[str], branches: dict[str, int], outputs: str
) -> None:
    """By the largest weight: torch draws weights and biases uniformly, up to 1 over the root of a sum's terms."""
    torch.manual_seed(0)
    shared = ["model.channels=[16,32]", "model.blocks=2", "model.latent_channels=8"]
    vae = build_vae(config.load([f"model.architecture={options[0]}", *options[1:], *shared]), (3, 8, 8))
    layers = {name: layer for name, layer in vae.named_modules() if isinstance(layer, nn.Conv2d)}
    added = [name for name in layers if name.endswith(("branch.5", "output"))]
    assert {network: sum(name.startswith(network) for name in added) for network in branches} == branches
    for name, layer in layers.items():
        is_branch = name in added or name.endswith("latents")
        scale = branches[name.partition(".")[0]] ** -0.5 if is_branch else 0.1 if re.fullmatch(outputs, name) else 1
        for parameter, least in (layer.weight, 0.95), (layer.bias, 0):
            if parameter is not None:
                largest = parameter.abs().max().item() * layer.weight[0].numel() ** 0.5
                assert least * scale < largest <= scale * (1 + 1e-6), name


def test_a_residual_block_is_that_of_plain_operations() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(4, 8, scale=1.0, label=3).double()
    x, embedded = torch.randn(2, 4, 5, 6).double(), torch.randn(2, 3).double()
    weights = dict(block.named_parameters())

    def convolved(values: Tensor, name: str, padding: int) -> Tensor:
        return functional.conv2d(values, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    told = (embedded @ weights["label.weight"].T + weights["label.bias"])[:, :, None, None]
    between = convolved(functional.silu(functional.group_norm(x, 1)), "branch.2", 1) + told
    branch = convolved(functional.silu(functional.group_norm(between, 2)), "branch.5", 1)
    torch.testing.assert_close(block(x, embedded), convolved(x, "shortcut", 0) + branch)


@given(st.integers(1, 600))
def test_any_number_of_channels_has_groups(channels: int) -> None:
    groups = norm_groups(channels)
    assert channels % groups == 0 and 1 <= groups <= 8
    assert groups == 1 or channels // groups >= 4
    assert not [more for more in range(groups + 1, 9) if channels % more == 0 and channels // more >= 4]


def test_bf16_is_off_by_rounding() -> None:
    vae = make((1, 28, 28))
    images, noise = batch(vae, 4)
    exact = vae(images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vae(images, noise)
    assert rounded.likelihood.log_prob(images.repeat(2, 1, 1, 1)).dtype == rounded.kl.dtype == torch.float32
    torch.testing.assert_close(rounded.log_likelihood(images), exact.log_likelihood(images), rtol=2e-3, atol=0)
    torch.testing.assert_close(rounded.kl.sum(2), exact.kl.sum(2), rtol=0.05, atol=0.05)


# ---- Through the whole package

EVALUATED = {
    "validation": ["evaluate.split=validation", "evaluate.importance_samples=7"],
    "test": ["evaluate.importance_samples=5", "evaluate.chunk=100"],  # of 5 samples 2 at a time
}
SAMPLED = {
    "prior": ["sample.count=5"],
    "mixture": ["sample.sampler=mixture", "sample.count=5", "sample.mixture_components=2"],
    "neighbours": ["sample.kind=neighbours", "sample.images=[3]", "sample.rows=2", "sample.steps=2"],
    "interpolation": ["sample.kind=interpolation", "sample.images=[0,1]"],
    "traversal": ["sample.kind=traversal", "sample.rows=3"],
    "manifold": ["sample.kind=manifold", "sample.steps=3"],
    "reconstruction": ["sample.kind=reconstruction", "sample.images=[0,1]", "sample.steps=2"],
    "levels": ["sample.kind=levels", "sample.images=[0,1]"],
    "scatter": ["sample.kind=scatter"],
}
STOPPED = ["train.steps=6", "checkpoint.every=3", "ema.decay=0.9", "optim.max_grad_norm=1"]


PRECISIONS = ["fp32", "bf16"]


Jobs = list[tuple[str, str, list[str]]]


def stopped_jobs(root: Path, common: list[str]) -> Jobs:
    common = [*common, *TINY, f"runs_dir={root / 'runs'}"]
    return [
        ("train", "", [*common, f"name={precision}_{name}", f"train.precision={precision}", *STOPPED, *more])
        for precision in PRECISIONS
        for name, more in (("straight", []), ("parts", ["train.steps=3"]), ("parts", []))
    ]


def other_jobs(root: Path, reference: Path, common: list[str]) -> Jobs:
    """Those that compare numbers of processes."""
    common = [*common, *TINY, f"runs_dir={root / 'runs'}"]
    reading = [f"output={root / 'out'}", "evaluate.batch_size=48", "train.threads=1"]
    return [
        ("train", "", [*common, "name=fp64", "train.precision=fp64", "train.steps=4"]),
        *[("evaluate", str(reference), [*reading, *arguments]) for arguments in EVALUATED.values()],
        *[("sample", str(reference), [*reading, *SAMPLED[kind]]) for kind in ("prior", "mixture", "interpolation")],
    ]


@pytest.fixture(scope="module")
def roots(
    tmp_path_factory: pytest.TempPathFactory, common: list[str], fork_server: ForkServer
) -> Callable[[int], Path]:
    """The folder of so many processes, with what their jobs wrote."""
    base = tmp_path_factory.mktemp("worlds")
    reference = base / "1/runs/fp32_straight"
    made: dict[int, Path] = {}

    def root_of(world_size: int) -> Path:
        if world_size in made:
            return made[world_size]
        root = base / str(world_size)
        root.mkdir()
        if world_size == 1:
            worker.main(stopped_jobs(root, common))
            return made.setdefault(1, root)
        if made.keys() == {1}:
            worker.main(other_jobs(made[1], reference, common))
        made[world_size] = root
        listed = [*stopped_jobs(root, common), *other_jobs(root, reference, common)]
        (root / "jobs.json").write_text(json.dumps(listed))
        command = str(REPOSITORY / "tests/worker.py"), str(root / "jobs.json")
        ended = fork_server.launch(world_size, *command, timeout=200)
        assert not any(result.returncode for result in ended), "".join(r.stdout + r.stderr for r in ended)[-4000:]
        return root

    root_of(1)  # the others read its checkpoint
    return root_of


def records(run_dir: Path, metric: str) -> dict[int, float]:
    """A metric's values by step."""
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[metric] for record in written if metric in record}


def tensors(run_dir: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint, by file and name."""
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    files = sorted(folder.glob("*.safetensors"))
    return {f"{path.stem} {name}": value for path in files for name, value in load_file(path).items()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_processes_train_as_one_but_for_rounding(world_size: int, roots: Callable[[int], Path]) -> None:
    ours, theirs = (roots(size) / "runs/fp64" for size in (world_size, 1))
    for metric in ("train/loss", "train/kl", "train/grad_norm", "validation/negative_elbo"):
        values = records(theirs, metric)
        assert values and records(ours, metric) == pytest.approx(values, rel=1e-9)
    weights = tensors(theirs)
    for name, value in tensors(ours).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", [1, *WORLD_SIZES])
def test_a_stopped_run_continues_to_the_same_bits(
    world_size: int, precision: str, roots: Callable[[int], Path]
) -> None:
    runs = roots(world_size) / "runs"
    straight, parts = tensors(runs / f"{precision}_straight"), tensors(runs / f"{precision}_parts")
    assert {name.split()[0] for name in straight} == {"model", "ema", "optimizer"}
    assert straight.keys() == parts.keys()
    assert all(torch.equal(straight[name], parts[name]) for name in straight)
    for metric in ("train/loss", "validation/negative_elbo"):  # the part that was stopped has validated once more
        values = records(runs / f"{precision}_straight", metric)
        assert values and values.items() <= records(runs / f"{precision}_parts", metric).items()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_evaluation_and_samples_are_the_same_bits_on_any_number_of_processes(
    world_size: int, roots: Callable[[int], Path]
) -> None:
    ours, theirs = roots(world_size) / "out", roots(1) / "out"
    evaluations = sorted(path.relative_to(theirs) for path in theirs.rglob("*.json"))
    assert len(evaluations) >= len(EVALUATED)
    for path in evaluations:
        values = [json.loads((folder / path).read_text()) for folder in (ours, theirs)]
        assert values[0]["latents"] == 4 * 7 * 7 and values[0]["importance_samples"] in (5, 7)
        assert [value["negative_log_likelihood"] for value in values] == [values[1]["negative_log_likelihood"]] * 2
        for name in ("kl_per_latent", "constant_grid", "constant_border"):
            assert values[0][name] == values[1][name]
    samples = sorted(path.relative_to(theirs) for path in theirs.rglob("samples.safetensors"))
    assert len(samples) == 3
    for path in samples:
        assert (ours / path).read_bytes() == (theirs / path).read_bytes()


@contextmanager
def colours(size: int) -> Iterator[list[str]]:
    """Small sets of smooth colour images of `size` x `size` pixels; gives the arguments that name them."""

    def draw(config: DataConfig, part: Part) -> InMemory:
        generator = torch.Generator().manual_seed(len(part))
        coarse = torch.rand(24, 3, 4, 4, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").mul(255).to(torch.uint8)
        return in_memory("colours", pixels, torch.arange(24) % 10, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(datasets.DATASETS, "colours", draw)
        yield ["data.name=colours", "data.validation_images=4", "train.batch_size=8"]


@contextmanager
def nothing_else() -> Iterator[list[str]]:
    """The digits of the small training."""
    yield []


@contextmanager
def pictures() -> Iterator[list[str]]:
    """A folder of small colour images."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_images(Path(folder) / "holidays", numbered(40))
        data = ["data.name=folder", f"data.path={path}", f"data.root={folder}", "data.size=16", "data.flip=true"]
        yield [*data, "data.validation_images=null", "train.batch_size=8"]


OWN_IMAGES = [
    CONV, "model.patch=4", "model.channels=[8,16]", "objective.reconstruction=gaussian", "objective.sigma_kind=learned",
    "ema.decay=0.9",
]  # fmt: skip

# Latents, the images that have them, and the options of the network.
LATENTS: dict[tuple[int, ...], tuple[Callable[[], Any], list[str]]] = {
    (4, 7, 7): (nothing_else, TINY),
    (4, 2, 2): (pictures, OWN_IMAGES),
    (4, 32, 32): (lambda: colours(64), [CONV, "model.channels=[4,8]", "objective.reconstruction=gaussian"]),
}


@pytest.mark.parametrize(
    "latents",
    [pytest.param((4, 7, 7), marks=pytest.mark.slow), (4, 2, 2), pytest.param((4, 32, 32), marks=pytest.mark.slow)],
)
def test_every_command_takes_latents_with_a_shape(latents: Shape, common: list[str], tmp_path: Path) -> None:
    data, options = LATENTS[latents]
    with data() as named:
        common = [*common, *options, *named, f"runs_dir={tmp_path / 'runs'}", "train.steps=2"]
        common += ["evaluate.importance_samples=3"]
        run = train(config.load([*common, "name=run"]))
        other = train(config.load([*common, "name=other", "objective.beta=2"]))
        vae_latents = math.prod(latents)
        measured = evaluate(run, ["train.threads=1"])
        assert measured["latents"] == len(measured["kl_per_latent"]) == vae_latents
        assert measured["negative_log_likelihood"] <= measured["negative_elbo"] + 1
        codes = ["sample.kind=codes", f"sample.codes={[[0.0] * vae_latents]}"]
        for kind, arguments in {**SAMPLED, "codes": codes}.items():
            folder = sample(run, ["train.threads=1", *arguments])
            stored = load_file(folder / "samples.safetensors")
            assert stored["latents"].shape[1:] == (vae_latents,), kind
            assert all(value.isfinite().all() for value in stored.values()), kind
        assert {*SAMPLED, "codes"} == KINDS.keys() | {"mixture"}
        assert "run" in (compare([run, other], ["output=" + str(tmp_path / "compared")]) / "table.md").read_text()
        page = report(run).read_text()
        assert page.count("<svg")
        assert ("of holidays" in page) == (data is pictures)  # own images are named by their folder


@pytest.mark.slow
def test_a_study_varies_an_option_of_the_network(common: list[str], tmp_path: Path) -> None:
    arguments = [*common, *TINY, f"runs_dir={tmp_path}", "train.steps=2", "evaluate.importance_samples=2"]
    folder = study(config.load_study([*arguments, "model.latent_channels=1,2", "name=study"]))
    assert [run["evaluation"]["latents"] for run in json.loads((folder / "comparison.json").read_text())["runs"]] == [
        49,
        98,
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")
def test_a_compiled_step_trains_as_an_uncompiled_one(
    common: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = [*common, *TINY, f"runs_dir={tmp_path}", "train.steps=4"]
    for compiled in ("false", "true"):
        train(config.load([*common, f"name={compiled}", f"train.compile={compiled}", "train.precision=fp64"]))
    assert "can't be compiled" not in caplog.text
    assert records(tmp_path / "true", "train/loss") == pytest.approx(
        records(tmp_path / "false", "train/loss"), rel=1e-9
    )
