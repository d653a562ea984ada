"""Files of the Hugging Face Hub, hf://: the Hub's client lists them, and they are read over HTTP like all others, with the same checks.

The client's own files read 5 MB ahead of each range, and repeat requests without a bound that is shared by threads.
"""

from __future__ import annotations

from typing import Any


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
