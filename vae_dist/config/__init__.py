"""The options of a run: files and arguments are merged into one typed config.

Scalars reach their field as the text that the user typed, and the field's type decides their meaning. YAML's own
guesses never apply: `name: 007` stays `007` and `tags: [on]` stays `on`. In a text, `${model.latent_dim}` stands for
the value of that key.

Files and arguments may be untrusted. They hold keys, lists and text, within bounds. YAML's tags and aliases, and
OmegaConf's resolvers, which read the environment or import modules, are refused.
"""

from vae_dist.config.architectures import ARCHITECTURES
from vae_dist.config.arguments import argument, split_key, split_run, split_runs, training_command
from vae_dist.config.autoencoder_kl import AutoencoderKLConfig
from vae_dist.config.checks import check
from vae_dist.config.data import OWN_IMAGES, DataConfig
from vae_dist.config.differences import READER_KEYS, differing, resume
from vae_dist.config.evaluation import EvaluateConfig
from vae_dist.config.first_stage import FirstStageConfig
from vae_dist.config.keys import flatten, help_text, options
from vae_dist.config.loading import load, load_reader, parse, read, save, take, to_yaml
from vae_dist.config.networks import ConvConfig, GridConfig, LadderConfig, MLPConfig, ModelConfig, ResNetConfig
from vae_dist.config.optimization import SIGMA_FLOOR, EmaConfig, ObjectiveConfig, OptimConfig
from vae_dist.config.paths import expand
from vae_dist.config.ranges import check_numbers, suspects
from vae_dist.config.saved_run import load_training
from vae_dist.config.schema import (
    CheckpointConfig,
    Config,
    EncodeConfig,
    ExportConfig,
    Precision,
    TrackingConfig,
)
from vae_dist.config.study import Study, load_study
from vae_dist.config.text import as_text, text_of

__all__ = [
    "ARCHITECTURES",
    "OWN_IMAGES",
    "READER_KEYS",
    "SIGMA_FLOOR",
    "AutoencoderKLConfig",
    "CheckpointConfig",
    "Config",
    "ConvConfig",
    "DataConfig",
    "EmaConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FirstStageConfig",
    "GridConfig",
    "LadderConfig",
    "MLPConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Precision",
    "ResNetConfig",
    "Study",
    "TrackingConfig",
    "argument",
    "as_text",
    "check",
    "check_numbers",
    "differing",
    "expand",
    "flatten",
    "help_text",
    "load",
    "load_reader",
    "load_study",
    "load_training",
    "options",
    "parse",
    "read",
    "resume",
    "save",
    "split_key",
    "split_run",
    "split_runs",
    "suspects",
    "take",
    "text_of",
    "to_yaml",
    "training_command",
]
