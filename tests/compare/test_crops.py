"""Crops: drawn by position, within the image, and cut as a plain reference cuts them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.compare.images import crop_and_resize, crop_boxes, uniform_numbers


def test_numbers_depend_on_seed_epoch_and_position_alone():
    epochs = np.array([3] * 5 + [4] * 4, np.int32)
    whole = uniform_numbers(7, epochs, 100)
    parts = [uniform_numbers(7, epochs[at : at + 3], 100 + at) for at in (0, 3, 6)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert not (uniform_numbers(8, epochs, 100) == whole).any()
    assert not (uniform_numbers(7, epochs + 1, 100) == whole).any()
    assert len(np.unique(whole)) == whole.size
    assert abs(uniform_numbers(0, np.zeros(4000, np.int32), 0).mean() - 0.5) < 0.01


@given(st.floats(0.05, 1.0), st.floats(0.0, 1.0), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_crops_lie_in_the_image_and_have_the_area(least, share, seed):
    most = least + share * (1 - least)
    numbers = uniform_numbers(seed, np.zeros(200, np.int32), 0)
    left, top, width, height = crop_boxes(numbers, (least, most)).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 1 + 1e-12).all()
    assert (top + height <= 1 + 1e-12).all()
    whole = (width == 1) & (height == 1)
    area = (width * height)[~whole]
    assert (area >= least - 1e-9).all()
    assert (area <= most + 1e-9).all()
    ratio = (width / height)[~whole]
    assert (ratio >= 3 / 4 - 1e-9).all()
    assert (ratio <= 4 / 3 + 1e-9).all()


def test_areas_are_spread_over_the_range():
    boxes = crop_boxes(uniform_numbers(1, np.zeros(5000, np.int32), 0), (0.2, 0.4))
    area = boxes[:, 2] * boxes[:, 3]
    assert np.histogram(area, 4, (0.2, 0.4))[0].min() > 1100
    assert abs(np.log(boxes[:, 2] / boxes[:, 3]).mean()) < 0.02
    large = crop_boxes(uniform_numbers(1, np.zeros(5000, np.int32), 0), (0.5, 1.0))
    assert ((large[:, 2] == 1) & (large[:, 3] == 1)).mean() < 0.002  # those that don't fit are drawn again


def test_crops_are_cut_as_by_plain_bilinear_sampling():
    images = torch.from_numpy(np.random.default_rng(0).random((3, 3, 10, 10), np.float32))
    boxes = np.array([[0.0, 0.0, 1.0, 1.0], [0.1, 0.3, 0.5, 0.6], [0.4, 0.0, 0.6, 0.9]])
    found = crop_and_resize(images, boxes, 7).numpy()
    for at, (left, top, width, height) in enumerate(boxes):
        for row in range(7):
            for column in range(7):
                x = np.clip((left + (column + 0.5) / 7 * width) * 10 - 0.5, 0, 9)
                y = np.clip((top + (row + 0.5) / 7 * height) * 10 - 0.5, 0, 9)
                x0, y0 = min(int(x), 8), min(int(y), 8)
                pixels = images[at, :, y0 : y0 + 2, x0 : x0 + 2].numpy()
                across = pixels[:, :, 0] * (1 - (x - x0)) + pixels[:, :, 1] * (x - x0)
                wanted = across[:, 0] * (1 - (y - y0)) + across[:, 1] * (y - y0)
                assert found[at, :, row, column] == pytest.approx(wanted, abs=1e-5)


def test_the_whole_image_at_its_own_size_is_left_as_it_is():
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(crop_and_resize(images, np.array([[0.0, 0.0, 1.0, 1.0]] * 2), 8), images)
