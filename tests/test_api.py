"""The Python API: a trained VAE as an object, against the commands and the model itself."""

import doctest
import gc
import logging
import math
import os
import random
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from accelerate import Accelerator
from accelerate.state import PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import vae_dist
from tests.conftest import REPOSITORY, opened
from vae_dist import UserError, api
from vae_dist.api import codes, fitting, images, loading, records, trained_model
from vae_dist.api import run as run_module
from vae_dist.data import datasets
from vae_dist.data.source import read
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, standard_normal
from vae_dist.training.update import Update
from vae_dist.views.sampling import sample

Runs = dict[str, Path]
DEVICE = torch.device("cpu")

KINDS = {  # of runs, with what they change
    "grey": ["model.latent_dim=2", "ema.decay=0.9"],
    "binary": ["data.binarize=dynamic"],
    "cut": ["data.binarize=threshold"],
    "conv": ["model.architecture=conv", "model.channels=[4,8]", "model.latent_channels=1"],
    "conditional": ["model.conditional=true"],
}


@pytest.fixture(scope="module")
def runs(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A short training of each kind, made by `fit` from a folder of their own."""
    folder = tmp_path_factory.mktemp("api")
    common = [f"runs_dir={folder / 'runs'}", "train.steps=6", "train.validate_every=3", "train.log_every=3"]
    mlp, conv = smoke_arguments, ["data.name=synthetic_digits", "data.synthetic_images=1200", *smoke_arguments[1:]]
    return {
        name: vae_dist.fit(*(conv if name == "conv" else mlp), *common, f"name={name}", *options).directory
        for name, options in KINDS.items()
    }


@pytest.fixture(scope="module")
def test_images(runs: Runs) -> Tensor:
    """Grey test images `(12, 1, 28, 28)`, uint8."""
    return read(datasets.load_test(opened(runs["grey"]).config.data), range(12))


def model_of(path: Path) -> VAE:
    run = opened(path)
    return run.checkpoint.load_vae(run.config, DEVICE)


def test_fit_trains_resumes_and_returns_the_run(
    smoke_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*smoke_arguments, f"runs_dir={tmp_path}", "name=mine", "model.latent_dim=3"]
    first = vae_dist.fit(*arguments, "train.steps=4")
    longer = vae_dist.fit(*arguments, "train.steps=6")
    assert (first.step, longer.step, longer.directory) == (4, 6, tmp_path / "mine")
    assert "resuming after step 4 of 6" in capsys.readouterr().err
    same = vae_dist.load(tmp_path / "mine")
    assert all(map(torch.equal, longer.model.parameters(), same.model.parameters()))
    assert repr(same) == f"<Run '{tmp_path}/mine', step 6: mlp on synthetic_digits, 3 latents, on cpu>"
    with pytest.raises(UserError, match="unknown key"):
        vae_dist.fit("model.latents=3")


def test_fit_leaves_nothing_of_the_training_in_memory(
    smoke_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and moments may fill a GPU, and Python collects what is in reference cycles when it likes."""
    trained: list[weakref.ref[Any]] = []
    restore = Update.restore

    def noted(made: Update, *given: Any) -> Any:
        trained.extend(map(weakref.ref, (made, made.recipe, *made.recipe.tensors)))
        return restore(made, *given)

    monkeypatch.setattr(Update, "restore", noted)
    gc.disable()
    try:
        for steps in 2, 4:
            vae_dist.fit(*smoke_arguments, f"runs_dir={tmp_path}", "name=mine", f"train.steps={steps}", "ema.decay=0.9")
        assert trained and not any(reference() is not None for reference in trained)
    finally:
        gc.enable()


def test_load_takes_what_the_commands_take(runs: Runs) -> None:
    run = vae_dist.load(runs["grey"])
    assert run.config.name == "grey" and run.step == 6
    raw = vae_dist.load(str(runs["grey"]), "weights=raw")
    assert not torch.equal(next(raw.model.parameters()), next(run.model.parameters()))
    assert vae_dist.load(runs["grey"] / "best").step in (3, 6)
    assert vae_dist.load(run.checkpoint).step == 6
    for arguments, message in {
        ("model.latent_dim=3",): "model.latent_dim belongs to the training",
        ("device=cpu",): r"load\(..., device=...\)",
    }.items():
        with pytest.raises(UserError, match=message):
            vae_dist.load(runs["grey"], *arguments)
    with pytest.raises(UserError, match="there is no run at nowhere"):
        vae_dist.load("nowhere")


@pytest.mark.parametrize(
    ("device", "message"),
    {
        "gpu": "unknown device 'gpu'",
        "": "unknown device ''",
        "cuda": "device=cuda can't be used on this machine",
        "cuda:99": "device=cuda.* can't be used",
        "mps": "device=mps can't be used on this machine",
    }.items(),
)
def test_a_device_that_can_not_be_used_is_refused_before_a_training(
    runs: Runs, tmp_path: Path, device: str, message: str
) -> None:
    if {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device):
        pytest.skip(f"this machine has {device}")
    with pytest.raises(UserError, match=message):
        vae_dist.load(runs["grey"], device=device)
    with pytest.raises(UserError, match=message):
        vae_dist.fit(f"runs_dir={tmp_path}", "name=none", device=device)
    assert not any(tmp_path.iterdir())


def test_encode_decode_and_reconstruct_are_the_networks(runs: Runs, test_images: Tensor) -> None:
    for name in ("grey", "conv"):
        vae, run = model_of(runs[name]), vae_dist.load(runs[name])
        with torch.no_grad():
            posterior = vae.infer(test_images.float() / 255)
            decoded = vae.decode(posterior.mean).mean
        found = run.encode(test_images)
        torch.testing.assert_close(found.mean, posterior.mean, rtol=0, atol=0)
        torch.testing.assert_close(found.log_variance, posterior.log_variance, rtol=0, atol=0)
        torch.testing.assert_close(run.decode(found.mean), decoded, rtol=0, atol=0)
        torch.testing.assert_close(run.reconstruct(test_images), decoded, rtol=0, atol=0)
        assert not found.mean.is_inference() and not run.sample(2).is_inference() and not run.prior(2).is_inference()


def test_a_long_batch_is_computed_in_chunks(runs: Runs, test_images: Tensor) -> None:
    chunked = vae_dist.load(runs["grey"], "evaluate.batch_size=5")
    whole = vae_dist.load(runs["grey"], "evaluate.batch_size=500")
    for method, argument in (("encode", test_images), ("reconstruct", test_images), ("log_likelihood", test_images)):
        ours, theirs = getattr(chunked, method)(argument), getattr(whole, method)(argument)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def forms(image: Tensor) -> dict[str, Any]:
    """One grey image `(1, 28, 28)`, uint8, in all ways that a caller may have it."""
    array = image[0].numpy()
    picture = Image.fromarray(array)
    return {
        "tensor (1, H, W)": image,
        "tensor (H, W)": image[0],
        "tensor (1, 1, H, W)": image[None],
        "array (H, W)": array,
        "array (H, W, 1)": array[:, :, None],
        "array (1, H, W, 1)": array[None, :, :, None],
        "read-only array": np.frombuffer(array.tobytes(), np.uint8).reshape(28, 28),
        "flipped view": np.flip(np.ascontiguousarray(np.flip(array))),
        "big-endian floats": (array.astype(">f4") / 255),
        "floats": image.float() / 255,
        "float64 array": array.astype(np.float64) / 255,
        "PIL": picture,
        "PIL colour": picture.convert("RGB"),
        "PIL with alpha": picture.convert("RGBA"),
        "list of PIL": [picture],
        "list of arrays": [array],
        "needs a gradient": (image.float() / 255).requires_grad_(),
    }


@pytest.mark.parametrize("form", forms(torch.zeros(1, 28, 28, dtype=torch.uint8)))
def test_images_in_every_form_have_the_same_code(runs: Runs, test_images: Tensor, form: str) -> None:
    run = vae_dist.load(runs["grey"])
    image = forms(test_images[3])[form]
    torch.testing.assert_close(run.encode(image).mean, run.encode(test_images[3:4]).mean, rtol=1e-5, atol=1e-6)


def test_an_image_file_is_read_as_a_training_reads_it(runs: Runs, test_images: Tensor, tmp_path: Path) -> None:
    run = vae_dist.load(runs["grey"])
    Image.fromarray(test_images[0, 0].numpy()).save(tmp_path / "digit.png")
    Image.new("RGB", (90, 40), "red").save(tmp_path / "wide.png")  # cropped and resized
    assert run.reconstruct([str(tmp_path / "digit.png"), tmp_path / "wide.png"]).shape == (2, 1, 28, 28)
    assert torch.equal(run.encode(tmp_path / "digit.png").mean, run.encode(test_images[0]).mean)


def test_a_convolutional_model_takes_other_sizes_and_shaped_latents(runs: Runs) -> None:
    run = vae_dist.load(runs["conv"])
    wide = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    codes = run.encode(wide).mean
    assert codes.shape == (2, 16 * 24)
    assert torch.equal(run.decode(codes, size=(32, 48)), run.reconstruct(wide))
    assert torch.equal(run.decode(codes.view(2, 1, 16, 24), size=(32, 48)), run.reconstruct(wide))
    assert run.decode(torch.zeros(1, 14, 14)).shape == run.decode(torch.zeros(196)).shape == (1, 1, 28, 28)


BAD_IMAGES = {
    "floats must be from 0 to 1, and these are from 0 to 255: divide": torch.tensor([0.0, 255.0]).expand(28, 14, 2),
    "from -1 to 1: use": torch.linspace(-1, 1, 784).view(28, 28),
    "^the images have numbers that are not finite$": torch.full((28, 28), math.nan),
    "numbers that are not finite$": torch.full((28, 28), math.inf),
    "not torch.int64": torch.zeros(28, 28, dtype=torch.int64),
    "such as .1, 28, 28.,? not .2, 3, 28, 28": torch.zeros(2, 3, 28, 28),
    r"images of \[1, 28, 28\] alone, not \[1, 30, 28\]": torch.zeros(30, 28),
    "there are no images": [],
    "different sizes, .28, 28., .30, 30": [torch.zeros(28, 28), torch.zeros(30, 30)],
    "there is no image file nothing.png": "nothing.png",
    "can't use int as an image": 3,
    "images can't have the type <U1": np.array(["a"]),
    "images can't have the type (float|longdouble)": np.zeros((28, 28), np.longdouble),
    r"^images of \(2, 0, 28\) have no pixels": torch.zeros(2, 0, 28),
    r"^images of \(1, 0, 0\) have no pixels": Image.new("L", (0, 0)),
    "mode F has no fixed range": Image.new("F", (28, 28)),
    "not .28,": torch.zeros(28),
}


@pytest.mark.parametrize("message", BAD_IMAGES)
def test_images_that_do_not_fit_are_refused(runs: Runs, message: str) -> None:
    image = BAD_IMAGES[message]
    image = image.reshape(28, 28) if isinstance(image, Tensor) and image.numel() == 784 else image
    with pytest.raises(UserError, match=message):
        vae_dist.load(runs["grey"]).encode(image)


def test_a_damaged_image_file_is_named(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    with pytest.raises(UserError, match=r"can't use .*bad\.png as an image"):
        vae_dist.load(runs["grey"]).encode(tmp_path / "bad.png")


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(2, 3), r"latents must be \(N, 2\), not \(2, 3\)"),
        ([[0, math.inf]], "not finite"),
        ([[0, 1j]], "they are complex numbers"),
        ("zero", "can't be decoded"),
        (torch.zeros(0, 2), r"latents must be \(N, 2\), not \(0, 2\)"),
        (torch.zeros(1, 1, 2), "latents must be"),
        ([torch.zeros(2), torch.zeros(3)], "can't be decoded"),
        (DiagonalGaussian(torch.zeros(3, 2), torch.zeros(3, 2)), "^these are posteriors.*codes.mean"),
        (DiagonalGaussian(torch.zeros(1, 1), torch.zeros(1, 1)), "^these are posteriors"),
    ],
)
def test_latents_that_do_not_fit_are_refused(runs: Runs, latents: Any, message: str) -> None:
    run = vae_dist.load(runs["grey"])
    with pytest.raises(UserError, match=message):
        run.decode(latents)
    with pytest.raises(UserError, match=message):
        run.show_codes(latents)
    with pytest.raises(UserError, match=message):
        run.show_traversal(codes=latents)


def test_numbers_that_are_not_whole_or_too_small_are_refused(runs: Runs) -> None:
    run, image = vae_dist.load(runs["conv"]), torch.zeros(28, 28)
    for few in (0, -4, 4.0, "4", None, np.array([4, 4]), 2**70):
        allowed = "below 2.63" if isinstance(few, int) and few > 0 else "of at least 1"
        uses: dict[str, Callable[[Any], object]] = {
            r"size\[0\]": lambda number: run.decode(torch.zeros(196), size=(number, 28)),
            r"size\[1\]": lambda number: run.decode(torch.zeros(196), size=(28, number)),
            "count": run.prior,
            "samples": lambda number: run.log_likelihood(image, samples=number),
        }
        for name, use in uses.items():
            with pytest.raises(UserError, match=f"^{name}=.*: a whole number {allowed} is needed"):
                use(few)
    with pytest.raises(UserError, match="size=0: give the height and the width"):
        run.decode(torch.zeros(196), size=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed=-1: a whole number of at least 0"):
        run.prior(2, seed=-1)
    with pytest.raises(UserError, match="seed=1180591620717411303424: a whole number below"):
        run.prior(2, seed=2**70)
    decoded = run.decode(torch.zeros(2, 14 * 14))
    assert torch.equal(run.decode(torch.zeros(2, 14 * 14), size=np.array([28, 28])), decoded)  # type: ignore[arg-type]
    assert torch.equal(run.prior(np.int64(2), seed=torch.tensor(3)), run.prior(2, seed=3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"images": [0, object()]}, {"images": [0, 2**70]}, {"images": [[0], [1, 2]]}, {"images": [0, 1j]},
        {"steps": object()}, {"steps": 2j},
    ],
    ids=lambda options: re.sub(" at 0x.*>", ">", str(options)),
)  # fmt: skip
def test_options_of_pictures_that_are_no_numbers_are_refused(runs: Runs, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(options))}=.* can't be used: "):
        vae_dist.load(runs["grey"]).show_interpolation(**options)


TOO_LARGE: dict[str, Callable[[vae_dist.Run], Any]] = {
    "a picture with room for 1,000,000 images would have 784,000,000": lambda run: run.show_interpolation(steps=10**6),
    "a picture with room for 810,000 images": lambda run: run.show_manifold(steps=900),
    "a picture with room for 1,000,000 images": lambda run: run.show_neighbours(rows=1000, steps=1000),
    "a picture with room for 10,000,000 images would have 9,000,000,000": lambda run: run.show_images(
        torch.zeros(3, 28, 28), columns=10**7
    ),
    "a picture with room for 500,001 images": lambda run: run.show_images(
        torch.zeros(3, 28, 28), columns=500_001, left=["a"], below="abc"
    ),
    "the latents of count=10000000000000 would take 7.45e+04 GiB": lambda run: run.prior(10**13),
    "the images of sample.count would take 2.92e+03 GiB": lambda run: run.sample(10**9),
}


@pytest.mark.parametrize("message", TOO_LARGE)
def test_what_exceeds_memory_is_refused_before_it_is_computed(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    run = vae_dist.load(runs["grey"])
    monkeypatch.setattr(VAE, "decode", lambda *arguments: pytest.fail("decodes"))
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        TOO_LARGE[message](run)


def test_long_rows_and_many_images_are_drawn(runs: Runs) -> None:
    run = vae_dist.load(runs["grey"])
    assert run.show_interpolation(images=[0, 1], steps=2000).width > 2000 * 28
    assert run.show_images(torch.zeros(10_000, 28, 28)).width >= 100 * 30
    assert run.show_images(torch.zeros(3, 28, 28), columns=500).width >= 500 * 30


def test_a_list_of_latents_is_as_good_as_a_tensor_of_them(runs: Runs) -> None:
    run = vae_dist.load(runs["grey"])
    latents = run.prior(3)
    assert torch.equal(run.decode(list(latents)), run.decode(latents))
    assert run.show_codes(list(latents)).tobytes() == run.show_codes(latents).tobytes()


def test_pictures_take_the_latents_that_decode_takes(runs: Runs) -> None:
    run = vae_dist.load(runs["conv"])
    latents = run.prior(3).double()
    pictures = [run.show_codes(codes) for codes in (latents, latents.view(3, 1, 14, 14), latents.tolist())]
    assert len({picture.tobytes() for picture in pictures}) == 1
    one = latents[0], latents[0].numpy(), latents[0].view(1, 14, 14), latents[:1]
    assert len({run.show_codes(code).tobytes() for code in one}) == 1
    assert len({run.show_neighbours(codes=code, steps=2).tobytes() for code in one}) == 1


def test_samples_are_those_of_the_command(runs: Runs, tmp_path: Path) -> None:
    for name, labels in (("grey", None), ("conditional", ["3", "5"])):
        extra = [] if labels is None else ['sample.labels=["3","5"]']
        folder = sample(runs[name], ["sample.count=6", "sample.seed=4", f"output={tmp_path}", *extra])
        written = load_file(folder / "samples.safetensors")
        run = vae_dist.load(runs[name])
        assert torch.equal(run.sample(6, seed=4, labels=labels), written["images"])
        assert torch.equal(run.prior(6, seed=4), written["latents"])
        shown = run.show_samples(6, seed=4, labels=labels)
        assert shown.tobytes() == Image.open(folder / "grid.png").tobytes()


@pytest.mark.parametrize("name", ["grey", "binary", "cut", "conditional"])
def test_log_likelihoods_are_those_of_an_evaluation(runs: Runs, test_images: Tensor, name: str, tmp_path: Path) -> None:
    arguments = ["evaluate.importance_samples=5", "evaluate.batch_size=12", f"output={tmp_path}"]
    run = vae_dist.load(runs[name], *arguments)
    result = run.evaluate()
    config = opened(runs[name]).config
    source = datasets.load_test(config.data)
    count, columns = source.info.count, (None if name != "conditional" else source.labels(torch.arange(200)))
    grey = read(datasets.load_test(opened(runs["grey"]).config.data), range(count))  # not binarised yet
    found = run.log_likelihood(grey, samples=5, labels=columns)
    assert found.dtype == torch.float64
    assert -found.mean().item() == pytest.approx(result["negative_log_likelihood"], rel=1e-12)
    assert result == run.evaluation or run.evaluation is None  # written to another folder


def test_a_conditional_model_takes_names_and_numbers_of_classes(runs: Runs, test_images: Tensor) -> None:
    run = vae_dist.load(runs["conditional"])
    by_number = run.encode(test_images[:2], labels=[3, 7]).mean
    assert torch.equal(by_number, run.encode(test_images[:2], labels=["3", "7"]).mean)
    assert torch.equal(by_number, run.encode(test_images[:2], labels=torch.tensor([3, 7])).mean)
    assert torch.equal(by_number, run.encode(test_images[:2], labels=np.array([3, 7])).mean)
    assert torch.equal(by_number, run.encode(test_images[:2], labels=np.array(["3", "7"])).mean)
    coded, drawn = run.encode(test_images[:1], labels=3).mean, run.sample(2, labels="3")
    for three in (np.int64(3), np.array(3), np.str_("3"), torch.tensor(3)):
        assert torch.equal(coded, run.encode(test_images[:1], labels=three).mean)
        assert torch.equal(drawn, run.sample(2, labels=three))
    weights = torch.nn.functional.one_hot(torch.tensor([3, 7]), 10).float()
    torch.testing.assert_close(run.encode(test_images[:2], labels=weights).mean, by_number)
    assert not torch.equal(by_number, run.encode(test_images[:2], labels="7").mean)
    reconstructed = run.reconstruct(test_images[:2], labels=[3, 7])
    assert torch.equal(reconstructed, run.decode(by_number, labels=[3, 7]))
    for labels, message in {
        None: "this model is conditional: give labels, of the classes 0, 1, 2",
        "ten": "'ten' is no class",
        10: "10 is no class: the 10 classes are 0, 1",
        3.0: r"3\.0 is no class",
        (1, 2, 3): "3 labels for 2 images",
    }.items():
        with pytest.raises(UserError, match=message):
            run.encode(test_images[:2], labels=labels)
    for several in (np.array([1, 2]), torch.tensor([1, 2])):
        with pytest.raises(UserError, match=r"\[1, 2\].* is no class"):
            run.encode(test_images[:2], labels=[several])
        with pytest.raises(UserError, match=r"sample\.labels has \[1,? 2\], but the 10 classes"):
            run.sample(2, labels=[several])
    assert torch.equal(by_number, run.encode(test_images[:2], labels=np.array([3, 7], ">i4")).mean)
    with pytest.raises(UserError, match="labels can't have the type"):
        run.encode(test_images[:2], labels=np.zeros((2, 10), np.longdouble))
    for number in (math.nan, math.inf):
        with pytest.raises(UserError, match="weights of classes have numbers that are not finite"):
            run.decode(torch.zeros(2, 8), labels=torch.where(weights == 1, number, weights))
    with pytest.raises(UserError, match="not conditional: leave out labels"):
        vae_dist.load(runs["grey"]).encode(test_images, labels=3)


def test_metrics_are_a_table_by_step(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = vae_dist.load(runs["grey"])
    table = run.metrics()
    assert table.index.name == "step" and list(table.index) == [3, 6]
    assert table["validation/negative_elbo"].notna().all()
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    rows = run.metrics()
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[1]["validation/negative_elbo"] == table["validation/negative_elbo"][6]


def test_a_run_with_a_relative_path_is_found_from_another_working_directory(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(runs["grey"].parent)
    run = vae_dist.load("grey")
    assert run.directory == Path("grey") and run.checkpoint.parent == Path("grey/checkpoints")
    assert repr(run).startswith("<Run 'grey', step 6: ")
    records = run.metrics()
    monkeypatch.chdir(tmp_path)
    assert run.directory == runs["grey"] and run.checkpoint.is_dir()
    assert len(records) > 0 and run.metrics().equals(records)
    result = run.evaluate(f"output={tmp_path / 'out'}", "evaluate.importance_samples=0")
    assert result["step"] == 6 and run.show_curves("train/loss").width > 0
    monkeypatch.chdir(runs["grey"].parent)
    assert run.directory == Path("grey")


def test_data_with_a_relative_path_are_found_from_another_working_directory(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path(vae_dist.load(runs["grey"]).config.data.root)
    monkeypatch.chdir(root.parent)
    run = vae_dist.load(runs["grey"], f"data.root={root.name}")
    images, config = run.images(count=3).images, run.config
    picture = run.show_reconstructions().tobytes()
    monkeypatch.chdir(tmp_path)
    assert run.config.data.root == str(root) and torch.equal(run.images(count=3).images, images)
    assert run.show_reconstructions().tobytes() == picture
    few = [f"output={tmp_path / 'out'}", "evaluate.importance_samples=0"]
    assert run.evaluate(*few)["images"] == len(run.images().images)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    run.evaluate(*few, "data.root=elsewhere")  # a caller's own path is taken as it is
    assert (tmp_path / "elsewhere").is_dir()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run.config.data.root == str(root)
    monkeypatch.chdir(root.parent)
    assert run.config is config and config.data.root == root.name


def test_every_picture_is_that_of_the_command(runs: Runs, test_images: Tensor, tmp_path: Path) -> None:
    run = vae_dist.load(runs["grey"])
    pictures = {
        "traversal": (run.show_traversal(rows=2, steps=3), ["sample.rows=2", "sample.steps=3"]),
        "neighbours": (run.show_neighbours(codes=[[0, 1]], steps=3), ["sample.codes=[[0,1]]", "sample.steps=3"]),
        "interpolation": (run.show_interpolation(images=[0, 1]), ["sample.images=[0,1]"]),
        "manifold": (run.show_manifold(steps=4), ["sample.steps=4"]),
        "levels": (run.show_levels(images=[3]), ["sample.images=[3]"]),
        "scatter": (run.show_scatter(), []),
        "reconstruction": (run.show_reconstructions(), []),
        "codes": (run.show_codes(torch.zeros(2, 2)), ["sample.codes=[[0,0],[0,0]]"]),
    }
    for kind, (picture, arguments) in pictures.items():
        folder = sample(runs["grey"], [f"sample.kind={kind}", f"output={tmp_path}", *arguments])
        (file,) = folder.glob("*.png")
        assert picture.tobytes() == Image.open(file).tobytes(), kind
    assert run.show_reconstructions(test_images).width >= 8 * 28
    assert run.show_curves().width > run.show_curves().height > 100
    with pytest.raises(UserError, match=r"has no metric .loss.; it has .*train/loss"):
        run.show_curves("loss")
    with pytest.raises(UserError, match=r"sample\.radius does not apply to sample\.kind=traversal"):
        run.show_traversal(radius=1)


def test_a_seed_draws_the_same_however_many(runs: Runs) -> None:
    run = vae_dist.load(runs["grey"])
    assert torch.equal(run.prior(3, seed=2), run.prior(10, seed=2)[:3])
    assert torch.equal(run.prior(3), standard_normal(FIXED_SEED, Stream.PRIOR, 0, range(3), 2))


def state_of_this_process() -> dict[str, Any]:
    log = logging.getLogger("vae_dist")
    numpy_state: Any = np.random.get_state(legacy=False)["state"]["key"]
    return {
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "accelerate": dict(PartialState._shared_state),
        "handlers": list(log.handlers),
        "level": (log.level, log.propagate, logging.getLogger().level, list(logging.getLogger().handlers)),
        "random": (torch.get_rng_state().tolist(), random.getstate(), numpy_state.tolist()),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "streams": (sys.stdout, sys.stderr),
        "folder": Path.cwd(),
    }


def test_a_caller_finds_its_process_as_it_was(
    runs: Runs, test_images: Tensor, smoke_arguments: list[str], tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    accelerator = Accelerator(cpu=True)
    layer = accelerator.prepare(torch.nn.Linear(2, 2))
    before = state_of_this_process()
    run = vae_dist.load(runs["grey"], f"output={tmp_path}")
    run.decode(run.encode(test_images).mean)
    run.sample(2)
    run.log_likelihood(test_images, samples=2)
    run.show_traversal(rows=1)
    run.metrics()
    run.show_curves()
    assert state_of_this_process() == before
    run.evaluate("evaluate.importance_samples=2")
    vae_dist.fit(*smoke_arguments, f"runs_dir={tmp_path}", "train.steps=2", "train.threads=1")
    assert state_of_this_process() == before
    accelerator.backward(layer(torch.ones(1, 2)).sum())  # it still works
    torch.set_num_threads(1)


FORBIDDEN = ("torch._dynamo", "matplotlib", "wandb", "torchvision", "pandas", "IPython", "onnx", "onnxruntime")


IMPORT_AND_LOAD = """
import logging, os, signal, sys
import vae_dist
assert "torch" not in sys.modules
import torch
def state():
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return (dict(os.environ), torch.get_num_threads(), logging.root.handlers[:], signals,
            torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(), sys.stdout, sys.stderr)
before = state()
vae_dist.load(sys.argv[1]).sample(2)
assert state() == before
"""


def test_importing_and_loading_need_little_and_change_nothing(runs: Runs) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", IMPORT_AND_LOAD, str(runs["conv"])],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "torch" in imported and "vae_dist.api.run" in imported
    for name in FORBIDDEN:
        assert not {module for module in imported if module == name or module.startswith(f"{name}.")}, name
    assert not [line for line in result.stderr.splitlines() if not line.startswith("import time:")]  # no warnings


def test_the_package_lists_what_it_exports() -> None:
    assert set(vae_dist.__all__) <= set(dir(vae_dist))
    for name in vae_dist.__all__:
        assert getattr(vae_dist, name)
    with pytest.raises(AttributeError, match="no attribute 'vae'"):
        vae_dist.vae  # noqa: B018
    commands = {path.stem for path in (REPOSITORY / "vae_dist").glob("*.py")}
    assert not commands & set(vae_dist.__all__)


@pytest.mark.parametrize("module", [run_module, trained_model, loading, fitting, images, codes, records, api])
def test_examples_in_docstrings_run(module: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(runs["grey"])
    monkeypatch.chdir(tmp_path)
    names = {"vae_dist": vae_dist, "torch": torch, "run": vae_dist.load("runs/mine")}
    failed, tried = doctest.testmod(module, extraglobs=names)
    assert failed == 0
    assert tried >= {trained_model: 4, run_module: 1, loading: 2}.get(module, 0)


def test_the_examples_of_the_page_about_python_run(
    runs: Runs,
    test_images: Tensor,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (REPOSITORY / "docs/python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(runs["grey"])
    Path("configs").symlink_to(REPOSITORY / "configs")
    Path("data").symlink_to(data_root)
    for name, image in zip(("one", "two"), test_images, strict=False):
        Image.fromarray(image[0].numpy()).save(f"{name}.png")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    wandb.teardown()  # or its client would stay disabled in this process
    assert names["pictures"].shape == (2, 1, 28, 28)
    assert capsys.readouterr().out.rstrip().endswith(": divide them by 255")
    for call in re.findall(r"run\.([a-z_]+)", page):
        assert hasattr(names["run"], call), call
