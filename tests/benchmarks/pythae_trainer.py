"""Train the VAE of a config by pythae's trainer (Chadebec et al. 2022), for as long as a budget of CPU time lasts.

    python tests/benchmarks/pythae_trainer.py PYTHAE RUN OUTPUT SECONDS

PYTHAE is a folder with pythae and what it needs beside torch and numpy:

    pip install --target PYTHAE --no-deps pythae==0.1.2 imageio cloudpickle scipy scikit-learn narwhals joblib \
        threadpoolctl

RUN is the directory of a run of this package. pythae gets its network with the same initial weights, its likelihood,
images, flips, batch size, optimizer, learning rate and schedule, on one thread. It has no bf16 on a CPU, no
clipping and no moving average of the weights: its trainer lacks them. OUTPUT gets the last weights, the best ones by
validation, and facts.json.
"""

import importlib.metadata
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.path.append(sys.argv[1])

import torch
from safetensors.torch import save_file
from torch import Tensor

from vae_dist import config as configs
from vae_dist.data import datasets
from vae_dist.data.source import Source, read
from vae_dist.models import build_vae
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.training import schedules

OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "adamax": "Adamax"}
AVERAGE = 0.99  # decay of the average of an optimal sigma's square


class BudgetSpentError(Exception):
    """The CPU time is over."""


def images_of(source: Source) -> Tensor:
    """The images of a source `(N, C, H, W)` in [0, 1]."""
    return read(source, range(source.info.count)).float().div_(255)


def main(run: Path, output: Path, budget: float) -> None:
    import pythae
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as BaseVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    torch.set_num_threads(1)
    config = configs.read(run / "config.yaml")
    training, validation = (images_of(source) for source in datasets.load_training(config.data))
    vae = build_vae(config, tuple(training.shape[1:]))
    shape = vae.latent_shapes(vae.image_shape)[0]
    last_step = config.train.steps or 1
    optimal = getattr(config.objective, "sigma_kind", "fixed") == "optimal"

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.latent_dim = vae.encoder, vae.latent_dim

        def forward(self, images: Tensor) -> Any:
            posterior = DiagonalGaussian.from_network(self.network(images).flatten(1))
            return ModelOutput(embedding=posterior.mean, log_covariance=posterior.log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = vae.decoder

        def forward(self, latents: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(latents.unflatten(1, shape)))

    class Model(BaseVAE):
        """pythae's VAE with this package's likelihood: its own losses are half a squared error, and a Bernoulli."""

        def __init__(self) -> None:
            options = VAEConfig(input_dim=vae.image_shape, latent_dim=vae.latent_dim)
            super().__init__(options, encoder=Encoder(), decoder=Decoder())
            self.likelihood: Any = vae.likelihood
            self.variance: Tensor | None = None  # of an optimal sigma, its moving average

        def loss_function(self, output: Tensor, images: Tensor, mean: Tensor, log_variance: Tensor, _: Tensor) -> Any:
            if optimal and self.training:
                variance = (output.detach() - images).square().mean()
                self.likelihood.scale.sigma.copy_(variance.sqrt())
                self.variance = variance if self.variance is None else self.variance.lerp(variance, 1 - AVERAGE)
            elif optimal and self.variance is not None:
                self.likelihood.scale.sigma.copy_(self.variance.sqrt())
            reconstruction = -self.likelihood(output).log_prob(images)
            kl = DiagonalGaussian(mean, log_variance).kl_from_standard_normal().sum(1)
            return (reconstruction + kl).mean(), reconstruction.mean(), kl.mean()

    class Flipped(BaseDataset):
        def __getitem__(self, index: int) -> Any:
            image = super().__getitem__(index)
            if torch.rand(()) < 0.5:
                image.data = image.data.flip(-1)
            return image

    class Clock(TrainingCallback):
        """Ends the training with the first epoch that ends after the budget, and moves the learning rate."""

        def __init__(self) -> None:
            self.started, self.epochs, self.steps = time.process_time(), 0, 0

        @property
        def seconds(self) -> float:
            return time.process_time() - self.started

        def on_train_begin(self, training_config: Any, **_: Any) -> None:
            self.set_rate()

        def on_train_step_end(self, training_config: Any, **_: Any) -> None:
            self.steps += 1
            self.set_rate()

        def set_rate(self) -> None:
            """Set the rate of the schedule's step at this part of the budget; the warm-up counts steps."""
            spent = int(min(self.seconds / budget, 1.0) * (last_step - 1))
            step = self.steps if self.steps < config.optim.warmup_steps else max(spent, config.optim.warmup_steps)
            for group in pipeline.trainer.optimizer.param_groups:
                group["lr"] = schedules.learning_rate(config.optim, step, last_step)

        def on_epoch_end(self, training_config: Any, **_: Any) -> None:
            self.epochs += 1
            if self.seconds >= budget:
                raise BudgetSpentError

    options = {"betas": tuple(config.optim.betas), "eps": config.optim.eps, "weight_decay": config.optim.weight_decay}
    clock = Clock()
    settings = BaseTrainerConfig(
        output_dir=str(output), learning_rate=config.optim.learning_rate, num_epochs=10**6,
        per_device_train_batch_size=config.train.batch_size, per_device_eval_batch_size=config.train.batch_size,
        optimizer_cls=OPTIMIZERS[config.optim.optimizer], optimizer_params=options, seed=config.seed, no_cuda=True,
    )  # fmt: skip
    data = Flipped(training, torch.zeros(len(training))) if config.data.flip else training
    pipeline = TrainingPipeline(model=Model(), training_config=settings)
    with suppress(BudgetSpentError):
        pipeline(train_data=data, eval_data=validation if len(validation) else None, callbacks=[clock])
    seconds = clock.seconds
    trainer = pipeline.trainer
    for name, model in ("last", trainer.model), ("best", trainer._best_model):
        if optimal:
            model.likelihood.scale.sigma.copy_(model.variance.sqrt())
        save_file(weights(model, vae), output / f"{name}.safetensors")
    facts = {
        "version": importlib.metadata.version("pythae"), "folder": str(Path(pythae.__file__).parent),
        "seconds": seconds, "epochs": clock.epochs, "images": clock.epochs * len(training),
    }  # fmt: skip
    (output / "facts.json").write_text(json.dumps(facts))


def weights(model: Any, vae: VAE) -> dict[str, Tensor]:
    """A pythae model's tensors by their names in this package's."""
    names = {
        name.replace("encoder.network", "encoder").replace("decoder.network", "decoder"): tensor
        for name, tensor in model.state_dict().items()
    }
    assert names.keys() == vae.state_dict().keys()
    return {name: tensor.contiguous().clone() for name, tensor in names.items()}


if __name__ == "__main__":
    main(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
