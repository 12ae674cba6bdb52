"""Every option of a run, and how files and arguments become one.

A config is built in three layers, later ones winning: the defaults below, YAML files, `key=value` arguments. OmegaConf
checks the types; what leaves this module are plain dataclasses.

Scalars reach their field as the text that the user typed, and the field's type decides what they mean. YAML's own
guesses never apply: `name: 007` stays `007` and `tags: [on]` stays `on`. In a text, `${model.latent_dim}` stands for
the value of that key.

Files and arguments may come from anybody. They hold keys, lists and text, within bounds; what else YAML and OmegaConf
can do (tags, aliases, resolvers that read the environment or import) never gets to run.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_type_hints
from urllib.parse import urlsplit

import psutil
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae_dist.errors import UserError
from vae_dist.files import read_bounded, write_atomically

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"]


def option(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field with its meaning and its bounds; a list's bounds hold for each item."""
    metadata = {"help": help, "above": above, "at_least": at_least, "at_most": at_most}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    name: str = option(
        "auto",
        "mnist, fashion_mnist, kmnist, synthetic_digits; auto: MNIST where it can be had, otherwise synthetic_digits",
    )
    root: str = option("data", "folder of the data sets, laid out as torchvision does")
    download: bool = option(True, "download what is missing under data.root")
    mirror: str | None = option(None, "URL to download from in place of the data set's own mirrors")
    validation_images: int = option(5000, "images held out of the training set; 0 trains on all of it", at_least=0)
    binarize: Literal["none", "threshold", "dynamic"] = option(
        "none",
        "none: grey pixels; threshold: 1 from 128 up; dynamic: training pixels drawn afresh at every step, others once",
    )
    image_shape: list[int] | None = option(None, "channels, height and width; null: as the data has them", at_least=1)
    synthetic_images: int = option(
        60_000, "training images of synthetic_digits; a sixth as many test images", at_least=6, at_most=2**32
    )


@dataclass
class ModelConfig:
    architecture: str = option("mlp", "name of an entry of ARCHITECTURES in vae_dist/models/__init__.py")
    latent_dim: int = option(40, "number of latents", at_least=1)
    hidden_dims: list[int] = option([400], "sizes of the encoder's hidden layers; the decoder mirrors them", at_least=1)


@dataclass
class ObjectiveConfig:
    reconstruction: str = option("bernoulli", "likelihood of the pixels: bernoulli or gaussian")
    sigma: float = option(1.0, "standard deviation of the gaussian likelihood, in units of white = 1", above=0)
    beta: float = option(1.0, "weight of the KL in the training loss; reported figures always have 1", at_least=0)
    beta_warmup_steps: int = option(0, "optimizer steps over which beta rises linearly from 0", at_least=0)


@dataclass
class OptimConfig:
    learning_rate: float = option(1e-3, "Adam's learning rate after the warm-up", above=0)
    warmup_steps: int = option(0, "optimizer steps over which the learning rate rises linearly from 0", at_least=0)
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate after the warm-up")
    decay_steps: int | None = option(
        None, "optimizer step at which the cosine reaches 0; null: the run's last", at_least=1
    )
    max_grad_norm: float | None = option(None, "clip the gradient to this norm; null: no clipping", above=0)


@dataclass
class TrainConfig:
    epochs: int = option(5, "passes over the training images", at_least=1)
    steps: int | None = option(None, "optimizer steps; overrides train.epochs", at_least=1)
    batch_size: int = option(100, "images per optimizer step, over all processes", at_least=1)
    accumulate: int = option(1, "parts that each process splits its share of a batch into, to save memory", at_least=1)
    precision: Precision = option("auto", "auto: what the launcher says; tf32 and fp16 need CUDA; fp64 is for checking")
    threads: int | None = option(
        None, "CPU threads of each process; null: the machine's cores shared evenly", at_least=1, at_most=1024
    )
    compile: bool | None = option(
        None, "compile the step, which takes some seconds; null: on a GPU, and on a CPU where a run is long enough"
    )
    log_every: int = option(100, "optimizer steps between rows of training metrics", at_least=1)
    validate_every: int | None = option(
        None, "optimizer steps between validations and pictures; null: an epoch", at_least=1
    )
    nonfinite: Literal["stop", "skip"] = option(
        "stop", "when loss or gradient are not finite: stop the run, or skip that update; it is never taken"
    )
    max_skipped: int = option(10, "updates that may be skipped before the run stops", at_least=0)


@dataclass
class CheckpointConfig:
    every: int | None = option(None, "optimizer steps between checkpoints; null: an epoch", at_least=1)
    keep: int = option(2, "newest checkpoints to keep; the best by validation is kept beside them", at_least=2)
    resume: str = option("auto", "auto: go on where a run of this name stopped; must; never; or a checkpoint's path")
    take_over: str | None = option(
        None, "on a file system without locks: take a run's directory from a dead training, by what its refusal names"
    )


@dataclass
class TrackingConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "auto: online where an account is set up, otherwise offline"
    )
    project: str = option("vae_dist", "Weights & Biases project")
    entity: str | None = option(None, "Weights & Biases user or team; null: the account's default")
    tags: list[str] = option([], "tags of the Weights & Biases run")
    artifact: bool = option(
        False, "give Weights & Biases the best checkpoint when the run is done; the newest where nothing was validated"
    )
    id: str | None = option(
        None,
        "identity of the Weights & Biases run; null: made when the run starts; not taken from a config.yaml that a run "
        "has saved",
    )
    owner: str | None = option(None, "run directory that tracking.id was made for, by inode and hash; the run sets it")
    notes: str | None = option(None, "what to remember of the Weights & Biases run")
    group: str | None = option(None, "Weights & Biases group of the run; a study's runs are in one")


@dataclass
class RuntimeConfig:
    start_timeout: float = option(
        600.0, "seconds that processes wait for one another until the run has begun", above=0, at_most=10**9
    )
    timeout: float = option(600.0, "seconds that they wait for one another from then on", above=0, at_most=10**9)
    cuda_graph: bool = option(True, "on one GPU, launch all operations of many steps at once")
    verify_every: int | None = option(
        None,
        "optimizer steps between further checks that all processes hold the same weights; null: at metrics and saves",
        at_least=1,
    )


@dataclass
class EvaluateConfig:
    batch_size: int = option(500, "images per block; the blocks are the same on any number of processes", at_least=1)
    split: Literal["test", "validation"] = option("test", "images to evaluate on: test, or validation")
    importance_samples: int | None = option(
        128, "latents per image for the estimate of the negative log-likelihood; 0 or null: none is made", at_least=0
    )
    chunk: int = option(
        2000, "images x importance samples decoded at a time, to bound memory; a block's images at least", at_least=1
    )


@dataclass
class SampleConfig:
    kind: str | None = option(
        None,
        "prior, codes, neighbours, interpolation, traversal, manifold, reconstruction or scatter; null: codes where "
        "sample.codes is given, otherwise prior",
    )
    count: int = option(64, "images to draw (prior)", at_least=1)
    seed: int = option(0, "seed of what is drawn (prior, neighbours, reconstruction)", at_least=0)
    sampler: Literal["prior", "mixture"] = option(
        "prior", "what prior draws from; mixture: Gaussians fitted to the training images' posteriors"
    )
    mixture_components: int = option(10, "Gaussians of the mixture", at_least=1)
    codes: list[list[float]] | None = option(
        None, "latents, one list each: what codes decodes, or the one that neighbours and traversal start from"
    )
    images: list[int] | None = option(
        None,
        "test images by index: one that neighbours and traversal start from, pairs for interpolation, any for "
        "reconstruction; null: the zero code, or the first ten",
        at_least=0,
    )
    steps: int | None = option(
        None,
        "images in a row: neighbours (10), interpolation (10), traversal (13), draws for reconstruction (8); "
        "the side of manifold (20)",
        at_least=2,
    )
    rows: int | None = option(None, "rows of neighbours (5), or latents to traverse (20)", at_least=1)
    radius: float | None = option(
        None, "how far neighbours get from the code; null: half the typical length of a latent, sqrt(L) / 2", above=0
    )
    files: bool = option(False, "write each image as a file of its own too")


@dataclass
class Config:
    name: str | None = option(None, "the run's name; {time} becomes its start; null: the config file's name and {time}")
    runs_dir: str = option("runs", "folder of the runs")
    seed: int = option(0, "seed of weights, batches and noise", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or mps")
    output: str | None = option(None, "folder for what evaluation and sampling write; null: the run's directory")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


# What a finished run can be looked at with. The model and what it learned from stay what they were.
READER_KEYS = (
    "device", "output", "runs_dir", "data.root", "data.download", "data.mirror", "train.threads", "tracking.",
    "runtime.", "evaluate.", "sample.",
)  # fmt: skip

# What may differ when a run goes on: none of it changes what is learned. The length is the schedule's business.
_RESUMABLE_KEYS = (
    *READER_KEYS, "name", "train.epochs", "train.steps", "train.accumulate", "train.precision",
    "train.compile", "train.log_every", "train.validate_every", "train.nonfinite", "train.max_skipped", "checkpoint.",
)  # fmt: skip

# What does not tell one run from another when they are compared.
_SAME_RUN_KEYS = (
    *READER_KEYS, "name", "data.image_shape", "train.accumulate", "train.compile", "train.log_every",
    "train.validate_every", "train.nonfinite", "train.max_skipped", "checkpoint.",
)  # fmt: skip

DEFAULT_STUDY = "model.latent_dim=2,5,10,20,40"

# The normal numbers of the two types: what is less is flushed to 0.
_FLOAT32 = 2.0**-126, 2.0**128 * (1 - 2.0**-24)
_FLOAT64 = 2.0**-1022, 2.0**1023 * (2 - 2.0**-52)

# Where training usually works; what a message says of it.
_USUAL = {
    "objective.sigma": (0.01, math.inf, "0.01 to 1"),
    "objective.beta": (0.0, 1000.0, "up to 10"),
    "optim.learning_rate": (0.0, 0.02, "0.0001 to 0.003"),
}

# More than any run needs, and little enough to be read within seconds.
MAX_BYTES = 2**20  # of a file
MAX_VALUES = 20_000  # of a file, of an argument, of a config; a list counts, and each of its items
MAX_TEXT = 2048  # bytes of a value
_MAX_DEPTH = 8  # of lists and keys in one another

YAML = (".yaml", ".yml")
_PATHS = ("runs_dir", "output", "data.root", "checkpoint.resume")
_MAX_NAME = 255  # bytes between two slashes, on any file system

_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._{}-]{0,127}")
_WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NULL = re.compile(r"~|null|Null|NULL|")
_REFERENCE = re.compile(r"\$\{([a-z_.]+)\}")

# Controls, halves of characters that are not UTF-8, line ends, and marks that turn the direction of writing: no path or
# name needs them, and a terminal that shows them obeys them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Option:
    """One key as `--help` shows it."""

    key: str
    type: str
    default: Any
    help: str
    above: float | None
    at_least: float | None
    at_most: float | None
    depth: int  # 0 for a scalar, 1 for a list, 2 for a list of lists


def options(section: Any = Config, prefix: str = "") -> Iterator[Option]:
    """Every key of the config, in the order of this file."""
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from options(hint, f"{prefix}{item.name}.")
            continue
        has_factory = item.default_factory is not dataclasses.MISSING
        default = item.default_factory() if has_factory else item.default  # type: ignore[operator]
        depth = str(hint).count("list[")
        yield Option(f"{prefix}{item.name}", _type_name(hint), default, depth=depth, **item.metadata)


@cache
def _options() -> dict[str, Option]:
    return {option.key: option for option in options()}


def flatten(config: Config) -> dict[str, Any]:
    """The config as `{"model.latent_dim": 40, ...}`."""
    values = {}
    for key in _options():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    return values


def load(arguments: Sequence[str]) -> Config:
    """The config that `[FILE.yaml ...] [key=value ...]` asks for. Raises UserError for what can't be used."""
    paths, arguments = _separate(arguments, YAML)
    files = [Path(expand(path)) for path in paths]
    settings = [setting for path in files for setting in _read_yaml(path)]
    settings += [_parse_argument(argument) for argument in arguments]
    config = _apply(Config(), settings)
    if config.name is None:
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", files[-1].stem).lstrip(".-")[:100] if files else "tutorial"
        config.name = f"{stem or 'run'}-{{time}}"
    if _has_id_of_a_run(settings):
        config.tracking.id = None  # that run finds it in its checkpoints
    config.tracking.owner = None
    check(config)
    _check_names_in_wandb(config.tracking)
    return config


def _has_id_of_a_run(settings: Sequence["_Setting"]) -> bool:
    """Whether tracking.id comes from a config that a run has saved, which states an image shape as no other does."""
    sources = [setting.source for setting in settings if setting.key == "tracking.id"]
    saved = {setting.source for setting in settings if setting.key == "data.image_shape" and setting.value} - {""}
    return bool(sources) and sources[-1] in saved


def load_reader(config: Config, arguments: Sequence[str]) -> Config:
    """The config of a finished run with the `key=value` arguments of an evaluation or a sampling.

    Where these write and whom they ask is for their user to say: the training's `output`, `runs_dir`, `data.mirror` and
    `tracking.wandb=online` don't count.
    """
    for key in (_split(argument)[0] for argument in arguments):
        if not key.startswith(READER_KEYS):
            _require_known(key)
            allowed = ", ".join(f"{key}*" if key.endswith(".") else key for key in READER_KEYS)
            raise UserError(f"{key} belongs to the training and can't be changed here; what can: {allowed}")
    # This machine's own number of threads, not that of the one that trained.
    train = dataclasses.replace(config.train, threads=None)
    data = dataclasses.replace(config.data, mirror=None)
    wandb = "auto" if config.tracking.wandb == "online" else config.tracking.wandb
    tracking = dataclasses.replace(config.tracking, wandb=wandb)
    config = dataclasses.replace(
        config, output=None, runs_dir=Config().runs_dir, data=data, train=train, tracking=tracking
    )
    config = _apply(config, [_parse_argument(argument) for argument in arguments])
    check(config)
    if any(_split(argument)[0].startswith("tracking.") for argument in arguments):  # what is stored is of no use here
        _check_names_in_wandb(config.tracking)
    return config


def take(arguments: Sequence[str], key: str) -> tuple[str, list[str]]:
    """The last value that the arguments give to a text key, or its default; and the other arguments."""
    own = [argument for argument in arguments if _split(argument)[0] == key]
    config = _apply(Config(), [_parse_argument(argument) for argument in own])
    check(config)
    return flatten(config)[key], [argument for argument in arguments if argument not in own]


def read(path: Path) -> Config:
    """The config that `save` wrote. It is data: nothing in it stands for anything else, not even `~` for a home."""
    settings = _read_yaml(path)
    if any("${" in text for setting in settings for text in _leaves(setting.value) if isinstance(text, str)):
        raise UserError(f"{path} holds an interpolation, which a saved config never does; it is not to be trusted")
    config = _apply(Config(), settings, has_homes=False)
    check(config)
    return config


def resume(config: Config, stored: Config) -> Config:
    """`config`, going on from a run with the config `stored`: what was decided then stands where nothing is asked for.

    Raises UserError where the two differ in what is learned.
    """
    merged = dataclasses.replace(config, data=dataclasses.replace(config.data), train=dataclasses.replace(config.train))
    if config.data.name == "auto":
        merged.data.name = stored.data.name
    merged.data.image_shape = config.data.image_shape or stored.data.image_shape
    if config.train.precision == "auto":
        merged.train.precision = stored.train.precision
    ours, theirs = flatten(merged), flatten(stored)
    keys = [key for key in ours if ours[key] != theirs[key] and not key.startswith(_RESUMABLE_KEYS)]
    if stored.optim.schedule == "cosine" and stored.optim.decay_steps is None:
        keys += [key for key in ("train.epochs", "train.steps") if ours[key] != theirs[key]]
    if keys:
        changes = ", ".join(f"{key} (was {as_text(theirs[key])}, now {as_text(ours[key])})" for key in keys)
        if config.checkpoint.resume in ("auto", "never"):
            remedy = "choose another name for a new run"
        else:  # under any name it would be refused again
            new = (
                f"leave out checkpoint.resume={config.checkpoint.resume} and choose a new name to train from the start"
            )
            remedy = f"leave {', '.join(keys)} as it was, or {new}"
        raise UserError(f"run {config.name} can't go on with another {changes}; {remedy}")
    return merged


def check_numbers(config: Config) -> None:
    """Raise UserError for numbers that would overflow or vanish in a training of this precision, `auto` being fp32."""
    precision = "fp32" if config.train.precision == "auto" else config.train.precision
    smallest, largest = _FLOAT64 if precision == "fp64" else _FLOAT32
    bounds = {
        "optim.learning_rate": _FLOAT32,  # Adam's, in every precision
        "optim.max_grad_norm": (smallest, math.inf),
        # They scale gradients, whose norm is the root of a sum of squares: sigma by its own square's reciprocal.
        "objective.beta": (smallest, largest**0.5),
        "objective.sigma": (largest**-0.25, smallest**-0.5),
    }
    values = flatten(config)
    if config.objective.reconstruction != "gaussian":
        del bounds["objective.sigma"]
    for key, (least, most) in bounds.items():
        if values[key] and not least <= values[key] <= most:
            zero = "0, or " if key == "objective.beta" else ""
            limits = f"at least {least:.2g}" if most == math.inf else f"from {least:.2g} to {most:.2g}"
            raise UserError(
                f"{key}={values[key]:g} can't be computed with in {precision}, where the loss or its gradients would "
                f"overflow or vanish; use {zero}a value {limits}"
            )


def suspects(config: Config) -> list[str]:
    """The settings that are likely to have made numbers infinite, the most likely first: `key=value (usual: ...)`."""
    values = flatten(config)
    usual = {key: (low, high) for key, (low, high, _) in _USUAL.items()}
    if config.objective.reconstruction != "gaussian":
        del usual["objective.sigma"]
    distance = {
        key: max(low / values[key] if values[key] else 0.0, values[key] / high) for key, (low, high) in usual.items()
    }
    odd = sorted((key for key in distance if distance[key] > 1), key=lambda key: -distance[key])
    return [f"{key}={values[key]:g} (usual: {_USUAL[key][2]})" for key in odd]


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def save(config: Config, path: Path) -> None:
    write_atomically(path, to_yaml(config).encode())


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def check(config: Config) -> None:
    """Raise UserError for the first value that no run can have, or none on this machine."""
    values = flatten(config)
    for option in _options().values():
        for item in _leaves(values[option.key]):
            _check_value(option, item)
    for key in _PATHS:
        _check_path(key, values[key] or "")
    if config.data.image_shape is not None and len(config.data.image_shape) != 3:
        raise UserError(f"data.image_shape must be channels, height and width, not {as_text(config.data.image_shape)}")
    if config.data.mirror is not None:
        _check_mirror(config.data.mirror)
    if config.name is not None and not _RUN_NAME.fullmatch(config.name):
        raise UserError(
            f"name={_short(repr(config.name))} can't be a folder's name: use letters, digits, '.', '_' and '-', "
            "up to 128 of them"
        )
    if config.tracking.id is not None and not _WANDB_ID.fullmatch(config.tracking.id):
        raise UserError(
            f"tracking.id={config.tracking.id!r} can't be the identity of a W&B run: use letters, digits, '_' and '-', "
            "up to 64 of them"
        )
    nested = to_dict(config)
    # What a run saves has to be readable again; YAML takes less than twice the room of JSON.
    if _count(nested) > MAX_VALUES or len(json.dumps(nested)) > MAX_BYTES // 2:
        raise UserError(f"the config is too large: {MAX_VALUES} values and {MAX_BYTES // 2} characters are the most")
    _check_memory(config)


def _check_names_in_wandb(tracking: TrackingConfig) -> None:
    """Raise UserError for names that W&B's client or server does not take."""
    if tracking.wandb == "disabled":
        return
    for key, name in (("project", tracking.project), ("entity", tracking.entity)):
        if name is None:
            continue
        found = [character for character in "/\\#?%:" if character in name]
        if found or not name.strip() or len(name) > 128:
            entity, _, project = name.partition("/")
            is_both = key == "project" and bool(entity and project) and tracking.entity is None
            hint = f"; use tracking.entity={entity} tracking.project={project}" if is_both else ""
            raise UserError(
                f"tracking.{key}={_short(name)} is no name that W&B takes: 1 to 128 characters, none of "
                f"/ \\ # ? % :{hint}"
            )
    if bad := [tag for tag in tracking.tags if not 1 <= len(tag) <= 64]:
        raise UserError(f"tracking.tags has {_short(repr(bad[0]))}, which W&B does not take: 1 to 64 characters a tag")


def _check_value(option: Option, item: Any) -> None:
    if isinstance(item, float) and not math.isfinite(item):
        raise UserError(f"{option.key} must be a finite number, not {item}")
    if isinstance(item, str):
        _require_text(item, option.key)
    if isinstance(item, int | float):
        if option.at_least is not None and item < option.at_least:
            raise UserError(f"{option.key} must be at least {option.at_least}, not {as_text(item)}")
        if option.above is not None and item <= option.above:
            raise UserError(f"{option.key} must be above {option.above}, not {as_text(item)}")
        if option.at_most is not None and item > option.at_most:
            raise UserError(f"{option.key} must be at most {option.at_most}, not {as_text(item)}")
    if isinstance(item, int) and abs(item) >= 2**63:
        raise UserError(f"{option.key} must be below 2^63, not {as_text(item)}")


def _check_path(key: str, path: str) -> None:
    if max(len(part.encode()) for part in path.split("/")) > _MAX_NAME:
        raise UserError(f"{key} is no path: a name in it has more than {_MAX_NAME} bytes")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}={path!a} has characters that no path can have where their encoding is {error.encoding}; set "
            "PYTHONUTF8=1, or choose another path"
        ) from error


def _check_mirror(mirror: str) -> None:
    """Raise UserError, which does not repeat it, for a mirror that can't be asked or has a secret in it."""
    try:
        parts = urlsplit(mirror)
        secret = "@" in parts.netloc or bool(parts.query or parts.fragment)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        secret, good = False, False
    if secret:
        raise UserError("data.mirror must hold no user, password or token: it is saved with the run and sent to W&B")
    if not good or not mirror.isascii() or " " in mirror:
        raise UserError("data.mirror must be like https://host/folder")


def _check_memory(config: Config) -> None:
    """Raise UserError for sizes whose numbers alone, without any of the rest, would not fit this machine."""
    memory = psutil.virtual_memory().total
    # A layer between two sizes has at least as many weights as their product; the encoder has it, and the decoder.
    sizes = [math.prod(config.data.image_shape or [1]), *config.model.hidden_dims, config.model.latent_dim]
    bytes_of = {
        "the model's weights (model.hidden_dims, model.latent_dim)": 8 * sum(a * b for a, b in pairwise(sizes)),
        "the latents of sample.count images": 4 * config.sample.count * config.model.latent_dim,
    }
    for what, needed in bytes_of.items():
        if needed > memory:
            raise UserError(
                f"{what} would take {needed / 2**30:.3g} GiB, and this machine has {memory / 2**30:.3g}; use less"
            )


def split_run(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """`[RUN] [key=value ...]` as the run's path, None where it is left out, and the rest."""
    paths, rest = split_runs(arguments)
    if len(paths) > 1:
        raise UserError(f"one run at a time, not {_short(', '.join(map(str, paths)))}")
    return paths[0] if paths else None, rest


def split_runs(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """`[RUN ...] [key=value ...]` as the runs' paths and the rest. What exists is a path, whatever it looks like."""
    paths, rest = _separate(arguments)
    for path in paths:
        _require_text(path, "a run's path")
        if path.startswith("-") and not _is_path(path):
            raise UserError(f"unknown option {_short(path)}; give a run's directory and key=value (--help lists them)")
    return [Path(expand(path)) for path in paths], rest


def _separate(arguments: Sequence[str], suffixes: tuple[str, ...] = ("",)) -> tuple[list[str], list[str]]:
    """The arguments that are paths with such an ending, and those that are `key=value`."""
    paths = [text for text in arguments if "=" not in text or (text.endswith(suffixes) and _is_path(text))]
    return paths, [argument for argument in arguments if argument not in paths]


def _is_path(text: str) -> bool:
    """Whether a text is the path of something that is there, or of something in a folder that is there.

    No key has a slash in it, and where the first folder is there, the user will have meant what is missing in it.
    """
    start = Path(text).parts[0] if text else ""
    try:
        return "/" in text.partition("=")[0] or Path(expand(text)).exists() or (start != text and Path(start).is_dir())
    except (OSError, ValueError, UserError):
        return False


def expand(path: str, key: str = "") -> str:
    """`path` with the home that a leading `~` or `~user` stands for. Raises UserError where there is no such home."""
    user = path.partition("/")[0]
    if user[:1] != "~" or (user != "~" and os.path.lexists(path)):
        return path
    try:
        if user == "~" and os.environ.get("HOME") == "":
            raise RuntimeError("HOME is empty")
        return str(Path(path).expanduser())
    except RuntimeError as error:
        given = f"{key}={path}" if key else path
        raise UserError(
            f"{_short(given)} can't be found: {str(error).rstrip('.')}; give the whole path, or ./{_short(user)} for a "
            "folder of that name"
        ) from error


def differing(configs: Sequence[Config]) -> list[str]:
    """The keys in which these runs differ, of those that matter to what was learned."""
    tables = [flatten(config) for config in configs]
    keys = [option.key for option in options() if not option.key.startswith(_SAME_RUN_KEYS)]
    return [key for key in keys if any(table[key] != tables[0][key] for table in tables)]


class Study(NamedTuple):
    """Trainings that differ in one key."""

    key: str
    configs: list[Config]
    reading: list[str]  # those of its arguments that also say how to look at finished runs
    output: Path  # for their comparison


def load_study(arguments: Sequence[str]) -> Study:
    """The study that `[FILE.yaml ...] KEY=V1,V2,... [key=value ...]` asks for; DEFAULT_STUDY where no key has several.

    Commas inside brackets or quotes separate no values. The runs are named `<name>-<key>-<value>`, without a time, so
    that the same command finds them again. Raises UserError for what can't be used.
    """
    settings = _separate(arguments, YAML)[1]
    several = [argument for argument in settings if len(_alternatives(argument)) > 1]
    rest = [argument for argument in arguments if argument not in several]
    varied = several[0] if several else DEFAULT_STUDY
    key = _split(varied)[0]
    if len(several) > 1:
        raise UserError(f"a study varies one key, not {_short(' and '.join(several))}; quotes keep a comma in a value")
    if any(argument.removeprefix("--").startswith(f"{key}=") for argument in rest):
        raise UserError(f"a study needs several values of {key} in one argument, such as {DEFAULT_STUDY}")
    if key in ("name", "runs_dir", "output"):
        raise UserError(f"a study can't vary {key}: its runs get names and folders by what they differ in")
    configs = [load([*rest, f"{key}={value}"]) for value in _alternatives(varied)]
    stem = f"{str(configs[0].name).removesuffix('-{time}')}-{key.rpartition('.')[2]}"
    output = Path(configs[0].output or f"{configs[0].runs_dir}/{stem}")
    for config in configs:
        config.name = f"{stem}-{_in_a_name(flatten(config)[key])}"
        config.output = None
        config.tracking.group = config.tracking.group or stem
        check(config)
    if "{time}" in stem:
        raise UserError(f"a study is found again by its name; leave {{time}} out of {stem}")
    if len({config.name for config in configs}) < len(configs):
        raise UserError(f"two of the values are the same: {_short(varied)}")
    if configs[0].tracking.id is not None:
        raise UserError("tracking.id is one run's, and a study has several; leave it out")
    keys = {argument: _split(argument)[0] for argument in settings if argument not in several}
    own = ("output", "runs_dir")
    reading = [argument for argument, key in keys.items() if key.startswith(READER_KEYS) and key not in own]
    return Study(key, configs, reading, output)


def _alternatives(argument: str) -> list[str]:
    """The values of `key=value,value`; a path is one value."""
    key, text = _split(argument)
    if key in _PATHS:
        return [text]
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and (depth or not values[-1]):
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    return values


def _in_a_name(value: Any) -> str:
    """A value as a part of a folder's name: `[400, 400]` as `400-400`."""
    text = re.sub(r"[\[\] ]", "", as_text(value)).replace(",", "-")
    return re.sub(r"[^A-Za-z0-9._-]", "_", text) or "empty"


def help_text(usage: str, prefixes: tuple[str, ...] = ("",)) -> str:
    """What `--help` prints: the usage, then every key under `prefixes` with its type, default and meaning."""
    lines = [usage.rstrip(), "", "Keys, with their types and defaults:"]
    for option in (option for option in options() if option.key.startswith(prefixes)):
        limits = {"at least": option.at_least, "above": option.above, "at most": option.at_most}
        bounds = ", ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        meaning = option.help + (f" ({bounds})" if bounds else "")
        lines.append(f"  {option.key}={as_text(option.default)}   [{option.type}]")
        lines.extend(textwrap.wrap(meaning, 100, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)


class _Setting(NamedTuple):
    """One key, what a file or an argument gives it (None, text, or lists of these), and where that was said."""

    key: str
    value: Any
    source: str  # "some.yaml: ", or nothing for an argument, which names its key itself


def _read_yaml(path: Path) -> list[_Setting]:
    _require_text(str(path), "a file's name")
    if path.suffix not in YAML:
        raise UserError(f"can't use {_short(repr(str(path)))}: give a YAML file, or key=value (--help lists the keys)")
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"can't read the config file {_short(str(path))}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"can't read the config file {path}: byte {error.start} is not UTF-8 text") from error
    settings = list(_settings(_parse_yaml(text, str(path)), f"{path}: "))
    if twice := [key for key, count in Counter(setting.key for setting in settings).items() if count > 1]:
        raise UserError(f"{path}: {twice[0]} is given twice")
    return settings


def _settings(values: Any, source: str, prefix: str = "") -> Iterator[_Setting]:
    """The keys that a file's nested `values` set. Raises UserError for keys that there are none of."""
    if values is None:  # an empty file or group
        return
    if not isinstance(values, dict):
        raise UserError(f"{source}{prefix.rstrip('.') or 'it'} must hold keys and values, not {as_text(values)}")
    for name, value in values.items():
        key = prefix + name
        if any(other.startswith(f"{key}.") for other in _options()):
            yield from _settings(value, source, f"{key}.")
        else:
            _require_known(key, source)
            yield _Setting(key, value, source)


def _split(argument: str) -> tuple[str, str]:
    _require_text(argument, "an argument", limit=None)
    key, separator, value = argument.partition("=")
    key = key.removeprefix("--")
    if not separator:
        raise UserError(f"can't use {_short(repr(argument))}: give key=value (--help lists the keys)")
    return key, value


def _parse_argument(argument: str) -> _Setting:
    """`a.b=value`. A value without brackets is text whatever it looks like: `name=a: b` and `name=#1` are.

    So is one with brackets where the key is of text, and a path that exists. `argument` writes what this reads.
    """
    key, text = _split(argument)
    _require_known(key)
    is_path, is_text = key in _PATHS, _options()[key].type.startswith("text")
    is_yaml = text in ("null", "") or (text == "~" and not is_path) or text[:1] in ('"', "'")
    if (not is_text and text[:1] in ("[", "{")) or (is_yaml and not (is_path and os.path.lexists(text))):
        return _Setting(key, _parse_yaml(text, key), "")
    return _Setting(key, text, "")


def argument(key: str, value: Any) -> str:
    """`key=value` as one types it for the key to get this value again."""
    is_read = isinstance(value, str) and (value[:1] in tuple("[{\"'~") or value in ("null", ""))
    return f"{key}={json.dumps(value, ensure_ascii=False) if is_read else text_of(value)}"


def text_of(value: Any) -> str:
    """A value as a file has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse_yaml(text: str, source: str) -> Any:
    """What a YAML document holds, as dictionaries, lists, text and None. Raises UserError for all else.

    Read from the parser's events. What YAML has beyond these (tags, aliases, merges) is refused, not constructed.
    """
    try:
        parser: Any = yaml.BaseLoader(text)
        parser.get_event()  # the stream begins
        if parser.check_event(yaml.StreamEndEvent):
            return None
        parser.get_event()  # the document begins
        value = _build(parser, iter(range(MAX_VALUES)), depth=0)
        parser.get_event()  # the document ends
        if not parser.check_event(yaml.StreamEndEvent):
            raise _UnusedYAMLError(problem="it goes on after its end", problem_mark=parser.peek_event().start_mark)
        return value
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: numbers in escapes and directives
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark and mark.line else ""
        verdict = "can't be used" if isinstance(error, _UnusedYAMLError) else "is not valid YAML"
        problem = getattr(error, "problem", None) or getattr(error, "reason", "a number in it is too large")
        raise UserError(f"{source}{where} {verdict}: {_short(str(problem))}") from error


class _UnusedYAMLError(yaml.MarkedYAMLError):
    """YAML, but nothing that a config needs."""


def _build(parser: Any, budget: Iterator[int], depth: int) -> Any:
    """The value that the parser's next event begins."""
    event = parser.get_event()

    def refuse(problem: str) -> NoReturn:
        raise _UnusedYAMLError(problem=problem, problem_mark=event.start_mark)

    if next(budget, None) is None:
        refuse(f"it has more than {MAX_VALUES} values")
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        refuse("'&' and '*' make aliases, which configs do without; write the value out, or quote text that begins so")
    if event.tag is not None:
        refuse("'!' makes a tag, which configs do without; quote text that begins so")
    if isinstance(event, yaml.ScalarEvent):
        if found := _UNPRINTABLE.search(event.value):
            refuse(f"it holds {found[0]!a}, which no path or name can have")
        return None if event.implicit[0] and _NULL.fullmatch(event.value) else event.value
    if depth == _MAX_DEPTH:
        refuse("it is nested too deeply")
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not parser.check_event(yaml.SequenceEndEvent):
            items.append(_build(parser, budget, depth + 1))
        parser.get_event()
        return items
    values: dict[str, Any] = {}
    while not parser.check_event(yaml.MappingEndEvent):
        event = parser.peek_event()
        key = _build(parser, iter((0,)), depth + 1) if isinstance(event, yaml.ScalarEvent) else None
        if not isinstance(key, str):
            refuse("a key must be text")
        if key in values:
            refuse(f"{_short(repr(key))} is given twice")
        values[key] = _build(parser, budget, depth + 1)
    parser.get_event()
    return values


def _require_text(text: str, what: str, limit: int | None = MAX_TEXT) -> None:
    """Raise UserError for text that no path and no name can be."""
    if found := _UNPRINTABLE.search(text):
        raise UserError(f"{what} holds a character that can't be used, {found[0]!a}: {_short(ascii(text))}")
    if limit is not None and len(text.encode()) > limit:
        raise UserError(f"{what} has {len(text.encode())} bytes; {limit} are the most: {_short(text)}")


def _require_known(key: str, source: str = "") -> None:
    known = _options()
    if key in known:
        return
    inside = [other for other in known if other.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{key} is a group of keys; set one of them: {', '.join(inside)}")
    last = key.rpartition(".")[2]
    same_last = [other for other in known if other.rpartition(".")[2] == last]
    guesses = same_last or difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(guesses)}?" if guesses else "--help lists the keys"
    raise UserError(f"{source}unknown key {_short(repr(key))}; {hint}")


def _apply(config: Config, settings: Sequence[_Setting], *, has_homes: bool = True) -> Config:
    """`config` with `settings`, later ones winning. Raises UserError for a value that does not fit its key.

    `~` at the start of a path is a home, unless `has_homes` is false.
    """
    final = {**flatten(config), **{setting.key: setting.value for setting in settings}}
    result = OmegaConf.structured(config)
    for key, value, source in settings:
        value = _fill_in(value, final, f"{source}{key}")
        try:
            if value is not None and not _fits(value, _options()[key].depth):
                raise TypeError
            if has_homes and key in _PATHS and isinstance(value, str):
                value = expand(value, f"{source}{key}")
            OmegaConf.update(result, key, value)
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(f"{source}{key} must be {_options()[key].type}, not {as_text(value)}") from error
    built = OmegaConf.to_object(result)
    assert isinstance(built, Config)
    return built


def _fits(value: Any, depth: int) -> bool:
    """Whether `value` is text in `depth` lists. OmegaConf takes a list for text, and `???` for no value yet."""
    if isinstance(value, list):
        return depth > 0 and all(_fits(item, depth - 1) for item in value)
    return depth == 0 and isinstance(value, str) and value != "???"


def _fill_in(value: Any, values: Mapping[str, Any], where: str) -> Any:
    """`value` with `${key}` in its text replaced by what `values` has for that key."""
    if isinstance(value, list):
        return [_fill_in(item, values, where) for item in value]
    if not isinstance(value, str):
        return value

    def referenced(match: re.Match[str]) -> str:
        _require_known(match[1], f"{where}: ")
        other = values[match[1]]
        if other is None or isinstance(other, list | dict):
            raise UserError(f"{where}: {match[0]} stands for no text; {match[1]} is {as_text(other)}")
        return other if isinstance(other, str) else as_text(other)

    _require_text(value, where)
    filled = _REFERENCE.sub(referenced, value)
    _require_text(filled, where)
    if "${" in filled:
        raise UserError(f"{where}: ${{...}} can hold the name of a key whose value has none itself: {_short(value)}")
    return filled


def _leaves(value: Any) -> Iterator[Any]:
    """The scalars in a value, in lists or not."""
    if isinstance(value, list | dict):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _count(value: Any) -> int:
    """How many values there are, as `_parse_yaml` counts them."""
    inside: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(_count(item) for item in inside)


def _type_name(hint: Any) -> str:
    """A type as a user reads it: `int or null`, `none, threshold or dynamic`, `list of int`."""
    text = str(hint).removeprefix("<class '").removesuffix("'>")
    if text.startswith("typing.Literal["):
        return "one of " + ", ".join(re.findall(r"'([^']+)'", text))
    text = text.replace("list[list[float]]", "list of lists of float")
    text = re.sub(r"list\[(\w+)\]", r"list of \1", text)
    return text.replace(" | None", " or null").replace("str", "text")


def as_text(value: Any) -> str:
    """A value as a user would type it, in one line."""
    return _short(text_of(value))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
