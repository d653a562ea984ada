"""Errors of remote files: whatever a file system's libraries raise becomes a `RemoteError`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from tailwise.errors import UnsupportedError
from tailwise.text import plain, redacted

MAX_CAUSE = 200  # characters of another library's message
# Names of classes, so that no library is imported for its exceptions alone.
_SETUP = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}
    | {"ProfileNotFound", "OfflineModeIsEnabled", "ClientConnectorCertificateError"}
)
_UNREACHABLE = frozenset(
    {"ClientConnectorError", "ClientConnectorDNSError", "ClientProxyConnectionError", "ConnectionTimeoutError"}
    | {"EndpointConnectionError", "ConnectTimeoutError", "ConnectError", "ConnectTimeout", "ProxyConnectionError"}
)
_FINAL = (ImportError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError)
_FINAL_OF_FILES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class RemoteError(OSError):
    """A remote file that cannot be read.

    Attributes:
        url: of the file, without credentials and signatures.
        cause: why, on one line, without either.
        retry: whether the same request may succeed later.
        host_wide: whether other files of the same server fail for the same reason.
        wait_seconds: the time that the server asks to wait.
    """

    def __init__(
        self, url: str, cause: str, retry: bool = False, host_wide: bool = False, wait_seconds: float = 0.0
    ) -> None:
        self.url, self.cause = redacted(url), plain(redacted(" ".join(cause.split())))
        self.retry, self.host_wide, self.wait_seconds = retry, host_wide, wait_seconds
        super().__init__(plain(f"{self.url}: {self.cause}"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way from a worker process."""
        return type(self), (self.url, self.cause, self.retry, self.host_wide, self.wait_seconds)


class RemoteNotFoundError(RemoteError, FileNotFoundError):
    """There is no such file."""


class NoRangesError(RemoteError):
    """The server ignores requests for ranges of bytes: it can only send the whole file."""

    total_bytes: int | None = None  # size of the file, if the server states it


class RemoteUnsupportedError(RemoteError, UnsupportedError):
    """The protocol is unknown, or its package is not installed."""


def status_error(url: str, status: int, detail: str = "", wait_seconds: float = 0.0) -> RemoteError:
    """Return the error of an HTTP status."""
    if url.startswith("hf://") and status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        detail = "no such repository, or a private or gated one: log in with `hf auth login`, or set HF_TOKEN"
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    cause = f"HTTP {status} {phrase}".strip() + (f" ({detail})" if detail else "")
    if status in {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}:
        return RemoteNotFoundError(url, cause)
    final = {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.HTTP_VERSION_NOT_SUPPORTED}
    again = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
    return RemoteError(url, cause, status in again or (status >= 500 and status not in final), False, wait_seconds)


def translated(error: Exception, url: str) -> RemoteError:
    """Return any exception of a file system as a RemoteError; unknown ones are worth a retry."""
    chain = list(_chain(error))
    known = next((item for item in chain if isinstance(item, RemoteError)), None)
    if known is not None:
        return known
    hidden = isinstance(error, FileNotFoundError) and isinstance(chain[-1], OSError)  # so fsspec's http has it
    first = chain[-1] if hidden else error
    name, text = type(first).__name__, str(first)
    broken = any(type(item).__module__ == "aiohttp.http_exceptions" for item in chain)  # its statuses are made up here
    status = None if broken else next((status for item in chain if (status := _status(item))), None)
    if status is not None:
        return status_error(url, status, "" if url in text or "url=" in text else text[:MAX_CAUSE])
    if isinstance(first, FileNotFoundError):
        return RemoteNotFoundError(url, "not found")
    if isinstance(first, TimeoutError):
        name, text = "time-out", str(chain[-1])
    cause = f"{name}: {text[:MAX_CAUSE]}" if text else name
    names = {type(item).__name__ for item in chain}
    if names & _SETUP:
        return RemoteError(url, cause, host_wide=True)
    retry = not isinstance(first, _FINAL + _FINAL_OF_FILES) and "TooManyRedirects" not in names
    unreachable = bool(names & _UNREACHABLE) or any(
        isinstance(item, socket.gaierror | ConnectionRefusedError) for item in chain
    )
    return RemoteError(url, cause, retry, unreachable)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its explicit causes, the innermost last."""
    seen: set[int] = set()
    item: BaseException | None = error
    while item is not None and id(item) not in seen:
        seen.add(id(item))
        yield item
        item = item.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception of aiohttp, botocore, httpx, requests, gcsfs or azure holds."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        values = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        values = [getattr(item, name, None) for item in (error, response) for name in ("status", "status_code")]
    if type(error).__module__.startswith("gcsfs"):
        values.append(getattr(error, "code", None))
    return next((value for value in values if isinstance(value, int) and 400 <= value < 600), None)
