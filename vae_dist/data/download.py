"""Downloads within bounds of time and size, checked by their digests.

torchvision's downloader is not used: it waits for a silent server for ever, accepts a truncated file that is already on
the disk, and falls back from HTTPS to HTTP.
"""

import hashlib
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from http.client import HTTPException, HTTPResponse
from io import BufferedWriter
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.parse import urljoin

SILENCE_SECONDS = 5  # per address of a host, and hosts have up to eight: dead mirrors are given up within a minute
ARCHIVE_SECONDS = 300
ARCHIVE_BYTES = 64 * 2**20  # the largest has 26 MB
FILE_SECONDS = 3600
REDIRECTS = 5

T = TypeVar("T")

_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.UnknownHandler,
)


class Published(NamedTuple):
    """A file at a public address, of known content."""

    folder: str  # its address, without the name
    name: str
    bytes: int
    sha256: str

    def url(self, mirror: str | None) -> str:
        """The file's address, in its own folder or in a mirror's."""
        return f"{(mirror or self.folder).rstrip('/')}/{self.name}"


class DownloadError(Exception):
    """A server did not send the archive that was expected."""


def fetch(url: str, md5: str) -> bytes:
    """Return the archive at `url`. Raises DownloadError, after ARCHIVE_SECONDS at the latest."""
    content = _in_time(url, ARCHIVE_SECONDS, lambda: _receive(url))
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DownloadError(f"{url} is corrupt: its md5 is not {md5}")
    return content


def fetch_file(url: str, path: Path, size: int, sha256: str) -> None:
    """Write the file at `url`, of `size` bytes, to `path`. Raises DownloadError, after FILE_SECONDS at the latest.

    If the transfer breaks off, what came stays beside `path`, and the next call asks for the rest alone. Of a file with
    another sha256 nothing stays.
    """
    part = path.with_name(f".{path.name}.part")
    _in_time(url, FILE_SECONDS, lambda: _receive_rest(url, part, size))
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        part.unlink()
        raise DownloadError(f"{url} is corrupt: its sha256 is not {sha256}")
    os.replace(part, path)


def _in_time(url: str, seconds: float, receive: Callable[[], T]) -> T:
    """Return what `receive` does. Raises DownloadError if that fails or takes more than some seconds.

    It runs in a thread: a socket's timeout does not stop a server that is slow but never silent.
    """
    received: Future[T] = Future()

    def run() -> None:
        try:
            received.set_result(receive())
        except BaseException as error:
            received.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait([received], seconds)
    if not received.done():
        raise DownloadError(f"{url} takes more than {seconds} s")
    try:
        return received.result()
    except (DownloadError, OSError, HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        code = f"{error.code} " if isinstance(error, HTTPError) else ""
        # The server can influence this text, and a terminal interprets what is not printable.
        text = "".join(letter if letter.isprintable() else "?" for letter in reason[:200])
        raise DownloadError(f"{url}: {code}{text}") from error


def _receive(url: str) -> bytes:
    deadline = time.monotonic() + ARCHIVE_SECONDS
    content = bytearray()
    with _open(url) as response:
        while chunk := response.read1(2**16):
            content += chunk
            if time.monotonic() > deadline or len(content) > ARCHIVE_BYTES:
                raise DownloadError(f"it exceeds {ARCHIVE_SECONDS} s or {ARCHIVE_BYTES} bytes")
        if response.length:  # bytes still missing
            raise DownloadError(f"it is truncated: {len(content)} of {len(content) + response.length} bytes came")
    return bytes(content)


def _receive_rest(url: str, part: Path, size: int) -> None:
    """Append to `part` what it lacks of the `size` bytes at `url`."""
    deadline = time.monotonic() + FILE_SECONDS
    start = part.stat().st_size if part.exists() else 0
    if start == size:
        return
    if start > size:  # of another file, or of two processes without locks: there is no rest to ask for
        part.unlink()
        start = 0
    with _open(url, start) as response, _append_to(part) as file:
        if response.status != 206:  # the server sends the file from its beginning
            if response.length is not None and response.length < size:
                raise DownloadError(f"it is another file, such as a page of a proxy: {response.length} of {size} bytes")
            file.truncate(start := 0)
        elif not str(response.headers.get("Content-Range")).startswith(f"bytes {start}-"):
            raise DownloadError(f"it sends other bytes than those from {start} on")
        received = start
        while chunk := response.read1(2**16):
            received += len(chunk)
            if received > size:
                file.truncate(0)
            if time.monotonic() > deadline or received > size:
                raise DownloadError(f"it exceeds {FILE_SECONDS} s or {size} bytes")
            file.write(chunk)
    if received < size:
        raise DownloadError(f"it is truncated: {received} of {size} bytes came")


def _append_to(path: Path) -> BufferedWriter:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "ab")


def _open(url: str, start: int = 0) -> HTTPResponse:
    """Return the response of `url`, asked for from the byte `start` on.

    Redirects are followed to HTTP and HTTPS, but never from HTTPS to HTTP.

    urllib's own handler reads a redirect's whole body first, however long it is.
    """
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    for _ in range(REDIRECTS + 1):
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
            response: HTTPResponse = opener.open(request, timeout=SILENCE_SECONDS)
            return response
        except HTTPError as error:
            error.close()
            target = error.headers.get("Location")
            if error.code not in (301, 302, 303, 307, 308) or target is None:
                raise
            secure = url.startswith("https:")
            url = urljoin(url, target)
            if not url.startswith("https:" if secure else ("https:", "http:")):
                raise DownloadError(f"it redirects to {url}, which is not followed") from error
    raise DownloadError(f"it redirects more than {REDIRECTS} times, at last to {url}")
