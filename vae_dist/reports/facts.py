"""Facts of a run as its report states them: subtitle, settings, machine, and the command that reproduces it."""

import re
import shlex
import statistics
from typing import NamedTuple

from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.models.vae import VAE
from vae_dist.reports.text import count, format_number, format_value
from vae_dist.runs.record import Record

_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", re.MULTILINE)
_OF_ONE_RUN = ("name", "runs_dir", "output", "data.image_shape", "tracking.")  # another run may have other values


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
    sizes = "-".join(map(str, config.model.hidden_dims))
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    return (
        f"A variational autoencoder of {config.data.name}: {config.model.architecture} {sizes}, "
        f"{count(config.model.latent_dim, 'latent', 'latents')}, {parameters:,} parameters"
    )


def settings(config: Config) -> dict[str, list[Setting]]:
    """All settings by group."""
    values = configs.flatten(config)
    groups: dict[str, list[Setting]] = {}
    for option in configs.options():
        value, default = (configs.text_of(value) for value in (values[option.key], option.default))
        setting = Setting(option.key, value, default, option.help, values[option.key] != option.default)
        groups.setdefault(setting.group, []).append(setting)
    return groups


def machine(run: Record) -> dict[str, str]:
    """When, on what and how fast the run was trained."""
    times, unknown = _TIME.findall(run.log), "not recorded"
    _, device, threads = run.launches[-1] if run.launches else ("", unknown, "")
    speeds = [value for _, value in run.points("train/images_per_second")]
    versions = run.manifest.get("versions")
    return {
        "started": times[0] if times else unknown,
        "last log entry": times[-1] if times else unknown,
        "launched": count(len(run.launches), "time", "times") if run.launches else unknown,
        "processes": str(run.state.world_size),
        "device": device,
        "threads per process": threads or configs.text_of(run.config.train.threads),
        "precision": run.config.train.precision,
        "median speed": f"{format_number(statistics.median(speeds))} images per second" if speeds else unknown,
        "skipped updates": str(run.state.skipped_updates),
        **({key: format_value(version) for key, version in versions.items()} if isinstance(versions, dict) else {}),
    }


def command(run: Record) -> str:
    """The command that trains this run again, under another name."""
    values = configs.flatten(run.config)
    arguments = [
        configs.argument(option.key, values[option.key])
        for option in configs.options()
        if values[option.key] != option.default and not option.key.startswith(_OF_ONE_RUN)
    ]
    size = run.state.world_size
    launch = ["python"] if size == 1 else ["torchrun", "--standalone", "--nproc-per-node", str(size)]
    return shlex.join([*launch, "vae_dist/train.py", *arguments, f"name={run.config.name}-again"])
