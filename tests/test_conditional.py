"""Label-conditional VAEs, p(x|y): what labels do to a model, a step, an evaluation and a view."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from tests.conftest import MakeConfig, opened, update_of
from tests.sources import Mapped, of_pixels, unlabelled, whole
from tests.test_compiled import needs_a_compiler
from vae_dist import config as configs
from vae_dist.config import Config, DataConfig
from vae_dist.data import datasets
from vae_dist.data.batches import Batch, Batches
from vae_dist.data.classes import class_names, with_classes
from vae_dist.data.source import InMemory, Source, in_memory, read
from vae_dist.distributed import processes
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.evaluation.metrics import negative_log_likelihood
from vae_dist.models import build_vae
from vae_dist.models.inputs import read_inputs
from vae_dist.models.labels import LabelEmbedding
from vae_dist.models.tensors import ShapeError, to_unit
from vae_dist.models.vae import VAE
from vae_dist.objectives import elbo
from vae_dist.plan import FIXED_SEED, Plan, Stream, standard_normal
from vae_dist.reports.reconstructions import reconstructions
from vae_dist.reports.report import report
from vae_dist.training.loop import train
from vae_dist.views import pictures
from vae_dist.views.making import KINDS
from vae_dist.views.sampling import sample

CPU = torch.device("cpu")
CONDITIONAL = "model.conditional=true"
TEN = "data.classes=[zero,one,two,three,four,five,six,seven,eight,nine]"
SMALL = {
    "mlp": ["model.hidden_dims=[16]", "model.latent_dim=3"],
    "conv": ["model.architecture=conv", "model.channels=[8,8]", "model.latent_channels=2"],
    "ladder": ["model.architecture=ladder", "model.channels=[4,8]", "model.levels=[1,1]", "model.latent_channels=1"],
    "resnet": ["model.architecture=resnet", "model.channels=[4,8]", "model.blocks=1", "model.attention=[2]"],
}


def model(name: str, *arguments: str, shape: Sequence[int] = (1, 8, 8)) -> VAE:
    """A conditional model of ten classes, in float64."""
    return build_vae(configs.load([CONDITIONAL, TEN, *SMALL[name], *arguments]), shape).double()


def inputs(vae: VAE, count: int = 6, draws: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    images, noise = torch.rand(count, *vae.image_shape).double(), torch.randn(draws, count, vae.latent_dim).double()
    return images, noise, torch.arange(count) * 3 % 10


@pytest.fixture(scope="module")
def run_dir(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional run of the embedded digits, whose classes have names, until its samples are digits."""
    folder = tmp_path_factory.mktemp("runs")
    more = [f"runs_dir={folder}", "name=named", CONDITIONAL, TEN, "train.steps=300", "optim.learning_rate=0.003"]
    return train(configs.load([*smoke_arguments, *more]))


# ---- The model


def test_an_embedding_is_a_lookup_with_its_gradient() -> None:
    torch.manual_seed(0)
    embedding, labels = LabelEmbedding(7), torch.tensor([3, 0, 3, 6])
    expected = F.embedding(labels, embedding.weight)
    torch.testing.assert_close(embedding(labels), expected)
    cotangent = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(embedding(labels), embedding.weight, cotangent)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, embedding.weight, cotangent)[0])
    between = embedding(torch.tensor([[0.25, 0, 0, 0.75, 0, 0, 0]]))
    torch.testing.assert_close(between[0], 0.25 * embedding.weight[0] + 0.75 * embedding.weight[3])


@pytest.mark.parametrize("name", SMALL)
def test_labels_change_the_posterior_and_the_decoded_image(name: str) -> None:
    vae = model(name)
    images, noise, labels = inputs(vae)
    posterior, other = vae.infer(images, labels), vae.infer(images, (labels + 1) % 10)
    assert ((posterior.mean - other.mean).abs().amax(1) > 1e-4).all()
    decoded, other_decoded = (vae.decode(noise[0], labels=given).mean for given in (labels, (labels + 1) % 10))
    assert ((decoded - other_decoded).abs().flatten(1).amax(1) > 1e-4).all()


@pytest.mark.parametrize("name", SMALL)
def test_every_draw_of_an_image_is_decoded_with_its_label(name: str) -> None:
    """The oracle: one image, one draw, one label at a time."""
    vae = model(name)
    images, noise, labels = inputs(vae)
    inference = vae(images, noise, labels)
    means = inference.likelihood.mean.unflatten(0, noise.shape[:2])
    for index in range(len(images)):
        one = slice(index, index + 1)
        for draw in range(len(noise)):
            single = vae(images[one], noise[draw : draw + 1, one], labels[one])
            torch.testing.assert_close(means[draw, one], single.likelihood.mean)
            torch.testing.assert_close(inference.kl[draw, one], single.kl[0])


@pytest.mark.parametrize("name", SMALL)
def test_a_model_without_classes_has_no_weights_of_labels_and_ignores_an_empty_tensor(name: str) -> None:
    vae = build_vae(configs.load([TEN, CONDITIONAL, *SMALL[name], "data.classes=null", "model.conditional=false"]),
                    (1, 8, 8)).double()  # fmt: skip
    assert not [key for key in vae.state_dict() if "label" in key or "embedding" in key]
    images, noise, _ = inputs(vae)
    empty = torch.empty(0, dtype=torch.int64)
    assert torch.equal(vae(images, noise, empty).likelihood.mean, vae(images, noise).likelihood.mean)


ERRORS: dict[str, tuple[Callable[[VAE, Tensor, Tensor, Tensor], object], str]] = {
    "no labels": (lambda vae, x, noise, y: vae(x, noise), "it needs the labels of its 6 images"),
    "no labels to decode": (lambda vae, x, noise, y: vae.decode(noise[0]), "it needs the labels of its 6 images"),
    "empty": (lambda vae, x, noise, y: vae.infer(x, y[:0]), r"labels must have the shape \(6,\), not \(0,\)"),
    "one for all": (lambda vae, x, noise, y: vae.infer(x, y[:1]), r"labels must have the shape \(6,\), not \(1,\)"),
    "a column": (lambda vae, x, noise, y: vae.infer(x, y[:, None]), r"labels must have the shape \(6,\), not \(6, 1\)"),
    "too large": (lambda vae, x, noise, y: vae.infer(x, y + 5), "labels must be 0 to 9 for this model, not 5 to 14"),
    "negative": (lambda vae, x, noise, y: vae.infer(x, y - 1), "labels must be 0 to 9 for this model, not -1 to 8"),
    "not int64": (lambda vae, x, noise, y: vae.infer(x, y.int()), r"labels must be torch.int64, not torch.int32"),
    "weights of other classes": (
        lambda vae, x, noise, y: vae.decode(noise[0], labels=torch.rand(6, 9)),
        r"weights of the classes must have the shape \(6, 10\), not \(6, 9\)",
    ),
    "other images": (
        lambda vae, x, noise, y: vae.sample(vae.infer(x, y), noise, labels=y[:5]),
        r"labels must have the shape \(18,\), not \(15,\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_labels_that_do_not_fit_raise_one_message(name: str) -> None:
    vae = model("mlp")
    call, expected = ERRORS[name]
    with pytest.raises(ShapeError, match=expected):
        call(vae, *inputs(vae))


def test_a_model_without_classes_refuses_labels() -> None:
    vae = build_vae(configs.load(SMALL["mlp"]), (1, 8, 8)).double()
    images, _, labels = inputs(vae)
    with pytest.raises(ShapeError, match=r"not conditional, but was given labels \(6,\)"):
        vae.infer(images, labels)


# ---- A step


def step_of(*arguments: str, flat: bool = False, config: Config) -> list[Tensor]:
    """The weights after three steps on batches of 12."""
    with processes.join(config) as world:
        update = update_of(config, world, (1, 8, 8), flat=flat)
        update(batches_of_three(), [update.recipe.values(step) for step in range(3)])
        return [tensor.detach().clone() for tensor in update.recipe.model.state_dict().values()]


def batches_of_three() -> Batch:
    torch.manual_seed(2)
    pixels = torch.randint(0, 256, (3, 12, 1, 8, 8), dtype=torch.uint8)
    return Batch(pixels, torch.randn(3, 12, 2, 3).double(), torch.randint(0, 10, (3, 12)))


STEPS = [CONDITIONAL, TEN, *SMALL["mlp"], "objective.samples=2", "train.precision=fp64", "train.batch_size=12"]


@pytest.mark.parametrize(
    ("more", "flat"),
    [
        ("train.accumulate=1", False),
        ("train.accumulate=5", False),
        ("train.accumulate=3", True),
        pytest.param("train.compile=true", False, marks=[needs_a_compiler, pytest.mark.slow]),
        pytest.param("train.compile=true", True, marks=[needs_a_compiler, pytest.mark.slow]),
    ],
)
def test_steps_are_those_of_a_plain_loop(more: str, flat: bool, make_config: MakeConfig) -> None:
    """The oracle: torch's Adam on the mean loss of single images with their labels."""
    config = make_config(*STEPS, more)
    vae = build_vae(config, (1, 8, 8)).double()
    adam = torch.optim.Adam(vae.parameters(), config.optim.learning_rate, eps=config.optim.eps)
    for pixels, noise, labels in zip(*batches_of_three(), strict=True):
        losses = []
        for image, draws, label in zip(vae.to_input(pixels), noise, labels, strict=True):
            one = image.unsqueeze(0)
            inference = vae(one, draws.unsqueeze(1), label.unsqueeze(0))
            losses.append(elbo(inference, one, torch.tensor(1.0))["loss"])
        adam.zero_grad()
        torch.cat(losses).mean().backward()
        adam.step()
    torch.testing.assert_close(step_of(more, flat=flat, config=config), list(vae.state_dict().values()))


def coded(config: DataConfig, part: datasets.Part) -> InMemory:
    """Images whose first pixel is twenty times their label."""
    labels = torch.randperm(400 if part == "train" else 90, generator=torch.Generator().manual_seed(3)) % 10
    pixels = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = (labels * 20).to(torch.uint8)
    return in_memory("synthetic_digits", pixels, labels, f"coded, {part}")


@pytest.mark.parametrize("is_mapped", [False, True])
def test_labels_of_shuffled_batches_and_of_parts_belong_to_their_images(
    is_mapped: bool, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(datasets.DATASETS, "synthetic_digits", coded)
    config = make_config(CONDITIONAL, TEN, *SMALL["mlp"], "data.validation_images=70")
    parts: list[Source] = [*datasets.load_training(config.data), datasets.load_test(config.data)]
    if is_mapped:
        parts = [Mapped(part, tmp_path) for part in parts]
    with processes.join(config) as world:
        for number in range(3):
            world.rank, world.size = number, 3
            pixels, _, labels = Batches(parts[0], Plan(5, 330, 50), config, world, (3,))(range(9))
            assert labels.shape == (9, 16 + (number > 0)) and torch.equal(pixels[:, :, 0, 0, 0].long(), labels * 20)
        world.rank, world.size = 0, 1
    vae = model("mlp")
    for part in parts:
        images, read_labels = read_inputs(vae, part, [5, 60, 2])
        assert read_labels is not None
        torch.testing.assert_close(images[:, 0, 0, 0] * 255, read_labels * 20.0, check_dtype=False)


def test_a_label_that_is_no_class_is_found_before_the_first_step(make_config: MakeConfig) -> None:
    config = make_config(CONDITIONAL, TEN)
    good = coded(config.data, "train")
    bad = replace(good, info=replace(good.info, classes=9))
    with processes.join(config) as world, pytest.raises(ValueError, match="has labels that are not 0 to its number"):
        Batches(bad, Plan(5, 400, 50), config, world, (3,))


# ---- A run


def test_samples_of_a_class_are_images_of_this_class(run_dir: Path) -> None:
    """The oracle: the nearest of the classes' mean training images."""
    folder = sample(run_dir, ["sample.count=500", "train.threads=1"])
    drawn = load_file(folder / "samples.safetensors")
    assert torch.equal(drawn["labels"], torch.arange(500) % 10)
    training = whole(datasets.load_training_set(opened(run_dir).config.data))
    images = to_unit(training.pixels).flatten(1)
    means = torch.stack([images[training.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(drawn["images"].flatten(1), means).argmin(1)
    assert (nearest == drawn["labels"]).double().mean() > 0.9


def test_importance_weights_are_of_x_given_y(run_dir: Path) -> None:
    """The oracle: one image and one sample at a time, in float64."""
    source = opened(run_dir, ["evaluate.importance_samples=9", "evaluate.chunk=20"])
    test = datasets.load_test(source.config.data)
    vae = source.checkpoint.load_vae(source.config, CPU).double()
    pixels, labels = read(test, range(5)), whole(test).labels[:5]
    expected = []
    for index, image in enumerate(to_unit(pixels, torch.float64)):
        label = labels[index : index + 1]
        embedded = vae.embedding(label) if vae.embedding is not None else torch.empty(0)
        posterior = vae.infer(image.unsqueeze(0), label)
        q, weights = Normal(posterior.mean, (0.5 * posterior.log_variance).exp()), []
        for number in range(9):
            noise = standard_normal(FIXED_SEED, Stream.IMPORTANCE, number, range(index, index + 1), vae.latent_dim)
            latents = q.mean + q.stddev * noise
            log_prob = Bernoulli(None, vae.decoder(latents, embedded)[0], False).log_prob(image).sum()
            weights.append((log_prob + (Normal(0.0, 1.0).log_prob(latents) - q.log_prob(latents)).sum()).item())
        expected.append(-np.logaddexp.reduce(weights) + np.log(9))
    few = in_memory("few", pixels, labels, "none")
    with processes.join(source.config) as world:
        estimate = negative_log_likelihood(vae.float(), few, world, source.config)
    np.testing.assert_allclose(estimate.numpy(), expected, rtol=0, atol=1e-4)


def test_an_evaluation_says_that_labels_are_given(run_dir: Path, tmp_path: Path) -> None:
    result = evaluate(run_dir, ["evaluate.importance_samples=2", f"output={tmp_path}"])
    assert result["protocol"]["conditional"] is True and not result["comparable"]
    assert "p(x|y), not of p(x)" in result["warning"] and "not binary" in result["warning"]


def test_a_run_states_its_classes(make_config: MakeConfig) -> None:
    run = train(make_config(CONDITIONAL, "name=numbered", "train.steps=2"))
    assert opened(run).config.data.classes == [str(label) for label in range(10)]
    resumed = train(make_config(CONDITIONAL, "name=numbered", "train.steps=3"))
    assert opened(resumed).step == 3


EVERY_KIND = {
    "prior": ["sample.count=23"],
    "codes": ["sample.codes=[[0,0,0,0,0,0,0,0],[1,1,1,1,1,1,1,1]]", "sample.labels=[three,8]"],
    "neighbours": ["sample.images=[3]"],
    "interpolation": [],
    "traversal": ["sample.labels=[2]"],
    "manifold": ["sample.steps=4"],
    "reconstruction": ["sample.pixels=draw"],
    "levels": ["sample.images=[3,7]"],
    "scatter": [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_decodes_every_code_as_the_class_that_it_states(kind: str, run_dir: Path, tmp_path: Path) -> None:
    folder = sample(run_dir, [f"sample.kind={kind}", "train.threads=1", f"output={tmp_path}", *EVERY_KIND[kind]])
    stored = load_file(folder / "samples.safetensors")
    source = opened(run_dir)
    vae = source.checkpoint.load_vae(source.config, CPU)
    if kind == "scatter":
        inputs = read_inputs(vae, datasets.load_test(source.config.data), range(200))
        torch.testing.assert_close(stored["latents"], vae.infer(*inputs).mean, rtol=0, atol=1e-4)
        return
    labels = stored["class_weights"] if kind == "interpolation" else stored["labels"]
    expected = {
        "prior": lambda: torch.arange(23) % 10,
        "codes": lambda: torch.tensor([3, 8]),
        "neighbours": lambda: stored["test_labels"].expand(50),
        "traversal": lambda: torch.full((104,), 2),
        "manifold": lambda: torch.zeros(16, dtype=torch.int64),
        "levels": lambda: stored["test_labels"],
        "reconstruction": lambda: stored["test_labels"].repeat_interleave(9),
    }
    if kind in expected:
        assert torch.equal(labels, expected[kind]())
    if kind != "reconstruction":  # its pixels are drawn
        torch.testing.assert_close(stored["images"], vae.decode(stored["latents"], labels=labels).mean)


def test_an_interpolation_ends_at_the_reconstructions_of_both_images(run_dir: Path) -> None:
    folder = sample(run_dir, ["sample.kind=interpolation", "sample.images=[0,1,2,3]", "train.threads=1"])
    stored = load_file(folder / "samples.safetensors")
    source = opened(run_dir)
    vae = source.checkpoint.load_vae(source.config, CPU)
    images, labels = read_inputs(vae, datasets.load_test(source.config.data), range(4))
    expected = vae.decode(vae.infer(images, labels).mean, labels=labels).mean
    torch.testing.assert_close(stored["images"][[0, 9, 10, 19]], expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sample.labels=[eleven]"], "sample.labels has eleven, but the 10 classes are zero, one, two"),
        (["sample.labels=[10]"], "sample.labels has 10, but the 10 classes are"),
        (["sample.labels=[]"], "sample.labels must name at least one class"),
        (["sample.kind=traversal", "sample.labels=[1,2]"], "traversal shows one class, but sample.labels has 2"),
        (["sample.kind=reconstruction", "sample.labels=[1]"], "sample.labels does not apply to sample.kind=reconstr"),
        (["sample.codes=[[0,0,0,0,0,0,0,0]]", "sample.labels=[1,2]"], "sample.labels has 2 classes for 1 codes"),
        (["sample.sampler=mixture"], "sample.sampler=mixture is for models that are not conditional"),
    ],
)
def test_classes_that_can_t_be_drawn_are_refused(arguments: list[str], expected: str, run_dir: Path) -> None:
    with pytest.raises(UserError) as refused:
        sample(run_dir, arguments)
    assert expected in str(refused.value)


def many_classes(config: DataConfig, part: datasets.Part) -> InMemory:
    source = coded(config, part)
    return replace(source, info=replace(source.info, classes=1001))


@pytest.mark.parametrize(
    ("arguments", "load", "expected"),
    [
        ([], unlabelled(coded), "a conditional model needs labels, but the images of synthetic_digits have none"),
        ([], many_classes, "takes at most 1,000 classes, but the images of synthetic_digits have 1,001"),
        (
            ["data.classes=[a,b]"],
            coded,
            "data.classes is a, b (2 in all), but the classes of synthetic_digits are 0, 1",
        ),
    ],
)
def test_images_without_fitting_labels_are_refused(
    arguments: list[str],
    load: Callable[[DataConfig, datasets.Part], InMemory],
    expected: str,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(datasets.DATASETS, "synthetic_digits", load)
    with pytest.raises(UserError) as refused:
        train(make_config(CONDITIONAL, "name=refused", *arguments))
    assert expected in str(refused.value)


def test_a_run_is_not_resumed_with_other_classes(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [CONDITIONAL, "name=resumed", "data.validation_images=50", *SMALL["mlp"], "train.steps=1"]

    def named(names: Sequence[str], config: DataConfig, part: datasets.Part) -> InMemory:
        source = coded(config, part)
        return replace(source, info=replace(source.info, class_names=tuple(names)))

    monkeypatch.setitem(datasets.DATASETS, "synthetic_digits", partial(named, "abcdefghij"))
    assert opened(train(make_config(*arguments))).config.data.classes == list("abcdefghij")
    monkeypatch.setitem(datasets.DATASETS, "synthetic_digits", partial(named, "abcdefghik"))
    with pytest.raises(UserError, match=r"the classes of synthetic_digits are a, b.*put back the images"):
        train(make_config(*arguments, "train.steps=2"))


@pytest.mark.parametrize(
    "name", ["???", "${seed}", "a${b", "no", "1e5", "~", "null", "[z]", "x, y", "- a", "a: b", "#1"]
)
def test_a_name_of_a_class_is_read_from_a_runs_config_or_refused_when_the_run_starts(name: str, tmp_path: Path) -> None:
    info = replace(coded(DataConfig(), "test").info, classes=2, class_names=(name, "other"))
    if name in ("???", "${seed}", "a${b"):
        with pytest.raises(UserError, match=r"can't be the name of a class.*rename its folder"):
            class_names(info, None)
        return
    config = configs.load([CONDITIONAL])
    named = replace(config, data=replace(config.data, classes=class_names(info, None)))
    configs.save(named, tmp_path / "config.yaml")
    assert configs.read(tmp_path / "config.yaml").data.classes == [name, "other"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.classes=[a]"], "data.classes is for a conditional model"),
        (
            ["sample.labels=[1]"],
            "sample.labels is for a conditional model, which is trained with model.conditional=true",
        ),
        ([CONDITIONAL, "data.classes=[]"], "data.classes must name at least one class"),
        ([CONDITIONAL, "data.classes=[a,b,a]"], "data.classes has the same name twice"),
    ],
)
def test_options_of_classes_that_do_not_fit_are_refused(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as refused:
        configs.load(arguments)
    assert expected in str(refused.value)


def test_images_of_other_classes_are_not_evaluated() -> None:
    source = coded(DataConfig(), "test")
    ten = [str(label) for label in range(10)]
    assert with_classes(source, ten) is source
    for other in {"classes": 11}, {"class_names": tuple("abcdefghij")}:
        with pytest.raises(UserError, match="this model has the classes 0, 1"):
            with_classes(replace(source, info=replace(source.info, **other)), ten)
    vae = model("mlp")
    with pytest.raises(UserError, match="this model is conditional and needs labels"):
        read_inputs(vae, of_pixels(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)), [0])
    labelled = in_memory("more", torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 10, 2]), "more")
    with pytest.raises(UserError, match="the images of more do not fit the model: labels must be 0 to 9"):
        read_inputs(vae, labelled, [0, 1])


def test_classes_of_a_folder_to_evaluate_on_are_matched_by_name() -> None:
    labels, pixels = torch.tensor([1, 0, 1]), torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1)
    source = in_memory("pets", pixels, labels, "pets")
    source = replace(source, info=replace(source.info, class_names=("cat", "dog")))
    matched = with_classes(source, ["ant", "dog", "bee", "cat"])
    assert matched.info.classes == 4 and torch.equal(whole(matched).labels, torch.tensor([1, 3, 1]))
    assert torch.equal(whole(matched).pixels, pixels) and matched.info.identity != source.info.identity


# ---- Pictures and reports


def test_a_grid_by_class_has_a_row_for_each_class() -> None:
    images = torch.linspace(0, 1, 7).view(7, 1, 1, 1).expand(7, 1, 28, 28)
    picture = np.asarray(pictures.grid_by_class(images, ["a", "b", "c"]))
    side = 4 * 28 + pictures.PADDING
    left = picture.shape[1] - 3 * side - pictures.PADDING
    cells = [[int(picture[row * side + 9, left + column * side + 9]) for column in range(3)] for row in range(3)]
    grey = [round(255 * index / 6) for index in range(7)]
    assert cells == [[grey[0], grey[3], grey[6]], [grey[1], grey[4], 255], [grey[2], grey[5], 255]]
    many = images.repeat(5, 1, 1, 1)
    assert pictures.grid_by_class(many, [str(name) for name in range(35)]).height < 7 * side  # not in 35 rows
    alone = pictures.grid_by_class(images, ["a"])  # nor 7 images of one class in one row
    assert 3 * side < alone.height < 4 * side and 3 * side < alone.width < 4 * side


def test_pictures_of_a_validation_are_by_class(run_dir: Path) -> None:
    with Image.open(run_dir / "images/samples_step_00000300.png") as image:
        assert image.height > 10 * (2 * 28 + pictures.PADDING) and "samples by class" in image.info["Description"]


def test_a_report_states_the_class_of_its_plane(run_dir: Path) -> None:
    page = report(run_dir, []).read_text()
    assert "they decode to, as class zero." in page and "given one of 10 classes" in page
    assert "Samples by class from the prior (means of p(x|z,y)), from" in page and "p(x|z))" not in page


def test_runs_with_and_without_labels_are_compared(run_dir: Path, smoke_arguments: list[str], tmp_path: Path) -> None:
    plain = train(configs.load([*smoke_arguments, f"runs_dir={tmp_path}", "name=plain", "train.steps=2"]))
    assert configs.differing([opened(run).config for run in (run_dir, plain)])[0] == "model.conditional"
    picture = reconstructions([opened(run) for run in (run_dir, plain)], CPU)
    assert picture.image.height > 3 * 56
