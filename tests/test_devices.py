"""The devices of tensors on a GPU, without a GPU: torch's fake tensors have device, shape and dtype, but no values.

Backward passes, streams and pinned memory need a card: tests/gpu has those.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from threading import Event
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import update_of
from tests.sources import of_pixels
from vae_dist import config
from vae_dist.config import Config
from vae_dist.data import batches as batch_module
from vae_dist.data.batches import Batch, Batches, place
from vae_dist.distributed import environment, failures, launcher, processes
from vae_dist.distributed import world as worlds
from vae_dist.distributed.world import World
from vae_dist.encoding.latents import _encode_batch
from vae_dist.errors import RunError, UserError
from vae_dist.evaluation import constants, metrics
from vae_dist.models import build_vae
from vae_dist.models.vae import VAE
from vae_dist.plan import Plan
from vae_dist.training.autoencoder_recipe import AutoencoderRecipe
from vae_dist.training.differentiate import Differentiate
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.meter import Meter
from vae_dist.training.update import Update
from vae_dist.views import from_images, pictures
from vae_dist.views.latents import TrainedVAE

CARD = torch.device("cuda", 0)
COUNT = 700
LADDER = ["model.architecture=ladder", "objective.reconstruction=discretized_logistic_mixture"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The world of a single process as Accelerate describes it: on "cuda", which equals no tensor's device."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield world_of(1)


def state_of(size: int) -> Any:
    return SimpleNamespace(process_index=0, num_processes=size, device=torch.device("cuda"), is_main_process=True)


def world_of(size: int) -> World:
    return World(state_of(size))


def config_of(*arguments: str) -> Config:
    return config.load(["train.precision=fp32", "tracking.wandb=disabled", "runtime.cuda_graph=false", *arguments])


def pixels() -> Tensor:
    return torch.zeros(COUNT, 1, 28, 28, dtype=torch.uint8)


@pytest.fixture
def vae(card: World) -> VAE:
    with CARD:
        return build_vae(config_of(), (1, 28, 28))


class BlockingCopies(TorchDispatchMode):
    """Counts copies from the host to the card that wait for the card, which gets no new work meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            self.count += args[0].device.type == "cpu" and not kwargs.get("non_blocking")
        return func(*args, **kwargs)


def test_a_device_is_named_as_its_tensors_name_it(card: World) -> None:
    assert card.device == CARD == torch.zeros(1, device="cuda").device


def test_fp32_is_fp32_in_every_command(card: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation or an encoding makes no Accelerator, and torch's convolutions would be in TF32."""
    monkeypatch.setattr(environment, "choose_device", lambda device: "cuda")
    monkeypatch.setattr(launcher, "connect", lambda device, timeout: state_of(1))
    torch_default = torch.backends.cudnn.allow_tf32
    with processes.join(config_of()) as world:
        assert world.device == CARD
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == torch_default


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_images_and_noise_stay_on_the_gpu(binarize: str, card: World) -> None:
    training = of_pixels(pixels())
    batches = Batches(training, Plan(0, COUNT, 50), config_of(f"data.binarize={binarize}"), card, (40,))
    with BlockingCopies() as copies:
        batch = batches(range(12, 16))  # over the end of an epoch
    assert copies.count == 0
    assert {tensor.device for tensor in batch} == {CARD}
    assert [tuple(tensor.shape) for tensor in batch] == [(4, 50, 1, 28, 28), (4, 50, 40), (4, 0)]
    assert batches._rows_of_words.device == CARD


def test_batches_of_images_on_the_host_wait_for_no_step(card: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a copy's stream one that may be capturing steps, or its thread left on another card."""
    entered: list[Any] = []

    @contextmanager
    def noted(where: Any) -> Iterator[None]:
        entered.append(where)
        yield

    def stream(device: torch.device, priority: int = 0) -> Any:
        return SimpleNamespace(device=device, priority=priority, synchronize=lambda: None)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**10, 2**40))
    for name, stand_in in {"device": noted, "stream": noted, "Stream": stream, "default_stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(batch_module, "Prefetch", lambda load: load)  # fake tensors are of one thread
    monkeypatch.setattr(batch_module, "_labels", lambda source: torch.zeros(COUNT, dtype=torch.int64))
    settings = config_of("model.architecture=conv", "model.conditional=true")
    batches = Batches(of_pixels(pixels()), Plan(0, COUNT, 50), settings, card, (40,))
    with BlockingCopies() as copies:
        batch = batches(range(12, 16))
    assert copies.count == 0
    assert {tensor.device for tensor in batch} == {CARD}
    assert batch.labels.shape == (4, 50)
    device, used = entered
    assert device == used.device == CARD and used.priority != 0


def test_images_that_do_not_fit_stay_on_the_host(card: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**10, 2**40))
    placed, resident = place(pixels(), card.device)
    assert (placed.device.type, resident) == ("cpu", False)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # where the average copies the network
@pytest.mark.parametrize(
    ("options", "processes"), [([], 1), ([], 2), ([*LADDER, "objective.bound=iwae", "objective.samples=2"], 1)]
)
def test_a_step_stays_on_the_gpu(
    options: list[str], processes: int, card: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the backward pass: gradients are zeros. A host sync would fail, for a fake tensor has no values."""
    reduced = []

    def all_reduce(values: Tensor) -> None:
        reduced.append(values.device)

    def functional(self: Differentiate, scale: Tensor, *tensors: Tensor) -> list[Tensor]:
        assert {tensor.device for tensor in (scale, *tensors)} == {CARD}
        inputs, weights = self._inputs_and_weights(tensors)
        loss, _, (sums, _) = self._reduced(self._network, inputs, nullcontext)
        return [loss, sums, *map(torch.zeros_like, weights)]

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(Differentiate, "functional", functional)
    settings = config_of("train.accumulate=2", "ema.decay=0.9", *options)
    with CARD:
        vae = build_vae(settings, (1, 28, 28))
    update = update_of(settings, world_of(processes), (1, 28, 28), vae=vae)
    batches = Batch(
        torch.zeros(3, 100, 1, 28, 28, dtype=torch.uint8, device=CARD),
        torch.zeros(3, 100, *update.recipe.noise_shape, device=CARD),
        torch.empty(3, 0, dtype=torch.int64, device=CARD),
    )
    with BlockingCopies() as copies:
        update(batches, [update.recipe.values(step) for step in range(3)])
    assert copies.count == 0
    state = [*update.recipe.tensors, update.totals, *update.recipe.model.parameters()]
    assert {tensor.device for tensor in state} == {CARD}
    assert reduced == [CARD] * 3 * (processes > 1)
    Meter(update, card, 100, [{"loss": 1.0}])


class AdamsKernel(TorchDispatchMode):
    """Stands in for torch's fused Adam, which fake tensors lack, and notes each call's learning rate."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default  # the host would wait for the card
        if func is not torch.ops.aten._fused_adam_.tensor_lr:
            return func(*args, **kwargs)
        *moved, maxima, steps = args
        numbers = [*steps, kwargs["lr"], kwargs["found_inf"]]
        assert {tensor.device for tensor in [*chain(*moved), *numbers]} == {CARD} and maxima == []
        assert {(number.dtype, number.shape) for number in numbers} == {(torch.float32, torch.Size())}
        for tensors in zip(*moved, strict=True):  # for the kernel, arrays of one layout
            assert len({(tensor.dtype, tensor.stride()) for tensor in tensors}) == 1
        self.rates.append(kwargs["lr"])
        return None


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_step_of_a_first_stage_stays_on_the_gpu(card: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the backward passes, whose gradients are zeros, in a compiled program's order of memory."""

    def eager(self: Differentiate, scale: Tensor, *tensors: Tensor) -> list[Tensor]:
        inputs, weights = self._inputs_and_weights(tensors)
        assert {tensor.device for tensor in (scale, *tensors)} == {CARD}
        orders = {4: torch.channels_last}
        gradients = [torch.zeros_like(weight, memory_format=orders.get(weight.ndim)) for weight in weights]
        if isinstance(self._network, VAE):
            sums = torch.zeros(4, dtype=torch.float64, device=CARD)
            return [inputs[0].sum(), sums, inputs[0], gradients[self._probed], *gradients]
        return [inputs[0].sum(), torch.zeros(4, dtype=torch.float64, device=CARD), *gradients]

    monkeypatch.setattr(Differentiate, "eager", eager)
    monkeypatch.setattr(nn.Module, "to", lambda module, *place: module)  # fake parameters can't be moved
    settings = config_of(
        "model.architecture=conv", "model.channels=[4,8]", "train.recipe=autoencoder", "train.compile=false",
        "objective.reconstruction=laplace", "first_stage.adversarial_weight=0.2", "first_stage.adaptive=true",
        "first_stage.discriminator_channels=4", "first_stage.discriminator_layers=1", "first_stage.skip_norm=3",
        "ema.decay=0.9",
    )  # fmt: skip
    scaler = LossScaler("fp32", card.device)
    with CARD:
        vae = build_vae(settings, (1, 28, 28))
        recipe = AutoencoderRecipe(vae, settings, card, scaler, 100)
    update = Update(recipe, settings, card, scaler)
    batches = Batch(
        torch.zeros(2, 10, 1, 28, 28, dtype=torch.uint8, device=CARD),
        torch.zeros(2, 10, 1, vae.latent_dim, device=CARD),
        torch.empty(2, 0, dtype=torch.int64, device=CARD),
    )
    with BlockingCopies() as copies, AdamsKernel() as kernel:
        update(batches, [recipe.values(step) for step in range(2)])
    assert copies.count == 0 and len(kernel.rates) == 2 * 2
    assert {tensor.device for tensor in [*recipe.tensors, update.totals]} == {CARD}


@pytest.mark.parametrize("options", [[], LADDER])
def test_evaluations_and_views_compute_on_the_gpu_and_gather_on_the_host(options: list[str], card: World) -> None:
    settings = config_of("evaluate.importance_samples=3", "encode.latents=draws", *options)
    with CARD:
        vae = build_vae(settings, (1, 28, 28))
    trained = TrainedVAE(vae, settings, card)
    trained.__dict__["test"] = of_pixels(pixels())  # a cached property
    encodings, codes = metrics.encode(vae, of_pixels(pixels()), card, settings), torch.zeros(COUNT, vae.latent_dim)
    results = [
        *metrics.score(vae, of_pixels(pixels()), card, settings),
        *encodings.terms,
        encodings.squared_error,
        metrics.negative_log_likelihood(vae, of_pixels(pixels()), card, settings),
        *trained.encode(range(COUNT)),
        trained.mean_and_draws(range(COUNT), torch.zeros(2, COUNT, vae.latent_dim)),
        trained.decode(codes),
        trained.draw_pixels(codes, None, lambda chunk, columns: torch.zeros(len(chunk), columns)),
        *_encode_batch(vae, of_pixels(pixels()), settings, range(COUNT)).values(),
    ]
    others = [encodings.kl, encodings.variance, *constants.measure(vae, card, settings).values()]
    others += from_images.levels(trained).tensors.values()
    assert {tensor.device.type for tensor in [*results, *others]} == {"cpu"}
    assert {len(tensor) for tensor in results} == {COUNT}


def test_pictures_are_made_on_the_host(vae: VAE, card: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def to_picture(of: Tensor) -> Any:
        shown.append(of.device.type)
        return Image.new("L", (of.shape[1], of.shape[0]))

    monkeypatch.setattr(pictures, "_to_picture", to_picture)
    monkeypatch.setattr(pictures, "standard_normal", lambda *given: torch.zeros(64, 40))
    pictures.reconstructions(vae, of_pixels(pixels()), "held-out images")
    pictures.samples(vae, "a model")
    assert shown == ["cpu", "cpu"]


def test_collectives_get_tensors_on_the_gpu(card: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL accepts nothing else, wherever the values were."""
    exchanged = []

    def exchange_of_two(values: Tensor, reduction: str | None = None) -> Tensor:
        exchanged.append(values.device)
        return values if reduction else torch.cat([values, values])

    monkeypatch.setattr(worlds, "reduce", exchange_of_two)
    monkeypatch.setattr(worlds, "gather", exchange_of_two)
    world = world_of(2)
    for device in "cpu", "cuda":
        for exchange in world.sum, world.max, world.gather:
            assert exchange(torch.zeros(5, device=device)).device.type == "cpu"
    assert len(exchanged) == 6 and set(exchanged) == {CARD}


@pytest.mark.parametrize(
    ("problem", "last", "kind", "message"),
    [
        (
            "invalid usage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000", UserError,
            r"several processes would compute on one GPU \(Duplicate .* 1000\): start at most one process for each GPU",
        ),
        (
            "invalid usage",
            "Multiple Ranks are using the same GPU/Partition. Set NCCL_MULTI_RANK_GPU_ENABLE=1 to enable this "
            "configuration.",
            UserError, r"several processes would compute on one GPU \(Multiple .* configuration\): start at most",
        ),
        (
            "unhandled system error", "socketStartConnect: Connect to 10.0.0.2<9999> failed", RunError,
            r"communication between the processes failed \(socketStartConnect: .* failed\); give the command again",
        ),
        ("remote process exited", "", RunError, r"failed \(remote process exited .* NCCL version 2.28.9\)"),
    ],
)  # fmt: skip
def test_an_error_of_nccl_is_explained_by_its_own_reason(
    problem: str, last: str, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are those of torch 2.11 and NCCL 2.28, one of NCCL 2.30, in which the reason comes last."""
    monkeypatch.setattr(failures, "missing_processes", lambda rank, size: [])
    text = f"NCCL error in: /pytorch/NCCLUtils.cpp:93, {problem} (run with NCCL_DEBUG=WARN), NCCL version 2.28.9"
    with pytest.raises(kind, match=message), failures.explained(0, 2):
        raise torch.distributed.DistBackendError(
            f"{text}\nncclError: This usually reflects an error.\nLast error:\n{last}"
        )


def test_a_process_that_is_too_slow_is_told_from_a_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "missing_processes", lambda rank, size: [1])
    for reason, is_slow in (
        ("Timed out waiting 8000ms for send operation to complete", True),
        ("closed by peer", False),
    ):
        with pytest.raises(RunError, match="process 1 of 2 died or hangs") as ended, failures.explained(0, 2):
            raise RuntimeError(f"[/pytorch/gloo/unbound_buffer.cc:78] {reason}")
        assert ("if it is only slow, raise runtime.start_timeout" in str(ended.value)) == is_slow


@pytest.mark.parametrize(("kind", "code"), [("run", 1), ("input", 2), ("", None)])
def test_a_process_that_waits_for_a_gpu_ends_with_the_one_that_has_failed(
    kind: str, code: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The host waits in the context as if for a collective of NCCL, which raises nothing."""
    store, ended = HashStore(), Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(failures, "store", lambda: store)
    monkeypatch.setattr(failures, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(failures, "NOTICE_SECONDS", 0.02)
    monkeypatch.setattr(os, "_exit", end)
    if kind:
        error = RunError("no image 17") if kind == "run" else UserError("no image 17")
        failures._report(store, 1, 2, error, 0)
    else:  # of an earlier run, which its process has withdrawn
        store.set(failures._ANY_FAILURE, "yes")
    with caplog.at_level("ERROR"), failures.ended_with_another(0, 2):
        ended.wait(10 if kind else 0.2)
    message = f"the run has ended: process 1 of 2 on {platform.node()}: no image 17"
    assert set(codes) == ({code} if kind else set())
    assert {record.getMessage() for record in caplog.records} == ({message} if kind else set())


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(("input", "input"), UserError), (("input", "run"), RunError), (("run", "input"), RunError)],
)
def test_input_is_blamed_if_all_that_failed_blame_it(
    kinds: tuple[str, str], expected: type[UserError] | type[RunError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code 2 says that the same command can't work, 1 that it may work again."""
    store = HashStore()
    monkeypatch.setattr(failures, "store", lambda: store)
    for rank, kind in enumerate(kinds):
        failures._report(store, rank, 3, UserError("bad") if kind == "input" else RunError("lost"), 0)
    with pytest.raises(expected, match=r"process 0 of 3 on .*; process 1 of 3 on ") as ended, failures.explained(2, 3):
        raise RuntimeError("closed by peer")
    assert type(ended.value) is expected and ended.value.reporting_rank == 2


def test_only_a_gpu_that_the_machine_has_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert environment.to_device("cuda:1") == torch.device("cuda:1")
    assert environment.to_device("cuda") == torch.device("cuda")
    with pytest.raises(UserError, match="device=cuda:2 can't be used: this machine has 2 GPUs"):
        environment.to_device("cuda:2")


def test_the_best_device_is_chosen_and_cores_are_shared_by_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    available = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available["mps"])
    assert environment.choose_device("auto") == "cuda"
    available["cuda"] = False
    assert environment.choose_device("auto") == "mps"
    available["mps"] = False
    assert environment.choose_device("auto") == "cpu"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 16 if logical else 6)
    monkeypatch.setenv("WORLD_SIZE", "6")
    for processes_here, threads in ("1", 6), ("2", 3), ("4", 1), ("100", 1):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes_here)
        assert environment._fair_threads() == threads


@pytest.mark.parametrize(("device", "size", "watches"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)])
def test_the_processes_of_gpus_watch_one_another(
    device: str, size: int, watches: bool, card: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[tuple[int, int]] = []
    state = state_of(size)
    state.device = torch.device(device)

    def watch(rank: int, size: int) -> AbstractContextManager[None]:
        watched.append((rank, size))
        return nullcontext()

    monkeypatch.setattr(failures, "ended_with_another", watch)
    monkeypatch.setattr(failures, "store", HashStore)
    monkeypatch.setattr(environment, "choose_device", lambda device: device)
    monkeypatch.setattr(launcher, "connect", lambda device, timeout: state)
    monkeypatch.setattr(launcher, "expected_size", lambda: size)
    with processes.join(config_of(f"device={device}")):
        pass
    assert watched == [(0, size)] * watches
