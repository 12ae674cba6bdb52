"""Upload an export to the Hugging Face Hub, and download one."""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vae_dist
from vae_dist.errors import UserError
from vae_dist.files import advice, reason
from vae_dist.locks import writing_alone
from vae_dist.publishing import autoencoder, card, inference
from vae_dist.publishing.programs import FORMATS
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.manifest import MANIFEST, BadCheckpointError

logger = logging.getLogger(__name__)

SCHEME = "hf://"
CARD, EXPORT = "README.md", "export.json"
PROGRAMS = tuple(f"{part}{suffix}" for suffix in FORMATS.values() for part in ("encoder", "decoder"))
DOWNLOADED = (*inference.FILES, card.EVALUATION)
UPLOADED = (*DOWNLOADED, *PROGRAMS, *autoencoder.FILES, CARD, EXPORT, card.SAMPLES, card.RECONSTRUCTIONS)

MOST_CHARACTERS = 96  # of a repository's name
LOCK_SECONDS = 60.0  # for another process to make a folder of a snapshot
SILENT_SECONDS = 60.0  # that a request may get no answer

_OTHER_CACHE = "set HF_HOME to a folder that can be written to"

_REPOSITORY = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9_][\w.-]*", re.ASCII | re.IGNORECASE)
_REVISION = re.compile(r"[\w][\w./-]*", re.ASCII)


def check_repository(repository: str) -> None:
    """Raise UserError for a name that no repository of the Hub can have."""
    is_good = _REPOSITORY.fullmatch(repository) and len(repository) <= MOST_CHARACTERS
    if not is_good or "--" in repository or ".." in repository:
        raise UserError(
            f"{repository[:200]!a} is no repository of the Hugging Face Hub: give USER/NAME, of letters, digits, '-', "
            "'_' and '.'"
        )


def check_token() -> None:
    """Raise UserError if this machine has no token of the Hub, or one that can't be read or sent."""
    if _token() is None:
        raise UserError("uploading needs a Hugging Face token: run `hf auth login`, or set HF_TOKEN")


def _token() -> str | None:
    """Return the token of this machine; None without one. Raises UserError if it can't be read or sent."""
    from huggingface_hub import get_token

    remedy = "run `hf auth login`, or set HF_TOKEN again"
    try:
        token = get_token()
    except (OSError, ValueError) as error:
        raise UserError(f"the Hugging Face token can't be read ({error}); {remedy}") from error
    if token is not None and not (token.isascii() and token.isprintable()):
        raise UserError(f"the Hugging Face token has a character that no token has; {remedy}")
    return token


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload an export to a repository, which is made if it does not exist, and return its URL.

    Files of an earlier export that this one lacks are deleted there; others stay. Raises UserError if the folder is
    damaged or no export, without a token, and if the Hub refuses or can't be reached.
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    check_token()
    Checkpoint(folder).verify()
    api = HfApi(library_name="vae_dist", library_version=vae_dist.__version__)
    with _explained(f"can't upload to {repository}"):
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(UPLOADED),
            delete_patterns=list(UPLOADED),
            commit_message=f"vae_dist: {folder.name}",
        )
    logger.info("uploaded to %s", url)
    return url


def fetch(name: str) -> Path:
    """Download what inference needs of `hf://USER/NAME[@REVISION]`, and return its folder.

    Downloaded files are kept in the Hub's cache, which also serves without a network. Programs and other files are
    never downloaded. Raises UserError for other names, if there is no such model, if the Hub can't be reached, and if a
    file is damaged.
    """
    from huggingface_hub import cached_assets_path, snapshot_download

    repository, at, revision = name.removeprefix(SCHEME).partition("@")
    if not name.startswith(SCHEME) or (at and not _REVISION.fullmatch(revision)):
        raise UserError(
            f"{name[:200]!a} is no model of the Hugging Face Hub: give hf://USER/NAME or hf://USER/NAME@REVISION"
        )
    check_repository(repository)
    _token()  # the client says of a bad one that the network fails
    with _explained(f"can't download {name}"):
        snapshot = Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(DOWNLOADED),
                library_name="vae_dist",
                library_version=vae_dist.__version__,
            )
        )
        missing = [file for file in inference.FILES if not (snapshot / file).exists()]
        if len(missing) == len(inference.FILES):
            raise UserError(f"{name} holds no model of vae_dist: it has no {MANIFEST}")
        if missing:  # without a network, the client returns what the cache has of a repository
            raise UserError(
                f"{name} is no whole model of vae_dist: {', '.join(missing)} missing there, or not yet downloaded; "
                "check the network, or upload the model again"
            )
        place = cached_assets_path("vae_dist", namespace="models", subfolder=repository.replace("/", "--"))
        folder = _plain_files(snapshot, place / snapshot.name)
    try:
        Checkpoint(folder).verify()
    except BadCheckpointError as error:  # the client compares sizes alone
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{name} can't be used ({error}); if it is whole on the Hub, remove {snapshot.parents[1]} and try again"
        ) from error
    return folder


def _plain_files(snapshot: Path, target: Path) -> Path:
    """Make a folder of a snapshot's files, and return it.

    The Hub's cache is of symbolic links, which a checkpoint must not contain: they could lead anywhere. Hard links to
    the same content take no space.
    """
    if (target / MANIFEST).exists():
        return target
    folder = target.parent
    with writing_alone(folder, LOCK_SECONDS, f"another process makes {target}", _OTHER_CACHE) as is_alone:
        for leftover in folder.glob(".writing-*") if is_alone else ():  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        if not (target / MANIFEST).exists():
            _link_or_copy(snapshot, target)
    return target


def _link_or_copy(snapshot: Path, target: Path) -> None:
    temporary = target.with_name(f".writing-{secrets.token_hex(8)}")
    temporary.mkdir()
    try:
        for name in DOWNLOADED:
            if (content := snapshot / name).exists():
                try:
                    os.link(content.resolve(), temporary / name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(content, temporary / name)
        if not target.exists():
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into a UserError of one line, without the token. A silent Hub is an error."""
    from huggingface_hub import errors

    try:
        with _impatient():
            yield
    except UserError:
        raise
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise UserError(
            f"{problem}: there is no such repository, or your token may not read it (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{problem}: it has no such revision") from error
    except Exception as error:  # of the client and its HTTP library, which differ from version to version
        raise UserError(problem + _explanation(error)) from error


@contextmanager
def _impatient() -> Iterator[None]:
    """Give up the client's requests after SILENT_SECONDS without an answer. It would wait for ever for some of them."""
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks["request"], _limit]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def _limit(request: Any) -> None:  # of the client's HTTP library
    waits = request.extensions["timeout"]
    waits.update({phase: SILENT_SECONDS for phase, seconds in waits.items() if seconds is None})


def _explanation(error: Exception) -> str:
    """Return why the Hub's client failed, and what to do."""
    from huggingface_hub import errors

    if (status := _status(error)) is not None:
        refused = "your token may not do this (`hf auth login`, or HF_TOKEN)"
        remedy = refused if status in (401, 403) else "try again later"
        return f": the Hub answered with status {status}; {remedy}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return ": the Hugging Face Hub can't be reached, and it was not downloaded before; check the network"
    if isinstance(error, OSError) and error.errno is not None:
        return f" ({_without_token(reason(error))}); {advice(error, _OTHER_CACHE)}"
    line = _without_token(str(error).strip().partition("\n")[0][:200])
    return f" ({type(error).__name__}: {line}); check the network, or try again later"


def _status(error: BaseException | None) -> int | None:
    """Return the status of the Hub's answer that caused an error; None if no answer did."""
    from huggingface_hub import errors

    while error is not None and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__
    return None if error is None else int(error.response.status_code)


def _without_token(text: str) -> str:
    token = _token()
    return text.replace(token, "***") if token else text
