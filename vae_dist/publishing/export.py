"""The export of a checkpoint: a folder for inference, with programs, a model card and pictures."""

import hashlib
import logging
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vae_dist.config import OWN_IMAGES, Config
from vae_dist.data import datasets
from vae_dist.data.classes import with_classes
from vae_dist.distributed import processes
from vae_dist.errors import UserError
from vae_dist.evaluation import kept
from vae_dist.files import ELSEWHERE, make_folder, renamed, sync, write_together, writing
from vae_dist.locks import writing_alone
from vae_dist.models.vae import VAE
from vae_dist.publishing import autoencoder, card, hub, inference, programs
from vae_dist.runs import manifest
from vae_dist.runs.lookup import Opened, open_checkpoint
from vae_dist.runs.picture import to_png, with_caption
from vae_dist.terminal import console
from vae_dist.views import pictures

logger = logging.getLogger(__name__)

EXPORTS = "export"  # folder of a run's exports
LOCK_SECONDS = 60.0  # for another command to write its export

_LEFTOVER = re.compile(r"\.(?P<word>writing|replaced)-(?P<name>step_\d{8,}(_raw)?)-[0-9a-f]{8}")


def export(run: Path | None, arguments: Sequence[str] = ()) -> Path:
    """Export a run's newest checkpoint, or the checkpoint `run`; the newest run by default.

    Returns the folder, which every command that reads a run opens, and uploads it if `export.push` names a repository.
    Raises UserError if there is no checkpoint, and for a model or an option that can't be exported; RunError if a
    program differs from the model. Every process calls this; the main process works.
    """
    with open_checkpoint(run, arguments) as opened, processes.join(opened.config) as world:
        console.start(world)
        agreed = opened.agreed(world)
        return world.on_main(lambda: export_opened(agreed, world.device), patient=True)


def export_opened(opened: Opened, device: torch.device) -> Path:
    """Export an open checkpoint, by this process alone; see `export`. Pictures are drawn on the device."""
    checkpoint, config, step = opened.checkpoint, opened.config, opened.step
    programs.check_formats(config.export.formats, others=[autoencoder.FORMAT])
    autoencoder.check_model(config)
    if config.export.push is not None:
        hub.check_repository(config.export.push)
        hub.check_token()
    weights = checkpoint.weights(config)
    is_raw = checkpoint.has_average and weights == "raw"
    target = opened.output / EXPORTS / f"step_{step:08d}{'_raw' if is_raw else ''}"
    if target.resolve() == checkpoint.folder.resolve():
        raise UserError(f"{target} can't be replaced by its own export; {ELSEWHERE}")
    make_folder(target.parent, ELSEWHERE)
    vae = checkpoint.load_vae(config, device)
    of_diffusers = autoencoder.autoencoder_files(vae, checkpoint, config, weights)
    made = programs.make_programs(vae, [name for name in config.export.formats if name in programs.FORMATS])
    evaluation = _evaluation(opened)
    contents = {**inference.inference_files(checkpoint, vae, weights), **of_diffusers, **made.files}
    contents |= _pictures(vae, config, step)
    if evaluation is not None:
        contents[card.EVALUATION] = manifest.to_json(evaluation)
    contents[hub.EXPORT] = _record(contents, made, config, step, weights)
    subject = card.Subject(
        checkpoint, inference.scrubbed(checkpoint.config), vae, weights, evaluation, made.errors, _digests(contents),
        config.export.push, config.export.license,
    )  # fmt: skip
    contents[hub.CARD] = card.model_card(subject).encode()
    with writing(target, ELSEWHERE):
        _publish(target, contents)
    for name, errors in made.errors.items():
        logger.info("%s: within %.1e of the model", name, max(errors.values()))
    logger.info("written to %s", target)
    if config.export.push is not None:
        hub.push(target, config.export.push, private=config.export.private)
    return target


def _evaluation(opened: Opened) -> dict[str, Any] | None:
    """Return an evaluation of this step and these weights, of test images if there is one; None if there is none."""
    found = (one.values for one in kept.of_checkpoint(opened))
    rated = (values for values in found if values.get("split") in ("test", "validation"))
    return next((values for values in rated if values.get("step") == opened.step), None)


def _pictures(vae: VAE, config: Config, step: int) -> dict[str, bytes]:
    """Draw samples, and reconstructions of test images if these can be loaded."""
    subject = f"{config.name} (trained on {config.data.title}), step {step}"
    drawn = {card.SAMPLES: pictures.samples(vae, subject, config.data.classes or ())}
    try:
        source = datasets.load_test(config.data)
        if vae.classes:
            source = with_classes(source, config.data.classes or ())
        drawn[card.RECONSTRUCTIONS] = pictures.reconstructions(vae, source, subject)
        if config.data.name in OWN_IMAGES:
            logger.info("%s shows test images of yours", card.RECONSTRUCTIONS)
    except UserError as error:
        logger.info("%s is left out, as there are no test images: %s", card.RECONSTRUCTIONS, error)
    return {name: to_png(with_caption(picture), optimize=True) for name, picture in drawn.items()}


def _record(contents: Mapping[str, bytes], made: programs.Programs, config: Config, step: int, weights: str) -> bytes:
    """Return `export.json`."""
    values = {
        "run": config.name,
        "step": step,
        "weights": weights,
        "formats": config.export.formats,
        "errors": made.errors,
        "largest_error": programs.LARGEST_ERROR,
        "versions": programs.versions(config.export.formats),
        "files": {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in _digests(contents).items()},
    }
    return manifest.to_json(values)


def _digests(contents: Mapping[str, bytes]) -> dict[str, tuple[int, str]]:
    return {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}


def _publish(target: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder whole, in the place of an older one."""
    folder = target.parent
    with writing_alone(folder, LOCK_SECONDS, f"another command writes an export to {folder}") as is_alone:
        if is_alone:
            _clean(folder)
        _write(target, contents)


def _clean(folder: Path) -> None:
    """Remove what killed commands have left. An export that was set aside, and not replaced, gets its name back."""
    found = [(match, path) for path in folder.iterdir() if (match := _LEFTOVER.fullmatch(path.name))]
    for match, path in found:
        if match["word"] == "replaced" and not (folder / match["name"]).exists():
            path.rename(folder / match["name"])
        else:
            shutil.rmtree(path, ignore_errors=True)


def _write(target: Path, contents: Mapping[str, bytes]) -> None:
    mark = secrets.token_hex(4)
    temporary, old = (target.with_name(f".{word}-{target.name}-{mark}") for word in ("writing", "replaced"))
    try:
        temporary.mkdir()
        write_together({temporary / name: content for name, content in contents.items()})
        sync(temporary)
        try:
            if target.exists() and not renamed(target, old):
                shutil.rmtree(target)
            temporary.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
