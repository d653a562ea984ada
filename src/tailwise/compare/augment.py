"""Random resized crops of whole batches. Random numbers are keyed by (seed, epoch, position).

N samples, S pixels a side of the cached image, T of the crop.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import grid_sample

from tailwise.kernels.keyed import hash_range, stream_key

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
