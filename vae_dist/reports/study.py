"""A study: runs that differ in one setting, trained one after another and compared."""

import logging
from pathlib import Path

from vae_dist import config as configs
from vae_dist.config import Study
from vae_dist.data import datasets
from vae_dist.distributed import processes
from vae_dist.errors import StoppedError
from vae_dist.models import check_names
from vae_dist.models.likelihoods import likelihood_kind
from vae_dist.reports.comparison import compare
from vae_dist.terminal import console
from vae_dist.training.loop import train

logger = logging.getLogger(__name__)


def study(config: Study) -> Path:
    """Train the runs of a study that are not trained yet, and compare all of them. Return the comparison's folder.

    Raises UserError for an unknown name before the first training, and whatever `train` raises.
    """
    for run in config.configs:
        datasets.check_name(run.data.name)
        check_names(run)
        configs.check_numbers(run, has_scale=likelihood_kind(run.objective).has_scale)
    with processes.join(config.configs[0]) as world:  # once for all runs
        console.start(world)
        for number, run in enumerate(config.configs, start=1):
            logger.info("run %d of %d: %s", number, len(config.configs), run.name)
            world.set_timeout(run.runtime.start_timeout)
            try:
                train(run)
            except StoppedError as stopped:
                raise StoppedError(
                    f"stopped in run {number} of {len(config.configs)}, {run.name}, which is saved; run the same "
                    "command again to resume the study",
                    stopped.exit_code,
                ) from None
        runs = [Path(run.runs_dir) / str(run.name) for run in config.configs]
        return compare(runs, [*config.reading, configs.argument("output", str(config.output))])
