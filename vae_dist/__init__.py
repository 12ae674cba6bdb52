"""A trainer for variational autoencoders whose runs are pure functions of their config and step.

    run = vae_dist.fit("configs/tutorial.yaml", "model.latent_dim=2")    # or vae_dist.load("runs/mine")
    codes = run.encode(images)
    pictures = run.decode(codes.mean)

The commands are modules: `vae_dist.train`, `vae_dist.evaluate` and so on. What is exported here is imported when it is
first used, so that a command's help needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_dist.api.fitting import fit
    from vae_dist.api.loading import load
    from vae_dist.api.run import Run
    from vae_dist.config import Config
    from vae_dist.errors import RunError, StoppedError, UserError

__version__ = "0.1.0"
__all__ = ["Config", "Run", "RunError", "StoppedError", "UserError", "__version__", "fit", "load"]

_MODULES = {
    "Config": "vae_dist.config",
    "Run": "vae_dist.api.run",
    "RunError": "vae_dist.errors",
    "StoppedError": "vae_dist.errors",
    "UserError": "vae_dist.errors",
    "fit": "vae_dist.api.fitting",
    "load": "vae_dist.api.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
