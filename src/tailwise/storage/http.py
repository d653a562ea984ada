"""One HTTP request, with the response held against what was asked: status, range, length, encoding, pace.

Files of the Hugging Face Hub, hf://, are listed by the Hub's client and read here. The client's own files read 5 MB ahead of each range,
and repeat requests without a bound that is shared by threads.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from tailwise.storage.errors import NoRangesError, RemoteError, status_error
from tailwise.storage.spans import Span

NO_RANGES = "its server doesn't answer requests for ranges"
_PIECE_BYTES = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclass(frozen=True)
class Patience:
    """Bounds of the requests for one file, and of their retries."""

    attempts: int = 8  # requests that may fail one after the other
    seconds: float = 45.0  # from the first failure
    backoff_seconds: float = 0.25  # before the first retry, doubled each time
    full_for: int = 3  # after this number of files of a server was given up, others get `short_attempts`
    short_attempts: int = 2
    connect_seconds: float = 10.0  # of a request, until there is a connection
    silence_seconds: float = 20.0  # of a request, without a byte
    least_bytes_per_second: float = 20_000.0  # of a request on average, after the first `silence_seconds`

    def call_seconds(self, size_bytes: int) -> float:
        """Return the time for a whole call of another file system, which may repeat requests itself."""
        return 1.5 * self.silence_seconds + size_bytes / (10 * self.least_bytes_per_second)


async def get(
    files: Any,  # noqa: ANN401  (fsspec has no types)
    url: str,
    patience: Patience,
    write: Callable[[bytes], object],
    span: Span | None,
    address: str,
    headers: Mapping[str, str],
) -> int | None:
    """Get a file, or a span of its bytes, or those of them that the server sends; nothing beyond the file's end.

    `files` is fsspec's HTTPFileSystem. `url` names the file in errors; it is at `address`, requested with these `headers` too. `write`
    takes the bytes as they come, also those of a response that breaks off. The size of the whole file is returned, if the server
    states it.

    Raises:
        NoRangesError: the server answers with the whole file; nothing has been written.
        RemoteError: the response is an error, or not what was asked for.
        Exception: aiohttp's.
    """
    import aiohttp  # noqa: PLC0415  (there if fsspec's http is)

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=patience.connect_seconds, sock_read=patience.silence_seconds
    )
    headers = {**files.kwargs.get("headers", {}), **headers, "Accept-Encoding": "identity"}
    if span is not None:
        headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    session = await files.set_session()
    async with session.get(
        files.encode_url(address), **{"timeout": timeout, **files.kwargs, "headers": headers}
    ) as response:
        there, total = _checked(response, url, span)
        if not there:
            return total
        content = bytearray()
        # Only their number says which bytes come.
        at_once = span is not None and "Content-Range" not in response.headers
        began, count = time.monotonic(), 0
        async for piece in response.content.iter_chunked(_PIECE_BYTES):
            count += len(piece)
            if span is not None and count > (most := span[1] - span[0]):
                raise RemoteError(url, f"more than the {most:,} bytes came that were asked for", retry=True)
            (content.extend if at_once else write)(piece)
            allowed = patience.silence_seconds + count / patience.least_bytes_per_second
            if time.monotonic() - began > allowed:
                raise TimeoutError(f"{count:,} bytes in {allowed:.0f} s: too slow")
        if at_once:
            write(bytes(content))
        return total


def _checked(response: Any, url: str, span: Span | None) -> tuple[bool, int | None]:  # noqa: ANN401
    """Return whether the response holds what was asked for, else the file ends before; and the size of the file, if stated."""
    status, headers = response.status, response.headers
    found = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
    if span is not None and status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return False, int(found[3]) if found and found[3] != "*" else None
    if status not in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT}:
        raise status_error(url, status, wait_seconds=_retry_after(headers.get("Retry-After", "")))
    encoding = headers.get("Content-Encoding", "identity")
    if encoding not in {"", "identity"}:
        raise RemoteError(url, f"its server sends it compressed (Content-Encoding: {encoding}), although asked not to")
    if status == HTTPStatus.OK:
        length = headers.get("Content-Length")
        total = int(length) if length is not None and length.isdecimal() else None
        if span is not None and (span[0] > 0 or total is None or total > span[1]):
            error = NoRangesError(url, NO_RANGES)
            error.total_bytes = total
            raise error
        return True, total
    if span is None:
        raise RemoteError(url, "a part came where the whole file was asked for", retry=True)
    if found and found[1] is not None and int(found[1]) != span[0]:
        raise RemoteError(url, f"bytes from {int(found[1]):,} on came, from {span[0]:,} on were asked for", retry=True)
    if headers.get("Content-Type", "").startswith("multipart/"):
        raise RemoteError(url, "several ranges came where one was asked for")
    return True, int(found[3]) if found and found[3] != "*" else None


def _retry_after(value: str) -> float:
    """Return the seconds of a Retry-After header; 0 where it says nothing."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def is_hub(files: Any) -> bool:  # noqa: ANN401  (fsspec has no types)
    """Return whether a file system of fsspec is the Hub's."""
    return "hf" in ([files.protocol] if isinstance(files.protocol, str) else files.protocol)


def address_of(files: Any, name: str) -> tuple[str, dict[str, str]]:  # noqa: ANN401
    """Return the HTTP address of a file of the Hub, and the headers of its requests, with the user's token.

    The repository is looked up once a process; whatever the client raises is raised.
    """
    import huggingface_hub.utils  # noqa: PLC0415  (there if the file system is)

    found = files.resolve_path(name)
    if not hasattr(found, "repo_id"):
        raise NotImplementedError("buckets of the Hub can't be read, repositories can")
    place = {"repo_type": found.repo_type, "revision": found.revision, "endpoint": files.endpoint}
    headers = huggingface_hub.utils.build_hf_headers(token=files.token)  # type: ignore[attr-defined]
    return huggingface_hub.hf_hub_url(found.repo_id, found.path_in_repo, **place), headers
