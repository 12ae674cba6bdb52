"""The page about a run: what page.html is filled with. All text from the run is escaped where it enters. L latents."""

import hashlib
import logging
import re
import shlex
import statistics
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.distributed import processes
from vae_dist.files import ELSEWHERE, make_folder, write_atomically, writing
from vae_dist.models.vae import VAE
from vae_dist.reports import plane
from vae_dist.reports.markup import Curve, Html, data_uri, element, escape, figure, join, line_chart, notice
from vae_dist.runs import checkpoint, console, manifest, record, tracking
from vae_dist.runs.checkpoint import Opened
from vae_dist.runs.record import Record, is_number

logger = logging.getLogger(__name__)

GRIDS_CHARACTERS = 1_500_000
MOST_GRIDS = 10  # steps that the slider moves over
MOST_POINTS = 1000  # of a curve
LOG_CHARACTERS = 20_000  # the last ones

# Title, unit, and the metric's name behind `train/` and `validation/`.
_CURVES = (
    ("Negative ELBO", "nats per image", "negative_elbo"),
    ("Reconstruction", "nats per image", "reconstruction"),
    ("KL", "nats per image", "kl"),
    ("Training loss", "nats per image", "loss"),
    ("Gradient norm", "before clipping", "grad_norm"),
    ("Learning rate", "Adam's", "learning_rate"),
    ("Beta", "weight of the KL in the loss", "beta"),
    ("Speed", "images per second", "images_per_second"),
)
# Key in evaluation.json, name and unit; the first that is there makes the headline.
_FIGURES = (
    ("negative_log_likelihood", "negative log-likelihood", "nats, at most"),
    ("negative_elbo", "negative ELBO", "nats"),
    ("reconstruction", "reconstruction", "nats"),
    ("kl", "KL", "nats"),
    ("bits_per_dimension", "bits per dimension", "bits"),
    ("mean_squared_error", "mean squared error", "per pixel"),
)
_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", re.MULTILINE)
_OF_ONE_RUN = ("name", "runs_dir", "output", "data.image_shape", "tracking.")  # what another run may have otherwise


def report(run: Path | None, arguments: Sequence[str] = ()) -> Path:
    """Write `report.html` about a run as its newest checkpoint has it, or as the checkpoint that `run` is; the newest
    run by default. The same run gives the same bytes.

    Returns the file. Raises UserError where there is no checkpoint.
    """
    with checkpoint.open_for_reading(run, arguments) as opened, processes.join(opened.config) as world:
        console.start(world)
        return world.on_main(lambda: _write(opened, world.device))


def _write(opened: Opened, device: torch.device) -> Path:
    make_folder(opened.output, ELSEWHERE)
    path = opened.output / "report.html"
    vae = checkpoint.load_vae(opened.folder, opened.config, device)
    content = _page(record.read(opened), vae, opened.config).encode()
    with writing(path, ELSEWHERE):
        write_atomically(path, content)
    logger.info("written to %s (%.1f MB); any browser opens it", path, len(content) / 1e6)
    return path


def _page(run: Record, vae: VAE, config: Config) -> str:
    """The whole page; `config` says where the data lie on this machine."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    kl = run.evaluation.get("kl_per_latent")
    is_evaluated = (
        run.evaluation.get("step") == run.step
        and isinstance(kl, list)
        and len(kl) == vae.latent_dim
        and all(map(is_number, kl))
    )
    seen = plane.look(vae, config, kl if is_evaluated else None)
    parts = {
        "policy": _policy(template),
        "name": str(run.config.name),
        "step": f"{run.step:,}",
        "subtitle": _subtitle(run.config, vae),
        "status": _status(run),
        "headline": _headline(run),
        "curves": _curves(run),
        "pictures": _pictures(run),
        **plane.parts(seen),
        "kl": plane.kl_chart(
            seen, "the evaluation's images" if is_evaluated else f"the first {len(seen.labels):,} test images"
        ),
        "changed": _changed(run.config),
        "settings": _settings(run.config),
        "machine": _machine(run),
        "log": run.log[-LOG_CHARACTERS:] or "There is no log.txt beside this checkpoint.",
        **_reproduce(run),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: escape(parts[match[1]]), template)


def _policy(template: str) -> str:
    """A Content-Security-Policy for the template: its own style and script, pictures that are inside, nothing else."""
    sources = {}
    for name in ("style", "script"):
        inside = re.findall(rf"<{name}>(.*?)</{name}>", template, re.DOTALL)
        hashes = (b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside)
        sources[name] = " ".join(f"'sha256-{found}'" for found in hashes)
    return (
        f"default-src 'none'; img-src data:; style-src {sources['style']}; script-src {sources['script']}; "
        "base-uri 'none'; form-action 'none'"
    )


def _soft(text: str) -> Html:
    return element("span", text, class_="soft")


def _count(count: int, noun: str, plural: str) -> str:
    return f"{count:,} {noun if count == 1 else plural}"


def _facts(facts: Mapping[str, str], name: str = "facts") -> Html:
    return element("dl", *(element("div", element("dt", key), element("dd", facts[key])) for key in facts), class_=name)


def _subtitle(config: Config, vae: VAE) -> str:
    sizes = "-".join(map(str, config.model.hidden_dims))
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    return (
        f"A variational autoencoder of {config.data.name}: {config.model.architecture} {sizes}, "
        f"{_count(config.model.latent_dim, 'latent', 'latents')}, {parameters:,} parameters"
    )


def _status(run: Record) -> Html:
    at = f"step {run.reached:,}" + (f" of {run.last_step:,}" if run.last_step else "")
    if run.is_being_trained:
        said = [
            f"Still training, at {at}. This page is made anew by ",
            element("code", f"make report RUN={run.path}"),
            ".",
        ]
    elif run.last_step and run.reached < run.last_step:
        again = element("code", f"name={shlex.quote(str(run.config.name))}")
        said = [f"Stopped at {at}. The command that it was started with goes on, given ", again, "."]
    else:
        said = [f"Trained for {run.reached:,} steps."]
    shown = [] if run.step == run.reached else [f" This page shows the checkpoint of step {run.step:,}."]
    return join([*said, *shown])


def _headline(run: Record) -> Html:
    """The figure that counts, its standard error and its protocol; all others after it."""
    found = run.evaluation
    given = [entry for entry in _FIGURES if is_number(found.get(entry[0]))]
    if not given:
        advice = notice("This run has not been evaluated yet. That is done by", f"make eval RUN={run.path}")
        validations = run.points("validation/negative_elbo")[-1:]
        name = "negative ELBO on validation images, step"
        return join([*(_big(value, None, "nats", f"{name} {step:,}") for step, value in validations), advice])
    protocol, errors = (
        value if isinstance(value := found.get(key), dict) else {} for key in ("protocol", "standard_errors")
    )
    key, name, unit = given[0]
    samples = f", {_plain(found.get('importance_samples'))} importance samples"
    parts = [
        _big(found[key], errors.get(key), unit, name + samples * (key == "negative_log_likelihood")),
        element("p", _protocol(found, protocol), class_="soft"),
    ]
    if not is_number(errors.get(key)):
        parts.append(element("p", "This evaluation states no standard error.", class_="soft"))
    if found.get("step") != run.step:
        parts.append(notice(f"These are not the figures of step {run.step:,}, which the rest of this page shows."))
    if isinstance(warning := found.get("warning"), str):
        parts.append(element("p", warning[:1].upper() + warning[1:].rstrip(".") + ".", class_="warning"))
    others = {
        name: join([*_with_error(found[key], errors.get(key)), " ", _soft(unit)]) for key, name, unit in given[1:]
    }
    if is_number(active := found.get("active_units")):
        others["active units"] = join([f"{active:g} ", _soft(f"of {run.config.model.latent_dim}")])
    parts.append(_facts(others, "figures"))
    if protocol:
        flat = {key: value for key, value in protocol.items() if not isinstance(value, dict)}
        for group, inside in protocol.items():
            flat |= {f"{group}: {key}": value for key, value in inside.items()} if isinstance(inside, dict) else {}
        facts = _facts({key: _plain(value) for key, value in flat.items()})
        parts.append(element("details", element("summary", "Protocol in full"), facts))
    return join(parts)


def _protocol(found: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """What an evaluation was made on, in a line."""
    pixels = protocol.get("pixels", f"data.binarize={_plain(found.get('binarize'))}")
    likelihood = protocol.get("likelihood", found.get("likelihood"))
    images, split, dataset, step = (_plain(found.get(key)) for key in ("images", "split", "dataset", "step"))
    return (
        f"{images} {split} images of {dataset}; pixels: {_plain(pixels)}; likelihood: {_plain(likelihood)}; step {step}"
    )


def _big(value: float, error: Any, unit: str, name: str) -> Html:
    return element("p", element("b", *_with_error(value, error)), " ", _soft(unit), element("span", name), class_="big")


def _with_error(value: float, error: Any) -> list[str]:
    """A figure and, where it has one, its standard error to the same place."""
    shown = figure(value)
    places = len(shown.partition(".")[2]) if "e" not in shown else 0
    return [shown, *([element("small", f" ± {error:.{places}f}")] if is_number(error) else [])]


def _plain(value: Any) -> str:
    """A value from a file, in words."""
    if isinstance(value, list):
        return ", ".join("..." if isinstance(item, list) else _plain(item) for item in value[:100])
    if is_number(value):
        return f"{value:,}"
    return "not stated" if value is None else "..." if isinstance(value, dict) else str(value)


def _curves(run: Record) -> Html:
    charts: list[Html] = []
    drawn: list[list[str]] = []
    every = 1
    for title, unit, name in _CURVES:
        curves = []
        for group, prefix in (("training", "train"), ("validation", "validation")):
            points = run.points(f"{prefix}/{name}")
            thinned = -(-len(points) // MOST_POINTS)
            every = max(every, thinned)
            if points:
                curves.append(Curve(group, points[(len(points) - 1) % thinned :: thinned]))  # the last one stays
        figures = [figure(value) for curve in curves for _, value in curve.points if curve.name == "training"]
        # With beta at 1 the loss is the negative ELBO, and need not be drawn twice.
        is_said = (name == "loss" and figures in drawn) or (name == "beta" and set(figures) == {"1.00"})
        if curves and not is_said:
            charts.append(line_chart(title, unit, curves))
            drawn.append(figures)
    if not charts:
        return notice(f"There is no row in {tracking.METRICS} beside this checkpoint, so there are no curves.")
    key = [
        join([element("svg", element("line", x2="100%", y1="50%", y2="50%", class_=name)), name])
        for name in ("training", "validation")
    ]
    thinned_out = f" Of long curves every {every}th row is drawn." if every > 1 else ""
    how = element("span", " A pointer, a finger or the arrow keys read all charts at one step.", class_="live-only")
    return join([element("p", *key, how, thinned_out, class_="key"), element("div", *charts, class_="curves")])


def _pictures(run: Record) -> Html:
    """The grids of the newest validation; with a script, of those before too."""
    held_out = "Validation images" if run.config.data.validation_images else "Training images (none are held out)"
    captions = {
        "reconstructions": f"{held_out}, each row over its reconstruction from the posterior's mean",
        "samples": "Samples from the prior (means of p(x|z)), from the same latents at every step",
    }
    shown = run.grids(captions, MOST_GRIDS)
    steps = sorted({step for _, step in shown})
    if not shown:
        return notice("There are no pictures of validations here. Samples are drawn by", f"make sample RUN={run.path}")
    figures = []
    for kind, caption in captions.items():
        images = [
            element(
                "img",
                src=data_uri(picture, GRIDS_CHARACTERS // len(shown)),
                alt=f"{caption}; step {step:,}",
                width=picture.width,
                height=picture.height,
                data_step=step,
                hidden=step != steps[-1],
            )
            for (its_kind, step), picture in shown.items()
            if its_kind == kind
        ]
        figures += [element("figure", *images, element("figcaption", caption))] if images else []
    last = len(steps) - 1
    slider = element("input", type="range", min=0, max=last, value=last, data_steps=" ".join(map(str, steps)))
    label = element("label", "Optimizer step ", element("output", f"{steps[-1]:,}"), slider, class_="live-only")
    return join([*([label] if last else []), element("div", *figures, class_="grids")])


def _changed(config: Config) -> Html:
    """The settings that differ from their defaults, with what they mean."""
    values = configs.flatten(config)
    entries = [
        element(
            "div",
            element("dt", element("code", option.key), element("p", option.help, class_="soft")),
            element(
                "dd",
                element("b", configs.text_of(values[option.key])),
                element("p", f"default: {configs.text_of(option.default)}", class_="soft"),
            ),
        )
        for option in configs.options()
        if values[option.key] != option.default
    ]
    return element("dl", *entries, class_="facts changed")


def _settings(config: Config) -> Html:
    """All settings in their groups; what differs from its default is marked."""
    values = configs.flatten(config)
    groups: dict[str, dict[str, str]] = {}
    for option in configs.options():
        group, _, name = option.key.rpartition(".")
        value = configs.text_of(values[option.key])
        groups.setdefault(group or "run", {})[name] = (
            value if values[option.key] == option.default else element("mark", value)
        )
    return join([element("section", element("h3", group), _facts(facts)) for group, facts in groups.items()])


def _machine(run: Record) -> Html:
    times, unknown = _TIME.findall(run.log), "not recorded"
    _, device, threads = run.launches[-1] if run.launches else ("", unknown, "")
    speeds = [value for _, value in run.points("train/images_per_second")]
    versions = run.manifest.get("versions")
    return _facts(
        {
            "started": times[0] if times else unknown,
            "last entry of the log": times[-1] if times else unknown,
            "launched": _count(len(run.launches), "time", "times") if run.launches else unknown,
            "processes": str(run.state.world_size),
            "device": device,
            "threads of each": threads or configs.text_of(run.config.train.threads),
            "precision": run.config.train.precision,
            "speed, the median": f"{figure(statistics.median(speeds))} images per second" if speeds else unknown,
            "updates left out": str(run.state.skipped_updates),
            **({key: _plain(version) for key, version in versions.items()} if isinstance(versions, dict) else {}),
        }
    )


def _reproduce(run: Record) -> dict[str, str]:
    """The command that trains this run anew, and what it then has to be equal to."""
    values = configs.flatten(run.config)
    given = [
        configs.argument(option.key, values[option.key])
        for option in configs.options()
        if values[option.key] != option.default and not option.key.startswith(_OF_ONE_RUN)
    ]
    size = run.state.world_size
    launch = ["python"] if size == 1 else ["torchrun", "--standalone", "--nproc-per-node", str(size)]
    return {
        "processes": _count(size, "process", "processes"),
        "command": shlex.join([*launch, "vae_dist/train.py", *given, f"name={run.config.name}-again"]),
        "run": run.path,
        "hashes": _facts({name: run.manifest["files"][name]["sha256"] for name in manifest.FILES}, "facts wide"),
    }
