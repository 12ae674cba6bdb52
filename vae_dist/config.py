"""Every knob of a run, and how files and arguments become one.

A config is built in three layers, later ones winning: the defaults below, YAML files, `key=value` arguments. OmegaConf
merges and checks the types; what leaves this module are plain dataclasses.

Scalars reach their field as the text that the user typed, and the field's type decides what they mean. YAML's own
guesses never apply: `name: 007` stays `007` and `tags: [on]` stays `on`.
"""

import dataclasses
import difflib
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from vae_dist.errors import UserError

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"]


def knob(default: Any, help: str, *, above: float | None = None, at_least: float | None = None) -> Any:
    """A dataclass field with its meaning and its bounds; a list's bounds hold for each item."""
    metadata = {"help": help, "above": above, "at_least": at_least}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    name: str = knob(
        "auto",
        "mnist, fashion_mnist, kmnist, synthetic_digits; auto: MNIST where it can be had, otherwise synthetic_digits",
    )
    root: str = knob("data", "folder of the data sets, laid out as torchvision does")
    download: bool = knob(True, "download what is missing under data.root")
    mirror: str | None = knob(None, "URL to download from in place of the data set's own mirrors")
    validation_images: int = knob(5000, "images held out of the training set; 0 trains on all of it", at_least=0)
    binarize: Literal["none", "threshold", "dynamic"] = knob(
        "none",
        "none: grey pixels; threshold: 1 from 128 up; dynamic: training pixels drawn afresh at every step, others once",
    )
    image_shape: list[int] | None = knob(None, "channels, height and width; null: as the data has them")
    synthetic_images: int = knob(60_000, "training images of synthetic_digits; a sixth as many test images", at_least=6)


@dataclass
class ModelConfig:
    architecture: str = knob("mlp", "name of an entry of ARCHITECTURES in vae_dist/model/__init__.py")
    latent_dim: int = knob(40, "number of latents", at_least=1)
    hidden_dims: list[int] = knob([400], "sizes of the encoder's hidden layers; the decoder mirrors them", at_least=1)


@dataclass
class ObjectiveConfig:
    reconstruction: str = knob("bernoulli", "likelihood of the pixels: bernoulli or gaussian")
    sigma: float = knob(1.0, "standard deviation of the gaussian likelihood, in units of white = 1", above=0)
    beta: float = knob(1.0, "weight of the KL in the training loss; reported figures always have 1", at_least=0)
    beta_warmup_steps: int = knob(0, "optimizer steps over which beta rises linearly from 0", at_least=0)


@dataclass
class OptimConfig:
    learning_rate: float = knob(1e-3, "Adam's learning rate after the warm-up", above=0)
    warmup_steps: int = knob(0, "optimizer steps over which the learning rate rises linearly from 0", at_least=0)
    schedule: Literal["constant", "cosine"] = knob("constant", "learning rate after the warm-up")
    decay_steps: int | None = knob(
        None, "optimizer step at which the cosine reaches 0; null: the run's last", at_least=1
    )
    max_grad_norm: float | None = knob(None, "clip the gradient to this norm; null: no clipping", above=0)


@dataclass
class TrainConfig:
    epochs: int = knob(5, "passes over the training images", at_least=1)
    steps: int | None = knob(None, "optimizer steps; overrides train.epochs", at_least=1)
    batch_size: int = knob(100, "images per optimizer step, over all processes", at_least=1)
    accumulate: int = knob(1, "parts that each process splits its share of a batch into, to save memory", at_least=1)
    precision: Precision = knob("auto", "auto: what the launcher says; tf32 and fp16 need CUDA; fp64 is for checking")
    threads: int | None = knob(None, "CPU threads of each process; null: the machine's cores shared evenly", at_least=1)
    log_every: int = knob(100, "optimizer steps between rows of training metrics", at_least=1)
    validate_every: int | None = knob(
        None, "optimizer steps between validations and pictures; null: an epoch", at_least=1
    )
    nonfinite: Literal["stop", "skip"] = knob(
        "stop", "when loss or gradient are not finite: stop the run, or skip that update; it is never taken"
    )
    max_skipped: int = knob(10, "updates that may be skipped before the run stops", at_least=0)


@dataclass
class CheckpointConfig:
    every: int | None = knob(None, "optimizer steps between checkpoints; null: an epoch", at_least=1)
    keep: int = knob(2, "newest checkpoints to keep; the best by validation is kept beside them", at_least=2)
    resume: str = knob("auto", "auto: go on where a run of this name stopped; must; never; or a checkpoint's path")


@dataclass
class TrackingConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = knob(
        "auto", "auto: online where an account is set up, otherwise offline"
    )
    project: str = knob("vae_dist", "Weights & Biases project")
    entity: str | None = knob(None, "Weights & Biases user or team; null: the account's default")
    tags: list[str] = knob([], "tags of the Weights & Biases run")
    id: str | None = knob(None, "identity of the Weights & Biases run; null: made when the run starts")


@dataclass
class RuntimeConfig:
    start_timeout: float = knob(600.0, "seconds that processes wait for one another until the run has begun", above=0)
    timeout: float = knob(600.0, "seconds that they wait for one another from then on", above=0)
    verify_every: int | None = knob(
        None,
        "optimizer steps between checks that all processes hold the same weights; null: at the end alone",
        at_least=1,
    )


@dataclass
class EvaluateConfig:
    batch_size: int = knob(500, "images per block; the blocks are the same on any number of processes", at_least=1)


@dataclass
class SampleConfig:
    count: int = knob(64, "images to draw from the prior", at_least=1)
    seed: int = knob(0, "seed of the latents", at_least=0)
    codes: list[list[float]] | None = knob(None, "latents to decode, one list each; null: draws from the prior")
    files: bool = knob(False, "write each image as a file of its own too")


@dataclass
class Config:
    name: str | None = knob(None, "the run's name; {time} becomes its start; null: the config file's name and {time}")
    runs_dir: str = knob("runs", "folder of the runs")
    seed: int = knob(0, "seed of weights, batches and noise", at_least=0)
    device: str = knob("auto", "auto, cpu, cuda or mps")
    output: str | None = knob(None, "folder for what evaluation and sampling write; null: the run's directory")
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
    "train.log_every", "train.validate_every", "train.nonfinite", "train.max_skipped", "checkpoint.",
)  # fmt: skip

_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._{}-]{0,127}")
_WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Knob:
    """One key as `--help` shows it."""

    key: str
    type: str
    default: Any
    help: str
    above: float | None
    at_least: float | None


def knobs(section: Any = Config, prefix: str = "") -> Iterator[Knob]:
    """Every key of the config, in the order of this file."""
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from knobs(hint, f"{prefix}{item.name}.")
            continue
        has_factory = item.default_factory is not dataclasses.MISSING
        default = item.default_factory() if has_factory else item.default  # type: ignore[operator]
        yield Knob(f"{prefix}{item.name}", _type_name(hint), default, **item.metadata)


def flatten(config: Config) -> dict[str, Any]:
    """The config as `{"model.latent_dim": 40, ...}`."""
    values = {}
    for key in (knob.key for knob in knobs()):
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    return values


def load(arguments: Sequence[str]) -> Config:
    """The config that `[FILE.yaml ...] [key=value ...]` asks for. Raises UserError for what can't be used."""
    files = [argument for argument in arguments if "=" not in argument]
    layers = [(path, _read_yaml(Path(path))) for path in files]
    layers += [_override(argument) for argument in arguments if "=" in argument]
    config = _merge(Config(), layers)
    if config.name is None:
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(files[-1]).stem) if files else "tutorial"
        config.name = f"{stem}-{{time}}"
    check(config)
    return config


def load_reader(config: Config, arguments: Sequence[str]) -> Config:
    """The config of a finished run with the `key=value` arguments of an evaluation or a sampling."""
    for key in (_split(argument)[0] for argument in arguments):
        if not key.startswith(READER_KEYS):
            _require_known(key, argument=key)
            allowed = ", ".join(f"{key}*" if key.endswith(".") else key for key in READER_KEYS)
            raise UserError(f"{key} belongs to the training and can't be changed here; what can: {allowed}")
    # This machine's own number of threads, not that of the one that trained.
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, threads=None))
    config = _merge(config, [_override(argument) for argument in arguments])
    check(config)
    return config


def take(arguments: Sequence[str], key: str) -> tuple[str, list[str]]:
    """The last value that the arguments give to a text key, or its default; and the other arguments."""
    pairs = [(_split(argument), argument) for argument in arguments]
    values = [value for (name, value), _ in pairs if name == key]
    default = next(knob.default for knob in knobs() if knob.key == key)
    return values[-1] if values else default, [argument for (name, _), argument in pairs if name != key]


def read(path: Path) -> Config:
    """The config that `save` wrote. It is data: nothing in it is interpolated."""
    values = _read_yaml(path)
    if "${" in path.read_text(encoding="utf-8"):
        raise UserError(f"{path} holds an interpolation, which a saved config never does; it is not to be trusted")
    config = _merge(Config(), [(str(path), values)])
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
        changes = ", ".join(f"{key} (was {_as_text(theirs[key])}, now {_as_text(ours[key])})" for key in keys)
        raise UserError(f"run {config.name} can't go on with another {changes}; choose another name for a new run")
    return merged


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save(config: Config, path: Path) -> None:
    path.write_text(to_yaml(config), encoding="utf-8")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def check(config: Config) -> None:
    """Raise UserError for the first value that no run can have."""
    values = flatten(config)
    for knob in knobs():
        value = values[knob.key]
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{knob.key} must be a finite number, not {item}")
            if knob.at_least is not None and item is not None and item < knob.at_least:
                raise UserError(f"{knob.key} must be at least {knob.at_least}, not {item}")
            if knob.above is not None and item is not None and item <= knob.above:
                raise UserError(f"{knob.key} must be above {knob.above}, not {item}")
    if config.name is not None and not _RUN_NAME.fullmatch(config.name):
        raise UserError(
            f"name={config.name!r} can't be a folder's name: use letters, digits, '.', '_' and '-', up to 128 of them"
        )
    if config.tracking.id is not None and not _WANDB_ID.fullmatch(config.tracking.id):
        raise UserError(
            f"tracking.id={config.tracking.id!r} can't be the identity of a W&B run: use letters, digits, '_' and '-', "
            "up to 64 of them"
        )


def split_run(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """`[RUN] [key=value ...]` as the run's path, None where it is left out, and the rest."""
    paths = [argument for argument in arguments if "=" not in argument]
    if len(paths) > 1:
        raise UserError(f"one run at a time, not {', '.join(paths)}")
    if paths and paths[0].startswith("-"):
        raise UserError(f"unknown option {paths[0]}; give a run's directory and key=value (--help lists the keys)")
    return Path(paths[0]) if paths else None, [argument for argument in arguments if "=" in argument]


def help_text(usage: str, prefixes: tuple[str, ...] = ("",)) -> str:
    """What `--help` prints: the usage, then every key under `prefixes` with its type, default and meaning."""
    lines = [usage.rstrip(), "", "Keys, with their types and defaults:"]
    for knob in (knob for knob in knobs() if knob.key.startswith(prefixes)):
        bounds = [f"at least {knob.at_least}"] * (knob.at_least is not None) + [f"above {knob.above}"] * (
            knob.above is not None
        )
        meaning = knob.help + (f" ({bounds[0]})" if bounds else "")
        lines.append(f"  {knob.key}={_as_text(knob.default)}   [{knob.type}]")
        lines.extend(textwrap.wrap(meaning, 100, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)


class _TextLoader(yaml.BaseLoader):
    """YAML whose scalars are text, except for a null that is not in quotes."""


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def _read_yaml(path: Path) -> Any:
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"can't use {str(path)!r}: give a YAML file, or key=value (--help lists the keys)")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the config file {path} is no text: {error}") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_TextLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark and mark.line else ""
        raise UserError(f"{source}{where} is not valid YAML: {getattr(error, 'problem', error)}") from error


def _split(argument: str) -> tuple[str, str]:
    key, separator, value = argument.partition("=")
    key = key.removeprefix("--")
    if not separator:
        raise UserError(f"can't use {argument!r}: give key=value (--help lists the keys)")
    return key, value


def _override(argument: str) -> tuple[str, Any]:
    """`a.b=value` as a layer `{"a": {"b": value}}` with the argument as its source."""
    key, value = _split(argument)
    _require_known(key, argument)
    # A value without brackets is text whatever it looks like: `name=a: b` is no mapping and `name=#1` no comment.
    layer: Any = _parse_yaml(value, argument) if value[:1] in tuple("[{\"'~") or value in ("null", "") else value
    for part in reversed(key.split(".")):
        layer = {part: layer}
    return argument, layer


def _require_known(key: str, argument: str) -> None:
    known = [knob.key for knob in knobs()]
    if key in known:
        return
    inside = [other for other in known if other.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{key} is a group of keys; set one of them: {', '.join(inside)}")
    last = key.rpartition(".")[2]
    same_last = [other for other in known if other.rpartition(".")[2] == last]
    guesses = same_last or difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(guesses)}?" if guesses else "--help lists the keys"
    raise UserError(f"unknown key {key!r}{'' if argument.startswith(key) else f' in {argument}'}; {hint}")


def _merge(config: Config, layers: Sequence[tuple[str, Any]]) -> Config:
    for resolver in ("oc.env", "oc.coerce", "oc.create", "oc.decode", "oc.deprecated"):
        OmegaConf.clear_resolver(resolver)  # a config names values; it neither reads the environment nor imports
    merged = OmegaConf.structured(config)
    for source, values in layers:
        if values is not None and not isinstance(values, dict):
            raise UserError(f"{source} must hold keys and values, not {type(values).__name__}")
        try:
            merged = OmegaConf.merge(merged, values or {})
        except ConfigKeyError as error:
            _require_known(str(error.full_key), argument=source)
            raise
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(_explain(source, values, error)) from error
    try:
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"the config can't be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(result, Config)
    return result


def _explain(source: str, values: Any, error: Exception) -> str:
    """One line for a value that does not fit its key, with the type that would; OmegaConf names nearly every key."""
    types = {knob.key: knob.type for knob in knobs()}
    key = re.sub(r"\[\d+\]$", "", str(getattr(error, "full_key", None)))
    if key not in types:
        return f"{source}: a value has the wrong form: {str(error).splitlines()[0]}"
    value = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else value
    where = "" if source.removeprefix("--").startswith(key) else f"{source}: "
    return f"{where}{key} must be {types[key]}, not {_as_text(value)}"


def _type_name(hint: Any) -> str:
    """A type as a user reads it: `int or null`, `none, threshold or dynamic`, `list of int`."""
    text = str(hint).removeprefix("<class '").removesuffix("'>")
    if text.startswith("typing.Literal["):
        return "one of " + ", ".join(re.findall(r"'([^']+)'", text))
    text = text.replace("list[list[float]]", "list of lists of float")
    text = re.sub(r"list\[(\w+)\]", r"list of \1", text)
    return text.replace(" | None", " or null").replace("str", "text")


def _as_text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
