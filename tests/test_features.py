"""Feature networks: LPIPS and the Inception of FID against other implementations of them, on random weights."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tests.feature_weights import random_tensors
from vae_dist.errors import UserError
from vae_dist.features import files
from vae_dist.features.inception import FIDInception, resized
from vae_dist.features.lpips import LPIPS
from vae_dist.models.tensors import ShapeError

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Images are small: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(LPIPS, seed=0)


@pytest.fixture(scope="module")
def network(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> LPIPS:
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save_file(tensors, path)
    return files.load(LPIPS, path, "evaluate.perceptual").network


def pairs(count: int = 2, height: int = 16, width: int = 24) -> tuple[Tensor, Tensor]:
    drawn = torch.rand(2, count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    first, second = drawn
    return first.requires_grad_(), second.requires_grad_()


def by_the_paper(tensors: Tensors, first: Tensor, second: Tensor) -> Tensor:
    """LPIPS by equation 1 of Zhang et al. 2018, for one pair of images at a time."""
    shift, scale = (
        torch.tensor(colours).view(3, 1, 1) for colours in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    )
    values = []
    for image in (first, second):
        x = (image - shift) / scale
        convolutions = iter(sorted({int(name.split(".")[1]) for name in tensors if name.startswith("vgg")}))
        features: list[Tensor] = []
        for layers in (2, 2, 3, 3, 3):
            if features:
                x = functional.max_pool2d(x.unsqueeze(0), 2).squeeze(0)
            for index in itertools.islice(convolutions, layers):
                weight, bias = (tensors[f"vgg.{index}.{part}"] for part in ("weight", "bias"))
                x = functional.conv2d(x.unsqueeze(0), weight, bias, padding=1).squeeze(0).relu()
            features.append(x / (x.norm(dim=0) + 1e-10))
        values.append(features)
    return sum(
        (
            (tensors[f"heads.{index}"].view(-1, 1, 1) * (one - other) ** 2).sum(0).mean()
            for index, (one, other) in enumerate(zip(*values, strict=True))
        ),
        torch.zeros(()),
    )


def gradients(distance: Callable[[Tensor, Tensor], Tensor], images: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(distance(*images).sum(), images)


def assert_near(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert ((one - other).norm() / other.norm()).item() < tolerance


def test_lpips_is_the_papers(network: LPIPS, tensors: Tensors) -> None:
    images = pairs(1)

    def expected(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([by_the_paper(tensors, one, other) for one, other in zip(first, second, strict=True)])

    values = network(*images)
    assert values.shape == (1,) and values.dtype == torch.float32
    torch.testing.assert_close(values, expected(*images), rtol=1e-6, atol=1e-6)
    assert_near(gradients(network, images), gradients(expected, images), 1e-5)


@pytest.mark.slow
def test_lpips_is_that_of_torchmetrics(network: LPIPS, tensors: Tensors) -> None:
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    oracle = theirs._LPIPS(pretrained=True, net="vgg", pnet_rand=True)  # the published heads
    parameters = dict(oracle.named_parameters())
    starts = (4, 9, 16, 23, 30)  # of their slices of VGG's layers, the first left out
    for name, tensor in tensors.items():
        if name.startswith("vgg."):
            part = next(number for number, start in enumerate(starts, 1) if int(name.split(".")[1]) < start)
            parameters[f"net.slice{part}.{name.removeprefix('vgg.')}"].data.copy_(tensor)
    ours = LPIPS()
    heads = {f"heads.{index}": parameters[f"lin{index}.model.1.weight"].flatten() for index in range(5)}
    ours.load_state_dict(tensors | heads)
    images = pairs()
    torch.testing.assert_close(ours(*images), oracle(*images).flatten(), rtol=1e-6, atol=1e-6)
    assert_near(gradients(ours, images), gradients(oracle, images), 1e-5)


def test_lpips_has_a_gradient_which_its_computation_without_grad_has_not(network: LPIPS) -> None:
    reconstructions, images = pairs()
    assert all(float(gradient.norm()) > 0 for gradient in gradients(network, (reconstructions, images)))

    # The step of diffusers' examples/research_projects/autoencoderkl/train_autoencoderkl.py at 58eb52c, lines 905-912.
    reconstruction_loss = (reconstructions - images).abs().mean()
    with torch.no_grad():
        perceptual_loss = network(reconstructions, images).mean()
    (faulty,) = torch.autograd.grad(reconstruction_loss + 0.5 * perceptual_loss, reconstructions)
    (without,) = torch.autograd.grad((reconstructions - images).abs().mean(), reconstructions)
    assert torch.equal(faulty, without)


def test_equal_images_have_the_distance_0_and_finite_gradients(network: LPIPS) -> None:
    images, _ = pairs()
    distance = network(images, images.detach())
    assert torch.equal(distance, torch.zeros(2))
    assert torch.equal(torch.autograd.grad(distance.sum(), images)[0], torch.zeros_like(images))


def test_features_of_zeros_have_finite_gradients(tensors: Tensors) -> None:
    dark = LPIPS()
    dark.load_state_dict(tensors | {"vgg.0.bias": torch.full((64,), -1e3), "vgg.2.bias": torch.zeros(64)})
    images = pairs()
    feature = torch.full((1, 4), -1.0, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        distance = dark(*images)
        slopes = torch.autograd.grad(distance.sum(), images)
        # The lpips package and most copies of it add the epsilon outside of the root: 0 / 0 in the backward pass.
        length = feature.relu().square().sum(1).sqrt() + 1e-10
        with pytest.warns(UserWarning, match="Error detected"), pytest.raises(RuntimeError, match="nan values"):
            (feature.relu() / length).sum().backward()
    assert torch.equal(distance, torch.zeros(2))
    assert all(torch.equal(slope, torch.zeros_like(slope)) for slope in slopes)


def test_lpips_stays_in_evaluation_mode_and_takes_no_gradient(network: LPIPS) -> None:
    images = pairs()
    before = network(*images)
    owner = torch.nn.ModuleList([network]).train()
    assert owner.training and not any(module.training for module in network.modules())
    assert torch.equal(network.train()(*images), before)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_an_images_distance_does_not_depend_on_the_others(network: LPIPS) -> None:
    first, second = pairs(4)
    alone = [network(one.unsqueeze(0), other.unsqueeze(0)) for one, other in zip(first, second, strict=True)]
    torch.testing.assert_close(network(first, second), torch.cat(alone), rtol=1e-6, atol=0)


def test_autocast_outside_changes_nothing(network: LPIPS) -> None:
    images = pairs()
    with torch.autocast("cpu", torch.bfloat16):
        cast = network(*images)
        slopes = gradients(network, images)
    assert cast.dtype == torch.float32 and torch.equal(cast, network(*images))
    assert all(torch.equal(one, other) for one, other in zip(slopes, gradients(network, images), strict=True))
    low = tuple(image.bfloat16() for image in images)
    assert torch.equal(network(*low), network(*(image.float() for image in low)))


def test_images_of_another_range_are_refused_and_reconstructions_are_not_clamped(network: LPIPS) -> None:
    first, second = (image.detach() for image in pairs())
    for wrong in ((second + 1) * 127.5, 2 * second - 1):  # 8-bit values, and those scaled twice
        with pytest.raises(ShapeError, match=r"images in \[-1, 1\], not with values up to"):
            network(first, wrong)
    beyond = (first * 3).requires_grad_()
    (slope,) = torch.autograd.grad(network(beyond, second).sum(), beyond)
    assert float(slope[beyond.abs() > 1].abs().min()) > 0


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, 1, 32, 32), (2, 1, 32, 32)), ((2, 3, 32, 32), (1, 3, 32, 32)), ((2, 3, 15, 32), (2, 3, 15, 32))],
)
def test_images_of_another_shape_are_refused(first: tuple[int, ...], second: tuple[int, ...], network: LPIPS) -> None:
    with pytest.raises(ShapeError, match="LPIPS"):
        network(torch.zeros(first), torch.zeros(second))
    with pytest.raises(ShapeError, match="floating-point images"):
        network(*torch.zeros((2, 1, 3, 32, 32), dtype=torch.uint8))


def test_lpips_works_in_compiled_code_and_under_functional_gradients(network: LPIPS) -> None:
    reconstructions, images = pairs(1, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(reconstructions, images), network(reconstructions, images))
    weights = dict(network.named_parameters()) | dict(network.named_buffers())

    def loss(reconstructions: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(network, weights, (reconstructions, images)).sum()
        return value

    expected, _ = gradients(network, (reconstructions, images))
    torch.testing.assert_close(torch.func.grad(loss)(reconstructions.detach()), expected)


def test_a_file_that_does_not_fit_is_refused_by_the_tensors_name(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    not_finite = tensors["vgg.5.weight"].clone()
    not_finite.view(-1)[7] = torch.nan
    wrong = {
        "vgg.5.bias is missing": {name: tensor for name, tensor in tensors.items() if name != "vgg.5.bias"},
        "'classifier.0.bias' is not one of its tensors": tensors | {"classifier.0.bias": torch.zeros(3)},
        r"heads.0 is \(1, 64, 1, 1\) float32, not \(64,\) float32": tensors | {"heads.0": torch.ones(1, 64, 1, 1)},
        r"heads.1 is \(128,\) float16, not \(128,\) float32": tensors | {"heads.1": torch.ones(128).half()},
        "vgg.5.weight holds numbers that are not finite": tensors | {"vgg.5.weight": not_finite},
    }
    for problem, content in wrong.items():
        save_file(content, path)
        with pytest.raises(UserError, match=f"^evaluate.perceptual={path} does not hold the weights .*: {problem}; "):
            files.load(LPIPS, path, "evaluate.perceptual")
    with open(path, "ab") as file:
        file.truncate(sum(tensor.nbytes for tensor in tensors.values()) + 2 * files.HEADER_BYTES)
    with pytest.raises(UserError, match=r"can't be read \(Has more than \d+ bytes\)"):
        files.load(LPIPS, path, "evaluate.perceptual")
    torch.save(tensors["heads.0"], path)
    with pytest.raises(UserError, match="is no safetensors file"):
        files.load(LPIPS, path, "evaluate.perceptual")
    path.unlink()
    with pytest.raises(UserError, match=r"can't be read \(No such file or directory\); `vae-dist fetch-weights`"):
        files.load(LPIPS, path, "evaluate.perceptual")


@pytest.mark.slow
def test_the_inception_of_fid_is_torchvisions_with_other_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_tensors(FIDInception, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if name.endswith(("bn.bias", "running_mean")):
            tensor.normal_(std=0.1, generator=generator)
    save_file(weights, tmp_path / "inception.safetensors")
    network = files.load(FIDInception, tmp_path / "inception.safetensors", "key").network.train()
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        features = network(images)

    # Torchvision's own blocks, whose functions are exchanged for those of the graph.
    inception = torchvision.models.inception
    oracle = inception.Inception3(num_classes=1, aux_logits=False, init_weights=False).eval()
    oracle.load_state_dict({name.removeprefix("net."): tensor for name, tensor in weights.items()}, strict=False)
    oracle.fc = torch.nn.Identity()

    def pool(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
        if x.shape[1] == 2048:
            return functional.max_pool2d(x, kernel_size, stride, padding)
        return functional.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    exchanged = SimpleNamespace(avg_pool2d=pool, max_pool2d=functional.max_pool2d, relu=functional.relu)
    monkeypatch.setattr(inception, "F", exchanged)
    torch.testing.assert_close(features, oracle((images.float() - 128) / 128), rtol=1e-5, atol=1e-5)
    assert features.shape == (1, 2048) and features.dtype == torch.float32
    with pytest.raises(ShapeError, match="Inception takes uint8 images"):
        network(images.float())


@pytest.mark.parametrize(("height", "width"), [(32, 40), (400, 320), (299, 299)])
def test_images_are_resized_as_by_tensorflow_1(height: int, width: int) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (3, height, width)).astype(np.float64)
    result = resized(torch.from_numpy(image).float().unsqueeze(0))[0].numpy()
    assert result.shape == (3, 299, 299)
    for row, column in [(0, 0), (298, 298), (0, 298), *random.integers(0, 299, (50, 2)).tolist()]:
        y, x = row * height / 299, column * width / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper = image[:, top, left] * (1 - x + left) + image[:, top, right] * (x - left)
        lower = image[:, bottom, left] * (1 - x + left) + image[:, bottom, right] * (x - left)
        np.testing.assert_allclose(result[:, row, column], upper * (1 - y + top) + lower * (y - top), atol=5e-3)
