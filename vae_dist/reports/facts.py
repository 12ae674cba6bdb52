"""Facts of a run as its report states them: subtitle, settings and machine."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.models.vae import VAE
from vae_dist.reports.subject import Subject
from vae_dist.reports.text import count, format_number, format_value


class Setting(NamedTuple):
    """A config key with its value, as text."""

    key: str
    value: str
    default: str
    help: str
    is_changed: bool  # from its default

    @property
    def group(self) -> str:
        return self.key.rpartition(".")[0] or "run"

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


def subtitle(config: Config, vae: VAE) -> str:
    """The data set, the network and its size."""
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    network = network_text(config.model.summary(), vae.latent_shapes(vae.image_shape))
    given = f" given one of {count(vae.classes, 'class', 'classes')}" if vae.classes else ""
    return f"A variational autoencoder of {config.data.title}{given}: {network}, {parameters:,} parameters"


def network_text(summary: str, latent_shapes: Sequence[tuple[int, ...]]) -> str:
    """Describe a network in words: its architecture and sizes, and the shapes of its latents, one per level."""
    shapes = " and ".join(" x ".join(f"{size:,}" for size in shape) for shape in latent_shapes)
    return f"{summary}, {shapes} {'latent' if shapes == '1' else 'latents'}"


def settings(config: Config) -> dict[str, list[Setting]]:
    """Return all settings by group."""
    values = configs.flatten(config)
    groups: dict[str, list[Setting]] = {}
    for option in configs.options(config):
        value, default = (configs.text_of(value) for value in (values[option.key], option.default))
        setting = Setting(option.key, value, default, option.help, values[option.key] != option.default)
        groups.setdefault(setting.group, []).append(setting)
    return groups


def machine(subject: Subject) -> dict[str, str]:
    """Return the times, the hardware and the speed of the training."""
    starts, state, unknown = subject.run.starts, subject.checkpoint.state, "not recorded"
    speeds = [value for _, value in subject.run.points("train/images_per_second")]
    return {
        "first start": starts[0].time if starts else unknown,
        "last start": starts[-1].time if starts else unknown,
        "started": count(len(starts), "time", "times") if starts else unknown,
        "processes": str(state.world_size),
        "device": starts[-1].device if starts else unknown,
        "threads per process": configs.text_of(subject.config.train.threads),
        "precision": subject.config.train.precision,
        "median speed": f"{format_number(statistics.median(speeds))} images per second" if speeds else unknown,
        "skipped updates": str(state.skipped_updates),
        **{key: format_value(version) for key, version in subject.checkpoint.manifest.versions.items()},
    }
