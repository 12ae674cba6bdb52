"""The inference checkpoint: the weights, the config and the state of a run that evaluation and sampling need."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import save

from vae_dist import config as configs
from vae_dist.config import (
    AutoencoderKLConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EncodeConfig,
    ExportConfig,
    ModelConfig,
    TrackingConfig,
)
from vae_dist.models.vae import VAE
from vae_dist.runs import manifest
from vae_dist.runs.checkpoint import CONFIG, MODEL, STATE, Checkpoint, on_cpu
from vae_dist.runs.manifest import MANIFEST
from vae_dist.runs.state import TrainingState

FILES = (MODEL, STATE, CONFIG, MANIFEST)


def inference_files(checkpoint: Checkpoint, vae: VAE, weights: str) -> Mapping[str, bytes]:
    """Return the files of an inference checkpoint by name.

    `vae` is the checkpoint's model. Its weights are the file's, and `weights` is their name: `ema`, the moving average,
    or `raw`.
    """
    state = checkpoint.state
    kept = TrainingState(state.step, state.world_size, best=state.best, skipped_updates=state.skipped_updates)
    contents = {
        MODEL: save(on_cpu(vae.state_dict())),
        STATE: manifest.to_json(asdict(kept)),
        CONFIG: configs.to_yaml(scrubbed(checkpoint.config)).encode(),
    }
    sealed = manifest.seal(contents, checkpoint.step, frozen={}, weights=weights)
    return {**contents, MANIFEST: manifest.to_json(sealed)}


def scrubbed(config: Config) -> Config:
    """Return a run's config without what belongs to its machine or its owner: folders, addresses, names, accounts.

    Of `data.path`, `model.init_from`, `first_stage.perceptual` and of a table in `data.group`, the last name stays.
    """
    data, usual = config.data, DataConfig()
    is_table = data.group is not None and data.group.endswith(".csv")
    return replace(
        config,
        runs_dir=Config().runs_dir,
        output=None,
        device=Config().device,
        weights=Config().weights,
        model=_without_folders(config.model),
        data=replace(
            data,
            root=usual.root,
            mirror=None,
            pack_dir=None,
            path=_last_name(data.path),
            group=_last_name(data.group) if is_table else data.group,
        ),
        first_stage=replace(config.first_stage, perceptual=_last_name(config.first_stage.perceptual)),
        checkpoint=CheckpointConfig(),
        tracking=TrackingConfig(wandb="disabled"),  # the folder has no page in Weights & Biases
        evaluate=replace(config.evaluate, folder=None, perceptual=None, inception=None, fid_samples=None),
        encode=EncodeConfig(),
        export=ExportConfig(),
    )


def _without_folders(model: ModelConfig) -> ModelConfig:
    if isinstance(model, AutoencoderKLConfig):
        return replace(model, init_from=_last_name(model.init_from))
    return model


def _last_name(path: str | None) -> str | None:
    return None if path is None else Path(path).name or "images"
