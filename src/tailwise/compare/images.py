"""A pool's images and captions, decoded once for all runs: for small pools whose pixels fit on a disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.files import create_array, digest, read_array
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.shards.decode import decode_rgb
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.locations import Locations, ensure_locations
from tailwise.shards.ranges import open_shards, read_samples
from tailwise.storage.local import locked, replacing

if TYPE_CHECKING:
    from tailwise.loader.dataset import Tokenizer

FORMAT = 1
CHUNK_ROWS = 1024
MOST_BYTES = 64_000_000_000


@dataclass(frozen=True)
class Pictures:
    """The decoded pool, N samples, memory-mapped."""

    pixels: npt.NDArray[np.uint8]  # uint8 [N, 3, S, S]
    tokens: npt.NDArray[np.int32]  # int32 [N, L]
    readable: npt.NDArray[np.bool_]  # bool [N]; unreadable samples are replaced by others, as in the loader


def decoded_pool(
    catalog: Catalog,
    snapshot: Snapshot,
    folder: Path,
    *,
    size: int,
    resize: Callable[[Any], torch.Tensor],
    tokenizer: Tokenizer,
    about: object,
    context: Context | None = None,
) -> Pictures:
    """Decode a snapshot's samples, or map the arrays of an earlier call with the same arguments.

    Args:
        catalog: the catalog.
        snapshot: the samples.
        folder: cache folder; the arrays' subfolder is named by a hash of all that decides them.
        size: S, pixels.
        resize: PIL image → float tensor [3, S, S] in [0, 1].
        tokenizer: captions → int tensor [n, L].
        about: what `resize` and `tokenizer` depend on, as a JSON value.
        context: runs the tasks and shows progress.

    Raises:
        UserError: the decoded pool would exceed MOST_BYTES, or a shard can't be read.
    """
    context = context or Context()
    total = snapshot.rows * 3 * size * size
    if total > MOST_BYTES:
        raise UserError(
            f"{snapshot.rows:,} images of {size} pixels are {total:,} bytes decoded, more than {MOST_BYTES:,}: "
            "use `trainer: open_clip`, which decodes during the training"
        )
    removals = Removals.of(catalog, snapshot, context.progress)
    name = digest([FORMAT, snapshot.id, removals.id, size, about])
    paths = [folder / name / f"{item}.npy" for item in ("pixels", "tokens", "readable")]
    if not paths[-1].exists():
        with locked(folder / ".lock", str(folder), wait=True):
            if not paths[-1].exists():
                _decode(catalog, snapshot, removals, paths, size, resize, tokenizer, context)
    return Pictures(*(read_array(path) for path in paths))


def _decode(
    catalog: Catalog,
    snapshot: Snapshot,
    removals: Removals,
    paths: list[Path],
    size: int,
    resize: Callable[[Any], torch.Tensor],
    tokenizer: Tokenizer,
    context: Context,
) -> None:
    """Write the three arrays. `readable` is written last: its file marks the others as complete."""
    ensure_locations(catalog, snapshot, context)
    shards = comparable_shards(catalog, snapshot, context)
    store = open_shards(shards, paths[0].parent, MOST_BYTES)
    ends = np.cumsum(shards.column("rows").to_numpy())
    locations = Locations(catalog, snapshot)
    rows = snapshot.rows
    readable = np.zeros(rows, np.bool_)
    length = int(tokenizer(["a"]).shape[1])
    with replacing(paths[0]) as pixel_path, replacing(paths[1]) as token_path:
        pixels = create_array(pixel_path, (rows, 3, size, size), np.uint8)
        tokens = create_array(token_path, (rows, length), np.int32)
        for start in context.progress(range(0, rows, CHUNK_ROWS), "decoding the pool"):
            mine = np.arange(start, min(start + CHUNK_ROWS, rows))
            mine = mine[removals.keeps(mine)]
            homes = np.searchsorted(ends, mine, "right").astype(np.int32)
            for row, content in zip(mine.tolist(), read_samples(store, homes, locations.of(mine)), strict=True):
                if isinstance(content, OSError):
                    raise UserError(
                        f"row {row:,} can't be read ({content}): restore its shard, or `tailwise relocate` it"
                    )
                readable[row] = _fill(content, pixels[row], tokens[row], resize, tokenizer)
        del pixels, tokens
    store.close()
    with replacing(paths[2]) as path, path.open("wb") as stream:
        np.save(stream, readable, allow_pickle=False)


def _fill(
    content: tuple[bytes, bytes],
    pixels: npt.NDArray[np.uint8],
    tokens: npt.NDArray[np.int32],
    resize: Callable[[Any], torch.Tensor],
    tokenizer: Tokenizer,
) -> bool:
    """Write a sample's pixels and tokens; return whether it could be decoded."""
    try:
        caption = content[1].decode()
        image = resize(decode_rgb(content[0]))
    except Exception:  # noqa: BLE001  (broken images make decoders raise anything)
        return False
    pixels[...] = (image * 255).round().to(torch.uint8).numpy()
    tokens[...] = tokenizer([caption])[0].numpy()
    return True
