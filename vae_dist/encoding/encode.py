"""The encoding of a data set by a checkpoint: its latents go to files, over all processes."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.config import Config, split_key
from vae_dist.data.chosen import choose
from vae_dist.data.source import Source
from vae_dist.distributed import processes
from vae_dist.distributed.world import World
from vae_dist.encoding import folder, index, shards, statistics
from vae_dist.encoding.latents import encode_images, with_latents
from vae_dist.encoding.request import Request, folder_name, make_request
from vae_dist.encoding.shards import File
from vae_dist.errors import UserError
from vae_dist.evaluation import protocol
from vae_dist.models.vae import VAE
from vae_dist.runs.checkpoint import await_visible
from vae_dist.runs.lookup import open_checkpoint
from vae_dist.terminal import console
from vae_dist.terminal.progress import progress

logger = logging.getLogger(__name__)


class _Done(NamedTuple):
    """The work of one process, or of all."""

    files: list[File]
    kept: int  # files that were whole already
    moments: Tensor  # (files, 2, ..., C), see `statistics.of_shard`


def encode(run: Path | None, arguments: Sequence[str] = ()) -> Path:
    """Encode images by a run's newest checkpoint, or by the checkpoint `run`; the newest run by default.

    Returns the folder of the shards and of `index.json`, which is written last. Files that an earlier command with the
    same arguments has finished are checked and kept. Raises UserError if there is no checkpoint or no data, if latents
    are not finite, and if the folder holds other latents. Every process calls this.
    """
    with open_checkpoint(run, arguments) as opened, processes.join(opened.config) as world:
        console.start(world)
        checkpoint, config, output, _ = opened.agreed(world)
        vae = checkpoint.load_vae(config, world.device)
        options = config.encode
        if options.folder is not None and any(split_key(argument)[0] == "encode.split" for argument in arguments):
            raise UserError("encode.split does not apply to encode.folder, all of whose images are encoded; give one")
        images = world.main_first(lambda: choose(config.data, options.split, options.folder, "encode"))
        source = images.source
        config = with_latents(config, vae, source)
        request = make_request(config, checkpoint, vae, source.info)
        world.assert_equal_everywhere(lambda: request.values)
        target = output / "latents" / folder_name(config, checkpoint, images)
        with folder.held(target, request, world):
            threads = _resolve_threads(config, target, world)
            conditions = protocol.of_latents(
                config, source.info, world, dataset=images.dataset, split=images.split,
                weights=checkpoint.weights(config),
            )  # fmt: skip
            done = _write_shards(vae, source, config, request, target, threads, world)
            summary = statistics.summary(request, done.moments)
            shapes = [list(shape) for shape in vae.latent_shapes(vae.image_shape)]
            facts = {"run": config.name, "step": checkpoint.step, "latent_shapes": shapes, **index.of_source(source)}
            if threads is not None:
                conditions["threads"] = world.on_main(lambda: _threads_named(target, threads))
            content = index.make(request, facts, done.files, summary, conditions)
            world.on_main(lambda: index.write(target, content, source))
        if world.is_main:
            _log(request, done, summary, target)
    return target


def _resolve_threads(config: Config, target: Path, world: World) -> int | None:
    """Return the number of threads that this process computes with; None on a GPU, whose digits don't depend on it.

    A command that leaves it open continues with the number of the files that are there, as a resumed training does.
    """
    if world.device.type != "cpu":
        return None
    there = world.on_main(lambda: shards.threads_of(target))
    if config.train.threads is None and there:
        torch.set_num_threads(there[0])
    return torch.get_num_threads()


def _threads_named(target: Path, threads: int) -> int | list[int]:
    """Return the number of threads that the index names: that of the files, or each number if they differ."""
    numbers = shards.threads_of(target) or [threads]  # files of old versions state none
    return numbers if len(numbers) > 1 else numbers[0]


def _write_shards(
    vae: VAE, source: Source, config: Config, request: Request, target: Path, threads: int | None, world: World
) -> _Done:
    """Write the shards that are missing, each by the process that computes it; return those of all processes."""
    names, parts = shards.file_names(request), request.shards
    mine = range(world.rank, len(parts), world.size)
    files, moments, kept = [], [], 0
    with progress("encoding", sum(len(parts[number]) for number in mine), is_main=world.is_main) as advance:
        for number in mine:
            # In a function of its own, which lets go of a shard's latents before the next one's are made.
            file, of_shard, was_whole = _write_shard(
                vae, source, config, request, target / names[number], parts[number], threads, advance
            )
            files.append(file)
            moments.append(of_shard.unsqueeze(0))
            kept += was_whole
    numbers = [range(number, number + 1) for number in mine]
    every = _Done(
        sorted(file for theirs in world.gather_objects(files) for file in theirs),
        sum(world.gather_objects(kept)),
        world.gather_rows(numbers, moments, len(parts)),
    )
    world.on_main(lambda: _await(every.files, target))
    return every


def _write_shard(
    vae: VAE,
    source: Source,
    config: Config,
    request: Request,
    path: Path,
    shard: range,
    threads: int | None,
    advance: Callable[[int], None],
) -> tuple[File, Tensor, bool]:
    """Write a shard unless it is whole already; return it, its moments, and whether it was."""
    tensors = shards.read(path, request, shard)
    was_whole = tensors is not None
    if tensors is None:
        tensors = encode_images(vae, source, config, request, shard, advance)
        file = shards.write(path, tensors, request, shard, threads)
    else:
        file = shards.describe(path, shard)
        advance(len(shard))
    return file, statistics.of_shard(tensors, request, shard), was_whole


def _await(files: Sequence[File], target: Path) -> None:
    for file in files:
        await_visible(target, file.name)


def _log(request: Request, done: _Done, summary: dict[str, dict[str, float]], target: Path) -> None:
    if done.kept:
        logger.info("%d of %d files were there already, and are whole", done.kept, len(done.files))
    logger.info(
        "the latents of %d images in %s: mean %.4g, standard deviation %.4g over all channels",
        request.images, target, summary["latents"]["overall_mean"],
        summary["latents"]["overall_standard_deviation"],
    )  # fmt: skip
