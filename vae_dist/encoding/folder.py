"""The folder of an encoding, held by one command at a time. It keeps what an earlier command has finished."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vae_dist.distributed.world import World
from vae_dist.encoding import index, shards
from vae_dist.encoding.request import Request
from vae_dist.errors import UserError
from vae_dist.files import ELSEWHERE, make_folder, writing
from vae_dist.leftovers import remove_leftovers
from vae_dist.locks import writing_alone

LOCK_SECONDS = 10.0  # for processes of a killed command to end


@contextmanager
def held(folder: Path, request: Request, world: World) -> Iterator[None]:
    """Make the folder, and hold it for this command. Every process calls this.

    Raises UserError if the folder can't be written to, holds other latents, or belongs to another live command.
    """
    with ExitStack() as stack:
        world.on_main(lambda: _prepare(folder, request, stack))
        yield


def _prepare(folder: Path, request: Request, stack: ExitStack) -> None:
    make_folder(folder, ELSEWHERE)
    is_alone = stack.enter_context(writing_alone(folder, LOCK_SECONDS, f"another command encodes into {folder}"))
    with writing(folder, ELSEWHERE):
        _require_own(folder, request)
        remove_leftovers(folder, is_alone=is_alone)


def _require_own(folder: Path, request: Request) -> None:
    """Raise UserError if there are shards or an index of another request."""
    remedy = f"remove {folder} if you don't need it, or {ELSEWHERE}"
    found = {path.name: shards.request_of(path) for path in sorted(folder.glob(shards.PATTERN))}
    about = index.read(folder)
    stated = [*found.values(), about.get("request") if about else None]
    for values in stated:
        if isinstance(values, dict) and (differences := request.differences(values)):
            raise UserError(f"{folder} holds other latents: {differences}; {remedy}")
    if others := found.keys() - set(shards.file_names(request)):
        raise UserError(f"{folder} holds {min(others)}, which is no file of these latents; {remedy}")
