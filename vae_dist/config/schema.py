"""Every option of a run: key, type, default, bounds, meaning. There is a dataclass per concern; `Config` holds them."""

from dataclasses import dataclass, field
from typing import Literal

from vae_dist.config.data import DataConfig
from vae_dist.config.evaluation import EvaluateConfig
from vae_dist.config.fields import option
from vae_dist.config.first_stage import FirstStageConfig
from vae_dist.config.networks import MLPConfig, ModelConfig
from vae_dist.config.optimization import EmaConfig, ObjectiveConfig, OptimConfig

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"]


@dataclass
class TrainConfig:
    recipe: str = option(
        "vae",
        "what a step does; vae: trains one VAE by one objective; autoencoder: trains the first stage of latent "
        "diffusion, by the options of first_stage",
    )
    freeze: Literal["none", "encoder"] = option(
        "none", "encoder: its weights stay those of model.init_from, and the latents of an image stay the same"
    )
    epochs: int = option(5, "passes over the training images", at_least=1)
    steps: int | None = option(None, "optimizer steps; overrides train.epochs", at_least=1)
    batch_size: int = option(100, "images per optimizer step, over all processes", at_least=1)
    accumulate: int = option(
        1, "micro-batches into which each process splits its shard of a batch, to save memory", at_least=1
    )
    precision: Precision = option(
        "auto", "auto: the launcher's mixed precision, or fp32; tf32 and fp16 need CUDA; fp64 is for checking"
    )
    threads: int | None = option(
        None, "CPU threads per process; null: the machine's cores, shared evenly", at_least=1, at_most=1024
    )
    compile: bool | None = option(
        None, "compile the step, which takes some seconds; null: on a GPU, and on a CPU if the run is long enough"
    )
    checkpointing: bool = option(
        False,
        "compute activations a second time in the backward pass instead of keeping them: less memory, a fifth to "
        "three quarters more time; such a step is not compiled",
    )
    log_every: int = option(100, "optimizer steps between records of training metrics", at_least=1)
    validate_every: int | None = option(
        None, "optimizer steps between validations, with their pictures; null: an epoch", at_least=1
    )
    nonfinite: Literal["stop", "skip"] = option(
        "stop", "if the loss or the gradient is not finite, stop the run or skip that update; it is never applied"
    )
    max_skipped: int = option(10, "updates that may be skipped before the run stops", at_least=0)


@dataclass
class CheckpointConfig:
    every: int | None = option(None, "optimizer steps between checkpoints; null: an epoch", at_least=1)
    keep: int = option(2, "number of newest checkpoints to keep, in addition to the best by validation", at_least=2)
    resume: str = option(
        "auto",
        "auto: resume the run of this name if it has a checkpoint; must: refuse if it has none; never: refuse if it "
        "has one; or the path of a checkpoint to start from",
    )
    take_over: str | None = option(
        None,
        "on a file system without locks, take over the directory of a run whose training is dead; the value is in the "
        "message that refuses the directory",
    )


@dataclass
class TrackingConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "auto: online if an account is set up, otherwise offline"
    )
    project: str = option("vae_dist", "Weights & Biases project")
    entity: str | None = option(None, "Weights & Biases user or team; null: the account's default")
    tags: list[str] = option([], "tags of the Weights & Biases run")
    artifact: bool = option(
        False,
        "give Weights & Biases the best checkpoint when the run is done, or the newest if nothing was validated",
    )
    id: str | None = option(
        None,
        "ID of the Weights & Biases run; null: generated at the start of the run; ignored in a config.yaml that a run "
        "has saved",
    )
    owner: str | None = option(
        None, "run directory that tracking.id belongs to, as inode and hash; the run sets it, not you"
    )
    notes: str | None = option(None, "notes on the Weights & Biases run")
    group: str | None = option(None, "Weights & Biases group of the run; the runs of a study share one")


@dataclass
class RuntimeConfig:
    start_timeout: float = option(
        600.0, "seconds that processes wait for one another until the run has started", above=0, at_most=10**9
    )
    timeout: float = option(
        600.0, "seconds that processes wait for one another once the run has started", above=0, at_most=10**9
    )
    cuda_graph: bool = option(True, "on one GPU, capture the operations of many steps and launch them at once")
    verify_every: int | None = option(
        None,
        "optimizer steps between additional checks that all processes hold the same weights; null: check only where "
        "metrics or checkpoints are written",
        at_least=1,
    )


@dataclass
class SampleConfig:
    kind: str | None = option(
        None,
        "prior, codes, neighbours, interpolation, traversal, manifold, reconstruction, levels or scatter; null: codes "
        "if sample.codes is given, otherwise prior",
    )
    count: int = option(64, "images to draw (prior)", at_least=1)
    seed: int = option(0, "seed of the draws (prior, neighbours, reconstruction, drawn pixels)", at_least=0)
    sampler: Literal["prior", "mixture"] = option(
        "prior", "source of the latents (prior); mixture: Gaussians fitted to the posteriors of the training images"
    )
    mixture_components: int = option(10, "Gaussians of the mixture", at_least=1)
    codes: list[list[float]] | None = option(
        None, "latents, a list per code: any number to decode (codes), or one to start from (neighbours, traversal)"
    )
    images: list[int] | None = option(
        None,
        "indices of test images: one to start from (neighbours, traversal), pairs (interpolation) or any number "
        "(reconstruction, levels); null: start from the origin, otherwise the first ten images",
        at_least=0,
    )
    labels: list[str] | None = option(
        None,
        "classes of a conditional model to draw, by name or number: any number (prior), one per code (codes) or one; "
        "null: all in turn (prior), the class of the image in sample.images, otherwise the first one",
    )
    steps: int | None = option(
        None,
        "images in a row (neighbours 10, interpolation 10, traversal 13), draws of each image (reconstruction 8), or "
        "side of the square (manifold 20)",
        at_least=2,
    )
    rows: int | None = option(None, "rows (neighbours 5), or latents to traverse (traversal 20)", at_least=1)
    radius: float | None = option(
        None,
        "largest distance from the code (neighbours); null: half the typical length of a latent code, sqrt(L) / 2",
        above=0,
    )
    pixels: Literal["mean", "draw"] = option(
        "mean", "pixels (prior, codes, reconstruction): the means of p(x|z), or draws from it by sample.seed"
    )
    files: bool = option(False, "write each image to a file of its own, in addition to the grid")

    def images_at_least(self, latents: int) -> int:
        """Return a lower bound of the images that `rows` and `steps` ask for, of a VAE with this many latents."""
        rows, steps, chosen = self.rows or 1, self.steps or 1, len(self.images or [0, 0])
        of_kind = {
            "neighbours": rows * steps,
            "traversal": min(rows, latents) * steps,
            "manifold": steps * steps,
            "interpolation": chosen // 2 * steps,
            "reconstruction": chosen * steps,
        }
        return of_kind.get(self.kind or "prior", 0)


@dataclass
class EncodeConfig:
    split: Literal["train", "validation", "test"] = option("train", "images to encode, without augmentation")
    folder: str | None = option(
        None, "your own images to encode instead of the run's: a folder, a packed one or an array; all its images"
    )
    latents: Literal["auto", "posterior", "draws"] = option(
        "auto",
        "posterior: mean and log-variance of each latent; draws: one draw from each image's posterior; auto: "
        "posterior, or draws if the posteriors are not means and variances alone, as those of a hierarchy",
    )
    seed: int = option(0, "seed of the draws", at_least=0)
    shard_images: int = option(
        10_000, "images per file, rounded up to whole batches of evaluate.batch_size", at_least=1
    )
    dtype: Literal["fp32", "fp16", "bf16"] = option("fp32", "type of the numbers in the files")


@dataclass
class ExportConfig:
    formats: list[str] = option(
        ["onnx", "program"],
        "onnx: encoder.onnx and decoder.onnx; program: encoder.pt2 and decoder.pt2 of torch.export; diffusers: files "
        "for AutoencoderKL.from_pretrained, of model.architecture=autoencoder_kl; []: none",
    )
    latents: str | None = option(
        None,
        "folder of this checkpoint's latents (vae-dist encode), whose statistics give diffusers the scaling to mean 0 "
        "and deviation 1; null: no scaling is stated",
    )
    scaling: Literal["factor", "channels"] = option(
        "factor",
        "factor: one scaling_factor and shift_factor; channels: latents_mean and latents_std, as some pipelines read",
    )
    push: str | None = option(None, "repository of the Hugging Face Hub to upload to, such as USER/NAME")
    private: bool = option(True, "make that repository private, if it does not exist yet")
    license: str | None = option(None, "licence of the weights, for the model card: an identifier such as mit")


@dataclass
class Config:
    name: str | None = option(
        None, "name of the run; {time} becomes its start time; null: the config file's name and {time}"
    )
    runs_dir: str = option("runs", "folder of the runs")
    seed: int = option(0, "seed of weights, batches and noise", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or mps")
    output: str | None = option(
        None, "folder for results of evaluation, sampling, encoding, export and reports; null: the run's directory"
    )
    weights: Literal["ema", "raw"] = option(
        "ema",
        "weights that evaluation, samples, latents, exports and reports use: ema: the moving average if the run has "
        "one, otherwise the trained weights; raw: the trained weights",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=MLPConfig)  # that of the architecture
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
