"""Random resized crops of whole batches, whose random numbers are keyed by (seed, epoch, position).

N samples, S pixels a side of what is cut from, T of what comes out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import grid_sample

from tailwise.kernels.keyed import hash_range, stream_key

ATTEMPTS = 7
NUMBERS = 16  # of a sample: area and ratio of each attempt, and the place
LOG_RATIO = np.log(4 / 3)  # width / height lies between 3/4 and 4/3
_UNIT = 2.0**-53


def uniform_numbers(seed: int, epochs: npt.NDArray[np.int32], first_position: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) for samples at consecutive positions of the order: float64 [N, 16].

    Args:
        seed: of the order.
        epochs: int32 [N], the plan's epoch of each.
        first_position: of the first.
    """
    numbers = np.empty((len(epochs), NUMBERS))
    for epoch in np.unique(epochs).tolist():
        key = stream_key(seed, "crop", epoch)
        drawn = hash_range(key, first_position * NUMBERS, numbers.size).reshape(numbers.shape)
        mine = epochs == epoch
        numbers[mine] = (drawn[mine] >> np.uint64(11)) * _UNIT
    return numbers


def crop_boxes(numbers: npt.NDArray[np.float64], scale: tuple[float, float]) -> npt.NDArray[np.float64]:
    """Crops of square images: area uniform in `scale`, log of width / height uniform between 3/4 and 4/3, as torchvision draws them.

    A crop that is wider or higher than the image is drawn again, ATTEMPTS times in all; then it is the whole image.

    Args:
        numbers: float64 [N, 16] in [0, 1).
        scale: least and most area, as a share of the image's.

    Returns:
        float64 [N, 4]: left, top, width, height, as shares of the image's side.
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
    """Cuts a box from each image and scales it to T × T, bilinearly: for boxes that are not much larger than that.

    Args:
        images: float [N, 3, S, S].
        boxes: float64 [N, 4]: left, top, width, height, as shares of the side.
        size: T.

    Returns:
        float [N, 3, T, T].
    """
    steps = (np.arange(size) + 0.5) / size
    x = (boxes[:, 0, None] + steps * boxes[:, 2, None]) * 2 - 1
    y = (boxes[:, 1, None] + steps * boxes[:, 3, None]) * 2 - 1
    grid = np.empty((len(boxes), size, size, 2), np.float32)
    grid[..., 0] = x[:, None, :]
    grid[..., 1] = y[:, :, None]
    where = torch.from_numpy(grid).to(images.device)
    return grid_sample(images, where, mode="bilinear", padding_mode="border", align_corners=False)
