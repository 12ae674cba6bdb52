import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tests.conftest import MakeConfig, opened
from tests.sources import whole
from vae_dist import config
from vae_dist.config import DataConfig
from vae_dist.data import datasets
from vae_dist.data.chosen import of_split
from vae_dist.data.datasets import Part
from vae_dist.data.source import InMemory, in_memory
from vae_dist.distributed import processes
from vae_dist.errors import UserError
from vae_dist.models.posteriors import Posterior
from vae_dist.models.tensors import to_unit
from vae_dist.plan import FIXED_SEED, Stream, standard_normal
from vae_dist.reports.report import report
from vae_dist.terminal import console, progress
from vae_dist.training.loop import train
from vae_dist.views import latents, pictures
from vae_dist.views.components import principal_components
from vae_dist.views.latents import TrainedVAE
from vae_dist.views.making import KINDS
from vae_dist.views.sampling import sample


@pytest.fixture(scope="module")
def run_dir(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight latents, trained until some of them are active."""
    folder = tmp_path_factory.mktemp("runs")
    return train(config.load([*smoke_arguments, f"runs_dir={folder}", "name=eight", "train.steps=100"]))


@pytest.fixture(scope="module")
def flat_run(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(config.load([*smoke_arguments, f"runs_dir={folder}", "model.latent_dim=2", "name=two"]))


def tensors(run: Path, *arguments: str) -> dict[str, Tensor]:
    return load_file(sample(run, ["train.threads=1", *arguments]) / "samples.safetensors")


def picture(folder: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The one picture of a folder: rows, columns and, in colour, channels."""
    (path,) = [*folder.glob("grid.png"), *folder.glob("scatter.png")]
    with Image.open(path) as image:
        return np.asarray(image)


def posterior_of(run: Path) -> Posterior:
    """The posteriors of the test images, all at once."""
    source = opened(run)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))
    return vae.infer(to_unit(whole(datasets.load_test(source.config.data)).pixels))


EVERY_KIND = {
    "prior": ["sample.count=5"],
    "mixture": ["sample.sampler=mixture", "sample.count=5", "sample.mixture_components=3"],
    "codes": ["sample.codes=[[0,0,0,0,0,0,0,0],[1,1,1,1,1,1,1,1]]"],
    "neighbours": ["sample.kind=neighbours", "sample.images=[3]"],
    "interpolation": ["sample.kind=interpolation"],
    "traversal": ["sample.kind=traversal"],
    "manifold": ["sample.kind=manifold", "sample.steps=4"],
    "reconstruction": ["sample.kind=reconstruction"],
    "levels": ["sample.kind=levels"],
    "scatter": ["sample.kind=scatter"],
}


def test_every_kind_is_tested_here() -> None:
    assert EVERY_KIND.keys() == KINDS.keys() | {"mixture"}


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_kind_writes_a_picture_and_tensors_the_same_bytes_twice(name: str, run_dir: Path, tmp_path: Path) -> None:
    arguments = ["train.threads=1", *EVERY_KIND[name]]
    folders = [sample(run_dir, [*arguments, f"output={tmp_path / side}"]) for side in ("a", "b")]
    is_scatter = name == "scatter"
    assert {path.name for path in folders[0].iterdir()} == {
        "scatter.png" if is_scatter else "grid.png", "samples.safetensors"
    }  # fmt: skip
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name
    stored = load_file(folders[0] / "samples.safetensors")
    assert stored["latents"].shape[1:] == (8,)
    if not is_scatter:
        assert stored["images"].shape == (len(stored["latents"]), 1, 28, 28)
        assert stored["images"].min() >= 0 and stored["images"].max() <= 1
    with Image.open(tmp_path / f"a/images/sample_{name}_step_00000100.png") as logged:
        height, width = logged.height, logged.width  # the file of the view has its caption below
        assert np.array_equal(np.asarray(logged), picture(folders[0])[:height, :width])


def draw_colours(config: DataConfig, part: Part) -> InMemory:
    """Colour images, wider than they are high, without labels."""
    pixels = torch.randint(0, 256, (200, 3, 6, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return in_memory("colours", pixels, None, "colours")


@pytest.fixture
def colour_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(datasets.DATASETS, "colours", draw_colours)
    settings = "data.name=colours", "data.validation_images=20", "data.binarize=dynamic", "train.precision=fp64"
    return train(make_config("name=colour", "train.steps=3", *settings))


def test_every_kind_takes_colour_images_that_are_not_square_in_float64(colour_run: Path) -> None:
    for name, arguments in EVERY_KIND.items():
        folder = sample(colour_run, ["train.threads=1", *arguments])
        view = load_file(folder / "samples.safetensors")
        assert name == "scatter" or view["images"].shape[1:] == (3, 6, 14)
        assert not {"labels", "test_labels"} & view.keys()  # it has none
        assert picture(folder).shape[2] == 3


@pytest.mark.parametrize("sampler", ["prior", "mixture"])
def test_samples_come_from_the_seed_and_more_begin_with_the_same(sampler: str, run_dir: Path) -> None:
    def draw(*arguments: str) -> dict[str, Tensor]:
        return tensors(run_dir, f"sample.sampler={sampler}", *arguments)

    one, many, other = draw("sample.count=1"), draw("sample.count=1001"), draw("sample.count=1", "sample.seed=1")
    assert len(one["images"]) == len(one["latents"]) == 1
    assert len(many["images"]) == len(many["latents"]) == 1001
    assert torch.equal(many["latents"][:1], one["latents"])
    torch.testing.assert_close(many["images"][:1], one["images"])
    assert not torch.equal(other["latents"], one["latents"])


def test_the_mixture_is_fitted_to_the_training_images_alone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: DataConfig) -> InMemory:
        raise AssertionError("the test images were loaded")

    monkeypatch.setattr(datasets, "load_test", refuse)
    view = tensors(run_dir, "sample.sampler=mixture", "sample.mixture_components=1", "sample.count=4000")
    source = opened(run_dir)
    vae = source.checkpoint.load_vae(source.config, torch.device("cpu"))
    training, _ = datasets.load_training(source.config.data)
    posterior = vae.infer(to_unit(whole(training).pixels))
    # Of one Gaussian the mean and the covariance are known: those of the posteriors' own mixture.
    mean = posterior.mean.double().mean(0)
    covariance = posterior.mean.double().T.cov() + posterior.log_variance.exp().double().mean(0).diag()
    error = 5 / training.info.count**0.5
    torch.testing.assert_close(view["mixture.means"][0], mean, rtol=0, atol=error)
    torch.testing.assert_close(view["mixture.covariances"][0], covariance, rtol=0, atol=2 * error)
    torch.testing.assert_close(view["latents"].double().mean(0), mean, rtol=0, atol=2 * error)


def test_every_training_image_has_one_reproducible_draw(run_dir: Path) -> None:
    source = opened(run_dir, ["evaluate.batch_size=64"])
    with processes.join(source.config) as world:
        trained = TrainedVAE(source.checkpoint.load_vae(source.config, world.device), source.config, world)
        draws = trained.training_draws()
        assert torch.equal(trained.training_draws(), draws)
    assert draws.shape == (1000, 8)


def test_an_interpolation_ends_exactly_at_the_codes_of_its_images(run_dir: Path) -> None:
    chosen = list(range(40))  # enough to include an end that is off by one bit
    between = tensors(run_dir, "sample.kind=interpolation", f"sample.images={chosen}", "sample.steps=3")
    ends = tensors(run_dir, "sample.kind=reconstruction", f"sample.images={chosen}", "sample.steps=2")
    assert between["test_indices"].tolist() == chosen
    for side, end in (0, 0), (1, -1):
        ours, theirs = between["latents"].view(20, 3, 8)[:, end], ends["latents"].view(20, 2, 3, 8)[:, side, 0]
        assert torch.equal(ours, theirs)
        ours, theirs = between["images"].view(20, 3, 784)[:, end], ends["images"].view(20, 2, 3, 784)[:, side, 0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # they were decoded in chunks of another size


def test_an_interpolation_is_a_straight_line_in_even_steps(run_dir: Path) -> None:
    latents = tensors(run_dir, "sample.kind=interpolation", "sample.images=[5,9]", "sample.steps=11")["latents"]
    expected = np.linspace(latents[0].numpy(), latents[-1].numpy(), 11)
    np.testing.assert_allclose(latents.numpy(), expected, atol=1e-6)


def test_reconstructions_decode_the_posteriors_mean_and_draws(run_dir: Path) -> None:
    view = tensors(run_dir, "sample.kind=reconstruction", "sample.images=[4,1]", "sample.steps=500")
    posterior = posterior_of(run_dir)
    latents = view["latents"].view(2, 501, 8)
    torch.testing.assert_close(latents[:, 0], posterior.mean[[4, 1]])
    standardised = (latents[:, 1:] - latents[:, :1]) / torch.exp(0.5 * posterior.log_variance[[4, 1]]).unsqueeze(1)
    assert (standardised.mean(1).abs() < 5 / 500**0.5).all()
    assert ((standardised.std(1) - 1).abs() < 5 / 1000**0.5).all()
    alone = tensors(run_dir, "sample.kind=reconstruction", "sample.images=[1]", "sample.steps=2")["latents"]
    torch.testing.assert_close(alone, latents[1, :3])  # an image's draws do not depend on the other images


def test_a_traversal_moves_one_latent_a_row_in_the_order_of_their_kl(run_dir: Path) -> None:
    view = tensors(run_dir, "sample.kind=traversal", "sample.images=[7]", "sample.rows=5", "sample.steps=7")
    posterior = posterior_of(run_dir)
    oracle = kl_divergence(Normal(posterior.mean, torch.exp(0.5 * posterior.log_variance)), Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(view["kl"].float(), oracle.sort(descending=True).values[:5])
    assert oracle.max() > 2 * oracle.min()  # so the order is not arbitrary
    for row, latent in zip(view["latents"].view(5, 7, 8), view["order"].tolist(), strict=True):
        torch.testing.assert_close(row[:, latent], torch.linspace(-3, 3, 7))
        others = [index for index in range(8) if index != latent]
        torch.testing.assert_close(row[:, others], posterior.mean[7:8, others].expand(7, -1))


def test_a_traversal_starts_from_zero_or_from_a_given_code(run_dir: Path) -> None:
    zero = tensors(run_dir, "sample.kind=traversal")
    assert zero["latents"].shape == (8 * 13, 8)
    assert ((zero["latents"] != 0).sum(1) <= 1).all()
    ones = tensors(run_dir, "sample.kind=traversal", "sample.codes=[[1,1,1,1,1,1,1,1]]")
    assert ((ones["latents"] != 1).sum(1) <= 1).all()


@pytest.mark.parametrize("start", ["sample.codes=[[1,-1,0,0,2,0,0,0]]", "sample.images=[7]", None])
def test_neighbours_lie_at_exactly_the_stated_distances(start: str | None, run_dir: Path) -> None:
    settings = ["sample.kind=neighbours", "sample.radius=0.6", "sample.rows=3", "sample.steps=4"]
    view = tensors(run_dir, *settings, *([start] if start else []))
    codes = {"sample.codes=[[1,-1,0,0,2,0,0,0]]": torch.tensor([1.0, -1, 0, 0, 2, 0, 0, 0]), None: torch.zeros(8)}
    code = codes[start] if start in codes else posterior_of(run_dir).mean[7]
    assert view["distances"].tolist() == pytest.approx([0.2, 0.4, 0.6])
    offsets = (view["latents"] - code).double().view(3, 4, 8)
    expected = view["distances"].view(3, 1).expand(3, 4)
    torch.testing.assert_close(offsets.norm(dim=2), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(offsets[1], 2 * offsets[0], rtol=0, atol=4e-6)  # a column is one direction
    default = tensors(run_dir, "sample.kind=neighbours")
    assert default["latents"].double().norm(dim=1).max().item() == pytest.approx(math.sqrt(8) / 2)


def test_the_manifold_is_the_inverse_cdf_of_an_even_grid(flat_run: Path) -> None:
    view = tensors(flat_run, "sample.kind=manifold", "sample.steps=9")
    quantiles = (torch.arange(9) + 0.5) / 9
    expected = Normal(0.0, 1.0).icdf(quantiles)
    latents = view["latents"].view(9, 9, 2)
    for index in range(9):
        torch.testing.assert_close(latents[index, :, 0], expected)  # to the right
        torch.testing.assert_close(latents[:, index, 1], expected.flip(0))  # upwards
    assert view["axes"].tolist() == [0, 1]


def test_the_manifold_of_many_latents_shows_the_two_of_largest_kl(run_dir: Path) -> None:
    view = tensors(run_dir, "sample.kind=manifold", "sample.steps=4")
    order = tensors(run_dir, "sample.kind=traversal")["order"][:2]
    assert torch.equal(view["axes"], order)
    moved = (view["latents"] != 0).any(0).nonzero().flatten()
    assert torch.equal(moved, order.sort().values)


def test_the_scatter_shows_the_posterior_means_of_all_test_images(flat_run: Path, run_dir: Path) -> None:
    for run in flat_run, run_dir:
        view = tensors(run, "sample.kind=scatter")
        torch.testing.assert_close(view["latents"], posterior_of(run).mean)
        assert torch.equal(view["labels"], whole(datasets.load_test(opened(run).config.data)).labels)
    expected = principal_components(view["latents"], 2)
    torch.testing.assert_close(view["points"], expected.coordinates)  # this process may have more threads
    torch.testing.assert_close(view["variance_shares"], expected.variance_ratios)


def test_principal_components_are_those_of_numpys_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 6, generator=generator) * torch.tensor([3.0, 1, 2, 0.5, 1.5, 0.1]) + 7
    components = principal_components(points, 3)
    centred = points.double().numpy() - points.double().numpy().mean(0)
    _, spreads, directions = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign((components.directions.numpy() * directions[:3]).sum(1, keepdims=True))
    np.testing.assert_allclose(components.directions, signs * directions[:3], atol=1e-12)
    np.testing.assert_allclose(components.coordinates, centred @ (signs * directions[:3]).T, atol=1e-10)
    np.testing.assert_allclose(components.variance_ratios, (spreads**2 / (spreads**2).sum())[:3])
    assert components.directions.gather(1, components.directions.abs().argmax(1, keepdim=True)).min() > 0


REFUSALS = {
    "sample.kind=spiral": "unknown sample.kind 'spiral'; choose from prior, codes, neighbours",
    "sample.kind=codes": "sample.codes has codes of no numbers, but this model has 8 latents",
    "sample.kind=neighbours sample.codes=[[0,0]]": "codes of 2 numbers, but this model has 8 latents",
    "sample.codes=[[0,0,0,0,0,0,0,nan]]": "must be a finite number",
    "sample.kind=traversal sample.codes=[[0,0,0,0,0,0,0,0],[1,0,0,0,0,0,0,0]]": "starts from one code",
    "sample.kind=neighbours sample.images=[1,2]": "starts from one test image, but sample.images has 2",
    "sample.kind=neighbours sample.images=[1] sample.codes=[[0,0,0,0,0,0,0,0]]": "not both",
    "sample.kind=reconstruction sample.images=[0,200]": "sample.images has 200, but the 200 test images are 0 to 199",
    "sample.kind=reconstruction sample.images=[]": "sample.images is empty",
    "sample.kind=reconstruction sample.images=[-1]": "must be at least 0",
    "sample.kind=interpolation sample.images=[1,2,3]": "interpolation needs pairs of test images, not 3",
    "sample.kind=interpolation sample.steps=1": "must be at least 2",
    "sample.kind=scatter sample.count=10": "sample.count does not apply to sample.kind=scatter; it is for prior",
    "sample.images=[1,2]": "sample.images does not apply to sample.kind=prior; it is for neighbours, interpolation",
    "sample.sampler=mixture sample.mixture_components=1001": "is more than the 1000 training images",
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_an_invalid_request_is_refused_in_one_line_and_writes_nothing(
    arguments: str, run_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r".") as refusal:
        sample(run_dir, [*arguments.split(), f"output={tmp_path / 'out'}"])
    assert REFUSALS[arguments] in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["manifold", "scatter"])
def test_one_latent_has_no_plane(kind: str, make_config: MakeConfig) -> None:
    line = train(make_config("name=line", "model.latent_dim=1", "train.steps=2"))
    with pytest.raises(UserError, match="this model has 1 latent; use"):
        sample(line, [f"sample.kind={kind}"])
    assert tensors(line, "sample.kind=traversal")["latents"].shape == (13, 1)


def test_options_of_the_training_for_another_kind_are_ignored(make_config: MakeConfig) -> None:
    run = train(make_config("name=a", "train.steps=2", "sample.count=3", "sample.rows=2"))
    assert len(tensors(run)["images"]) == 3
    assert len(tensors(run, "sample.kind=interpolation")["images"]) == 50


def test_single_images_are_those_of_the_last_command(flat_run: Path) -> None:
    codes = "[[0,0],[0,1],[1,1],[-1,-1],[-0.9,-0.9],[-0.5,-0.5]]"
    for count, arguments in (6, [f"sample.codes={codes}"]), (1, ["sample.codes=[[0.5,0.5]]"]):
        folder = sample(flat_run, [*arguments, "sample.files=true"])
        assert sorted(path.name for path in folder.glob("0*.png")) == [f"{index:06d}.png" for index in range(count)]
    view = load_file(folder / "samples.safetensors")
    assert view["latents"].tolist() == [[0.5, 0.5]]
    with Image.open(folder / "000000.png") as single:
        assert np.array_equal(np.asarray(single), np.asarray(pictures.grid(view["images"], 1)))


def test_a_grid_shows_1024_images_at_most(run_dir: Path) -> None:
    folder = sample(run_dir, ["sample.count=1025"])
    assert len(load_file(folder / "samples.safetensors")["images"]) == 1025
    assert picture(folder).shape[1] == 32 * (28 + pictures.PADDING)  # 32 x 32 of them


class Process(NamedTuple):
    rank: int
    size: int = 2

    def should_log(self, text: str) -> bool:
        return True


def test_only_the_main_process_shows_the_progress_of_long_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(is_main: bool) -> str:
        console.start(Process(rank=0 if is_main else 1))
        with progress.progress("decoding", 2000, is_main=is_main) as advance:
            advance(500)
            advance(1000)
        return capsys.readouterr().err

    assert work(is_main=True) == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    assert work(is_main=True) == "decoding: 25%, 0:00 left\ndecoding: 75%, 0:00 left\n"
    assert work(is_main=False) == ""


@pytest.mark.parametrize(("steps", "left"), [(60, "0:59"), (3600, "59:59"), (3601, "1:00:00"), (100_001, "27:46:40")])
def test_the_time_that_is_left_has_hours_if_it_is_longer_than_one(
    steps: int, left: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    training = progress.TrainingProgress(is_main=True, start=0, last_step=steps, steps_per_epoch=10)
    now = 1.0  # for the first step
    with caplog.at_level("INFO", "vae_dist.progress"):
        training.show(1, {"train/loss": 1.0})
    assert caplog.messages[0].endswith(f", {left} left")


def test_the_time_left_of_long_work_is_that_of_its_remaining_parts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with caplog.at_level("INFO", "vae_dist.progress"), progress.progress("decoding", 100, is_main=True) as advance:
        now = 20.0
        advance(20)
        now = 25.0  # less than LINE_SECONDS later
        advance(5)
        now = 60.0
        advance(50)
    assert caplog.messages == ["decoding: 20%, 1:20 left", "decoding: 75%, 0:20 left"]


def test_a_line_tells_the_epoch_the_loss_and_the_time_since_the_resume(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65 steps are six epochs of ten steps and half of a seventh. The last step always has a line."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    training = progress.TrainingProgress(is_main=True, start=30, last_step=65, steps_per_epoch=10)
    with caplog.at_level("INFO", "vae_dist.progress"):
        for seconds, step, loss in (5.0, 35, 123.456), (12.0, 42, 0.5), (20.0, 50, 0.01234), (21.0, 65, -12.0):
            now = seconds
            training.show(step, {"train/loss": loss, "train/images_per_second": 1234.0})
        progress.TrainingProgress(is_main=True, start=0, last_step=20, steps_per_epoch=10).show(20, {"train/loss": 1.0})
    assert caplog.messages[3].startswith("epoch 2/2, step 20/20, loss 1, ")
    assert caplog.messages[:3] == [
        "epoch 4/7, step 35/65, loss 123.46, 1,234 images/s, 0:30 left",
        "epoch 6/7, step 50/65, loss 0.01234, 1,234 images/s, 0:15 left",
        "epoch 7/7, step 65/65, loss -12.00, 1,234 images/s, 0:00 left",
    ]


@pytest.mark.parametrize("kind", [[], ["sample.codes=[[0,0,0,0,0,0,0,0],[1,1,1,1,1,1,1,1]]"]])
def test_pixels_are_drawn_from_the_likelihood_of_the_same_latents(kind: list[str], run_dir: Path) -> None:
    means = tensors(run_dir, *kind)
    draws, again, other = (tensors(run_dir, *kind, "sample.pixels=draw", seed) for seed in SEEDS)
    assert torch.equal(draws["images"], again["images"]) and draws["images"].unique().tolist() == [0, 1]
    assert torch.equal(draws["latents"], means["latents"]) and not torch.equal(draws["images"], other["images"])
    # The number of white pixels is a sum of independent ones: its error has a known size.
    excess = (draws["images"] - means["images"]).flatten(1).sum(1)
    deviation = (means["images"] * (1 - means["images"])).flatten(1).sum(1).sqrt()
    assert (excess.abs() < 5 * deviation).all()


SEEDS = "sample.seed=0", "sample.seed=0", "sample.seed=1"


def test_drawn_reconstructions_belong_to_their_test_image(run_dir: Path) -> None:
    drawn = ["sample.kind=reconstruction", "sample.pixels=draw", "sample.steps=3"]
    two, one = tensors(run_dir, *drawn, "sample.images=[4,1]"), tensors(run_dir, *drawn, "sample.images=[1]")
    assert two["images"].unique().tolist() == [0, 1]
    assert (two["images"].view(2, 4, 784)[1] == one["images"].view(4, 784)).float().mean() > 0.999  # but for rounding


def test_draws_have_a_folder_of_their_own_and_lie_within_black_and_white(colour_run: Path) -> None:
    arguments = ["train.threads=1", "sample.count=3"]
    means, draws = sample(colour_run, arguments), sample(colour_run, [*arguments, "sample.pixels=draw"])
    assert means.name == "step_00000003_prior_seed_0" and draws.name == "step_00000003_prior_draw_seed_0"
    assert load_file(draws / "samples.safetensors")["images"].unique().tolist() == [0, 1]


def test_draws_of_some_training_images_are_of_their_own_binarisation(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model every n-th image is encoded: its random numbers belong to its index."""
    run = opened(train(make_config("name=a", "data.binarize=dynamic", "train.steps=1")))
    monkeypatch.setattr(latents, "EXACT_LATENTS", 4)
    monkeypatch.setattr(latents, "MIXTURE_NUMBERS", 8 * 334)  # so that every third image is taken
    with processes.join(run.config) as world:
        vae = run.checkpoint.load_vae(run.config, world.device)
        draws = TrainedVAE(vae, run.config, world).training_draws()
        pixels = whole(of_split(run.config.data, "train", "")).pixels[::3]
        noise = standard_normal(FIXED_SEED, Stream.MIXTURE_POINTS, 0, range(len(pixels)), 8)
        torch.testing.assert_close(draws, vae.infer(vae.to_input(pixels)).sample(noise))
    assert len(draws) == 334


@pytest.mark.parametrize("view", ["sample.kind=scatter", "sample.sampler=mixture"])
def test_a_diverged_model_is_named(view: str, make_config: MakeConfig) -> None:
    run = train(make_config("name=a", "optim.learning_rate=1e20", "train.steps=1"))
    log = (run / "log.txt").read_text()
    assert "step 1: validation/negative_elbo is nan: the model has diverged" in log
    with pytest.raises(UserError, match=r"are not finite: .* take an earlier checkpoint if the model has diverged"):
        sample(run, [view])


def test_a_report_of_a_diverged_model_has_no_images_on_its_plane(make_config: MakeConfig) -> None:
    path = report(train(make_config("name=a", "optim.learning_rate=1e20", "train.steps=1")))
    assert "take an earlier checkpoint if the model has diverged" in path.read_text()
