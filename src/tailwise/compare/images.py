"""A pool's images and captions, decoded once for all runs: for pools so small that their pixels fit on a disk."""

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
from tailwise.errors import UserError
from tailwise.progress import Track, silent
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
    """The decoded pool, N samples, mapped from disk.

    Attributes:
        pixels: uint8 [N, 3, S, S].
        tokens: int32 [N, L].
        readable: bool [N]; others stand in for the rest, as in the loader.
    """

    pixels: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.int32]
    readable: npt.NDArray[np.bool_]


def decoded_pool(
    catalog: Catalog,
    snapshot: Snapshot,
    folder: Path,
    *,
    size: int,
    resize: Callable[[Any], torch.Tensor],
    tokenizer: Tokenizer,
    about: object,
    track: Track = silent,
) -> Pictures:
    """Decodes a pool, or maps what was decoded before.

    Args:
        catalog: whose samples.
        snapshot: which of them.
        folder: where the arrays lie, by what they were made of.
        size: S, pixels.
        resize: PIL image → float tensor [3, S, S] in [0, 1].
        tokenizer: captions → int tensor [n, L].
        about: what `resize` and `tokenizer` depend on, as a JSON value.
        track: shows progress.

    Raises:
        UserError: the pool is too large for that.
    """
    total = snapshot.rows * 3 * size * size
    if total > MOST_BYTES:
        raise UserError(
            f"{snapshot.rows:,} images of {size} pixels are {total:,} bytes decoded, more than {MOST_BYTES:,}: "
            "train with `trainer: open_clip`, which decodes as it goes"
        )
    removals = Removals.of(catalog, snapshot, track)
    name = digest([FORMAT, snapshot.id, removals.id, size, about])
    place = folder / name
    paths = [place / f"{item}.npy" for item in ("pixels", "tokens", "readable")]
    if not paths[-1].exists():
        with locked(folder / ".lock", str(folder), wait=True):
            if not paths[-1].exists():
                _decode(catalog, snapshot, removals, paths, size, resize, tokenizer, track)
    return Pictures(*(read_array(path) for path in paths))


def _decode(
    catalog: Catalog,
    snapshot: Snapshot,
    removals: Removals,
    paths: list[Path],
    size: int,
    resize: Callable[[Any], torch.Tensor],
    tokenizer: Tokenizer,
    track: Track,
) -> None:
    """Writes the three arrays; that of `readable` comes last, and says that all are whole."""
    ensure_locations(catalog, snapshot, track)
    shards = comparable_shards(catalog, snapshot, track)
    store = open_shards(shards, paths[0].parent, MOST_BYTES)
    ends = np.cumsum(shards.column("rows").to_numpy())
    locations = Locations(catalog, snapshot)
    rows = snapshot.rows
    readable = np.zeros(rows, np.bool_)
    length = int(tokenizer(["a"]).shape[1])
    with replacing(paths[0]) as pixel_path, replacing(paths[1]) as token_path:
        pixels = create_array(pixel_path, (rows, 3, size, size), np.uint8)
        tokens = create_array(token_path, (rows, length), np.int32)
        starts = range(0, rows, CHUNK_ROWS)
        for start in track(starts, "decoding the pool", len(starts)):
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
    """Whether the sample can be decoded; if so, writes it."""
    try:
        caption = content[1].decode()
        image = resize(decode_rgb(content[0]))
    except Exception:  # noqa: BLE001  (broken images make decoders raise anything)
        return False
    pixels[...] = (image * 255).round().to(torch.uint8).numpy()
    tokens[...] = tokenizer([caption])[0].numpy()
    return True
