"""Downloads within bounds of time and size, checked by their md5.

torchvision's downloader is not used: it waits for a silent server for ever, accepts a truncated file that is already on
the disk, and falls back from HTTPS to HTTP.
"""

import hashlib
import threading
import time
import urllib.request
from concurrent.futures import Future, wait
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError
from urllib.parse import urljoin

SILENCE_SECONDS = 5  # per address of a host, and hosts have up to eight: dead mirrors are given up within a minute
ARCHIVE_SECONDS = 300
ARCHIVE_BYTES = 64 * 2**20  # the largest has 26 MB
REDIRECTS = 5

_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.UnknownHandler,
)


class DownloadError(Exception):
    """A server did not send the archive that was expected."""


def fetch(url: str, md5: str) -> bytes:
    """Return the archive at `url`. Raises DownloadError, after ARCHIVE_SECONDS at the latest.

    A thread receives it: a socket's timeout does not stop a server that is slow but never silent.
    """
    received: Future[bytes] = Future()

    def receive() -> None:
        try:
            received.set_result(_receive(url))
        except BaseException as error:
            received.set_exception(error)

    threading.Thread(target=receive, daemon=True).start()
    wait([received], ARCHIVE_SECONDS)
    if not received.done():
        raise DownloadError(f"{url} takes more than {ARCHIVE_SECONDS} s")
    try:
        content = received.result()
    except (DownloadError, OSError, HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        code = f"{error.code} " if isinstance(error, HTTPError) else ""
        # The server can influence this text, and a terminal interprets what is not printable.
        text = "".join(letter if letter.isprintable() else "?" for letter in reason[:200])
        raise DownloadError(f"{url}: {code}{text}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DownloadError(f"{url} is corrupt: its md5 is not {md5}")
    return content


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


def _open(url: str) -> HTTPResponse:
    """Return the response of `url`. Redirects are followed to HTTP and HTTPS, but never from HTTPS to HTTP.

    urllib's own handler reads a redirect's whole body first, however long it is.
    """
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    for _ in range(REDIRECTS + 1):
        try:
            response: HTTPResponse = opener.open(url, timeout=SILENCE_SECONDS)
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
