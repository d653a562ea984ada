"""A pool's images and captions, decoded once for all runs (for small pools whose pixels fit on a disk), and crops of whole batches.

N samples, S pixels a side of the cached image, T of the crop. Random numbers of crops are keyed by (seed, epoch, position).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import grid_sample

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.files import create_array, digest, read_array, write_array
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.loader.dataset import Tokenizer
from tailwise.shards.decode import decode_rgb
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.locations import Locations, ensure_locations
from tailwise.shards.packed import packed_shards, refuse_packed
from tailwise.shards.ranges import open_shards, read_samples
from tailwise.storage.local import locked, replacing

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
    folder: Path,  # cache; the arrays' subfolder is named by a hash of all that decides them
    *,
    size: int,  # S, pixels
    resize: Callable[[Any], torch.Tensor],  # PIL image → float tensor [3, S, S] in [0, 1]
    tokenizer: Tokenizer,  # captions → int tensor [n, L]
    about: object,  # what `resize` and `tokenizer` depend on, as a JSON value
    context: Context | None = None,
) -> Pictures:
    """Decode a snapshot's samples, or map the arrays of an earlier call with the same arguments.

    Raise a UserError if the decoded pool would exceed MOST_BYTES, or a shard can't be read.
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

    def fill(content: tuple[bytes, bytes], pixels: npt.NDArray[np.uint8], tokens: npt.NDArray[np.int32]) -> bool:
        """Write a sample's pixels and tokens; return whether it could be decoded."""
        try:
            caption = content[1].decode()
            image = resize(decode_rgb(content[0]))
        except Exception:  # noqa: BLE001  (broken images make decoders raise anything)
            return False
        pixels[...] = (image * 255).round().to(torch.uint8).numpy()
        tokens[...] = tokenizer([caption])[0].numpy()
        return True

    if not paths[-1].exists():
        with locked(folder / ".lock", str(folder), wait=True):
            if not paths[-1].exists():
                shapes = (snapshot.rows, 3, size, size), (snapshot.rows, int(tokenizer(["a"]).shape[1]))
                _decode(catalog, snapshot, removals, paths, shapes, fill, context)
    return Pictures(*(read_array(path) for path in paths))


def _decode(
    catalog: Catalog,
    snapshot: Snapshot,
    removals: Removals,
    paths: list[Path],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],  # of pixels and tokens
    fill: Callable[..., bool],
    context: Context,
) -> None:
    """Write the three arrays. `readable` is written last: its file marks the others as complete."""
    ensure_locations(catalog, snapshot, context)
    shards = comparable_shards(catalog, snapshot, context)
    refuse_packed(catalog.folder, packed_shards(shards)["path"].to_pylist())
    ends, locations = np.cumsum(shards.column("rows").to_numpy()), Locations(catalog, snapshot)
    rows, readable = snapshot.rows, np.zeros(snapshot.rows, np.bool_)
    with (
        closing(open_shards(shards, paths[0].parent, MOST_BYTES)) as store,
        replacing(paths[0]) as pixel_path,
        replacing(paths[1]) as token_path,
    ):
        pixels = create_array(pixel_path, shapes[0], np.uint8)
        tokens = create_array(token_path, shapes[1], np.int32)
        for start in context.progress(range(0, rows, CHUNK_ROWS), "decoding the pool"):
            mine = np.arange(start, min(start + CHUNK_ROWS, rows))
            mine = mine[removals.keeps(mine)]
            homes = np.searchsorted(ends, mine, "right").astype(np.int32)
            contents = read_samples(store, homes, locations.of(mine), locations.fields)
            for row, content in zip(mine.tolist(), contents, strict=True):
                if isinstance(content, OSError):
                    remedy = "restore its shard, or `tailwise relocate` it"
                    raise UserError(f"row {row:,} can't be read ({content}): {remedy}")
                readable[row] = fill(content, pixels[row], tokens[row])
        del pixels, tokens
    write_array(paths[2], readable)


ATTEMPTS = 7
NUMBERS = 16  # per sample: area and ratio of each attempt, left and top
LOG_RATIO = np.log(4 / 3)  # width / height is between 3/4 and 4/3
_UNIT = 2.0**-53


def uniform_numbers(seed: int, epochs: npt.NDArray[np.int32], first_position: int) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) for samples at consecutive positions of the order, from `first_position`: float64 [N, 16].

    `epochs`, int32 [N], is the plan's epoch of each sample.
    """
    numbers = np.empty((len(epochs), NUMBERS))
    for epoch in np.unique(epochs).tolist():
        key = stream_key(seed, "crop", epoch)
        drawn = hash_range(key, first_position * NUMBERS, numbers.size).reshape(numbers.shape)
        mine = epochs == epoch
        numbers[mine] = (drawn[mine] >> np.uint64(11)) * _UNIT
    return numbers


def crop_boxes(numbers: npt.NDArray[np.float64], scale: tuple[float, float]) -> npt.NDArray[np.float64]:
    """Return crops of square images, float64 [N, 4]: left, top, width, height, as shares of the image's side.

    The distribution is torchvision's: area uniform in `scale` (a share of the image's), log of width / height uniform between 3/4 and 4/3.
    A crop that exceeds the image is drawn again, up to ATTEMPTS draws; then it is the whole image. `numbers` is float64 [N, 16] in [0, 1).
    """
    area = scale[0] + numbers[:, 0 : 2 * ATTEMPTS : 2] * (scale[1] - scale[0])
    shape = np.exp(LOG_RATIO * (2 * numbers[:, 1 : 2 * ATTEMPTS : 2] - 1))
    width, height = np.sqrt(area * shape), np.sqrt(area / shape)
    fits = (width <= 1) & (height <= 1)
    chosen = np.argmax(fits, axis=1)
    rows = np.arange(len(numbers))
    found = fits[rows, chosen]
    width, height = np.where(found, width[rows, chosen], 1.0), np.where(found, height[rows, chosen], 1.0)
    left, top = numbers[:, -2] * (1 - width), numbers[:, -1] * (1 - height)
    return np.stack([left, top, width, height], axis=1)


def crop_and_resize(images: torch.Tensor, boxes: npt.NDArray[np.float64], size: int) -> torch.Tensor:
    """Return the boxes cut from images [N, 3, S, S] and scaled bilinearly to [N, 3, T, T], where T is `size`.

    There is no antialiasing, so a box should not be much larger than T. `boxes` are those of `crop_boxes`.
    """
    steps = (np.arange(size) + 0.5) / size
    x = (boxes[:, 0, None] + steps * boxes[:, 2, None]) * 2 - 1
    y = (boxes[:, 1, None] + steps * boxes[:, 3, None]) * 2 - 1
    grid = np.empty((len(boxes), size, size, 2), np.float32)
    grid[..., 0] = x[:, None, :]
    grid[..., 1] = y[:, :, None]
    where = torch.from_numpy(grid).to(images.device)
    return grid_sample(images, where, mode="bilinear", padding_mode="border", align_corners=False)
