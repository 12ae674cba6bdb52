"""The HTML report of a run, from the templates in `templates/`.

A run may be untrusted. Jinja2 escapes whatever a template inserts, and the Content-Security-Policy allows nothing but
the report's own style, script and pictures.
"""

import functools
import hashlib
import logging
import shlex
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vae_dist.config import Config, training_command
from vae_dist.distributed import processes
from vae_dist.files import ELSEWHERE, make_folder, write_atomically, writing
from vae_dist.models.vae import VAE
from vae_dist.reports import facts, metrics, plane
from vae_dist.reports.curves import curves
from vae_dist.reports.pictures import validation_pictures
from vae_dist.reports.subject import Subject, subject_of
from vae_dist.reports.text import count, format_number, format_percent, printable
from vae_dist.runs.lookup import Opened, open_checkpoint
from vae_dist.runs.metrics import METRICS, is_number
from vae_dist.runs.reproduction import promise
from vae_dist.terminal import console, invocation

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).with_name("templates")
LOG_CHARACTERS = 20_000  # the last ones


def report(run: Path | None, arguments: Sequence[str] = ()) -> Path:
    """Write the report of a run's newest checkpoint, or of the checkpoint `run`; by default, of the newest run.

    Returns its path, `report.html`. The same run gives the same bytes. Raises UserError if there is no checkpoint.
    """
    with open_checkpoint(run, arguments) as opened, processes.join(opened.config) as world:
        console.start(world)
        return world.on_main(lambda: _write(opened, world.device), patient=True)


def _write(opened: Opened, device: torch.device) -> Path:
    make_folder(opened.output, ELSEWHERE)
    path = opened.output / "report.html"
    vae = opened.checkpoint.load_vae(opened.config, device)
    content = _render(subject_of(opened), vae, opened.config).encode()
    with writing(path, ELSEWHERE):
        write_atomically(path, content)
    logger.info("written to %s (%.1f MB); any browser opens it", path, len(content) / 1e6)
    return path


def _render(subject: Subject, vae: VAE, config: Config) -> str:
    """Return the report's HTML; `config` names the place of the data on this machine."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    kl = _evaluated_kl(subject, vae.latent_dim)
    latent_plane = plane.decode_plane(vae, config, kl)
    images = "the evaluation's images" if kl else f"the first {len(latent_plane.means):,} test images"
    settings = facts.settings(subject.config)
    world_size = subject.checkpoint.state.world_size
    launched = count(world_size, "process", "processes")
    conditions = f"On this kind of machine, with the versions above and {launched}"
    option = "weights=raw" if subject.checkpoint.has_average and config.weights == "raw" else ""
    return (
        environment()
        .get_template("report.html")
        .render(
            policy=_policy(style, script),
            style=style,
            script=script,
            name=str(subject.config.name),
            quoted_name=shlex.quote(str(subject.config.name)),
            commands={name: invocation.command(name, subject.path, option) for name in ("eval", "sample", "report")},
            step=subject.step,
            reached=subject.reached,
            last_step=subject.last_step,
            is_being_trained=subject.is_training,
            subtitle=facts.subtitle(subject.config, vae),
            evaluation=metrics.evaluation(subject, vae.latent_dim),
            last_validation=metrics.last_validation(subject.run),
            curves=curves(subject.run, subject.config),
            metrics_file=METRICS,
            pictures=validation_pictures(subject),
            plane=latent_plane,
            kl_chart=plane.kl_chart(latent_plane, images),
            settings=settings,
            changed=[setting for group in settings.values() for setting in group if setting.is_changed],
            machine=facts.machine(subject),
            log=subject.run.log[-LOG_CHARACTERS:] or "There is no log.txt next to this checkpoint.",
            promise=promise(subject.run.starts, subject.step, conditions),
            command=training_command(subject.config, invocation.training(world_size)),
            hashes={name: sealed.sha256 for name, sealed in subject.checkpoint.manifest.files.items()},
        )
    )


def _evaluated_kl(subject: Subject, latent_dim: int) -> list[float] | None:
    """The KL of each latent from an evaluation of this step; None if there is none."""
    kl = subject.evaluation.get("kl_per_latent")
    is_whole = isinstance(kl, list) and len(kl) == latent_dim and all(map(is_number, kl))
    return kl if is_whole and subject.evaluation.get("step") == subject.step else None


@functools.cache
def environment() -> Environment:
    """Return Jinja2's environment of the templates. It escapes every inserted value, and an undefined name raises."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not of markup, a subclass
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "percent": format_percent, "integer": "{:,}".format}
    return environment


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy that allows this style, this script, and pictures inside the file."""
    hashes = (b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    style_source, script_source = (f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; img-src data:; style-src {style_source}; script-src {script_source}; "
        "base-uri 'none'; form-action 'none'"
    )
