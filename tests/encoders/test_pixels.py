import numpy as np
import pytest
from PIL import Image

from tailwise.demo.pool import draw_image
from tailwise.encoders.pixels import DIMENSION, describe


def demo_images(concepts: int, each: int, size_px: int = 64) -> list[Image.Image]:
    return [
        draw_image(concept, size_px, np.random.default_rng([concept, sample]))
        for concept in range(concepts)
        for sample in range(each)
    ]


def test_rows_are_float32_of_unit_norm():
    rows = describe(demo_images(5, 3))
    assert rows.shape == (15, DIMENSION)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=1e-6)


def test_no_images_no_rows():
    assert describe([]).shape == (0, DIMENSION)


def test_a_row_does_not_depend_on_its_batch():
    images = demo_images(20, 7)  # more than two chunks
    rows = describe(images)
    np.testing.assert_array_equal(rows, np.concatenate([describe([image]) for image in images]))
    np.testing.assert_array_equal(rows[::-1], describe(images[::-1]))
    np.testing.assert_array_equal(rows[3:90], describe(images[3:90]))


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (127, 127, 127), (200, 30, 90)])
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (300, 20)])
def test_a_constant_image_has_a_unit_row(colour, size):
    row = describe([Image.new("RGB", size, colour)])
    assert np.isfinite(row).all()
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)


def test_grey_images_have_no_layout_and_no_edges():
    row = describe([Image.new("RGB", (64, 64), (127, 127, 127))])[0]
    assert np.abs(row[6**3 :]).max() < 1e-4


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_are_seen_as_rgb(mode):
    image = demo_images(1, 1)[0].convert(mode)
    np.testing.assert_array_equal(describe([image]), describe([image.convert("RGB")]))


def test_size_matters_little():
    small, large = (describe([draw_image(3, size_px, np.random.default_rng(0))])[0] for size_px in (64, 200))
    assert small @ large > 0.9


def test_images_of_a_concept_are_near_and_others_are_not():
    each = 8
    rows = describe(demo_images(64, each))
    cosines = rows @ rows.T
    concept = np.repeat(np.arange(64), each)
    same = concept[:, None] == concept
    within = cosines[same & ~np.eye(len(rows), dtype=bool)]
    between = cosines[~same]
    assert (within > 0.7).mean() > 0.95
    assert between.mean() < 0.2
    assert np.quantile(between, 0.99) < np.quantile(within, 0.01)


def test_nearest_mean_tells_the_concept():
    train, test = 6, 2
    rows = describe(demo_images(64, train + test)).reshape(64, train + test, DIMENSION)
    nearest = (rows[:, train:] @ rows[:, :train].mean(axis=1).T).argmax(axis=2)
    assert (nearest == np.arange(64)[:, None]).mean() > 0.98
