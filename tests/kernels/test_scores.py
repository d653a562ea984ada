import threading

import numpy as np
import pytest
import torch

from tailwise.kernels import products, scores
from tailwise.kernels.greatest import greatest_cosines
from tailwise.kernels.keyed import permutation, permute_range, stream_key
from tailwise.kernels.scores import TargetGram, clip_loss, cosines, gram


def unit(x):
    wide = x.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def log_sum_exp(x, axis):
    top = x.max(axis=axis, keepdims=True)
    return np.log(np.exp(x - top).sum(axis=axis)) + top.squeeze(axis)


def plain_clip_loss(image, text, temperature):
    s = unit(image) @ unit(text).T
    both = log_sum_exp(s / temperature, 1) + log_sum_exp(s / temperature, 0)
    return np.diag(s) - temperature / 2 * both


@pytest.fixture(scope="module")
def pairs(unit_rows):
    """(n, d, seed) → image and text rows, each text near its image."""

    def make(count, dimension, seed=0):
        image = unit_rows(count, dimension, seed)
        text = unit(image.astype(np.float64) + unit_rows(count, dimension, seed + 1000)).astype(np.float16)
        return image, text

    return make


def test_cosines_are_those_of_a_plain_reference(pairs):
    image, text = pairs(300, 33)
    image[7], text[11] = 0, 0
    found = cosines(image, text)
    assert np.flatnonzero(np.isnan(found)).tolist() == [7, 11]
    good = np.delete(np.arange(300), [7, 11])
    assert np.abs(found[good] - (unit(image[good]) * unit(text[good])).sum(1)).max() < 1e-15


def test_exponentials_are_right_to_the_last_bits():
    low = np.linspace(-99_600, 285, 100_001).astype(np.int32).reshape(1, -1)  # exponents from -419.3 to 0.2
    none, sums, found = np.zeros_like(low), np.zeros(1), np.zeros(low.shape[1])
    scores._exponentials(none, none, low, np.full(1, 0.0042), np.ones(low.shape[1]), 1.0, sums, found)
    exact = np.exp(low[0] * 0.0042 - 1.0)
    assert np.abs(found / exact - 1).max() < 4e-16
    assert sums[0] == pytest.approx(exact.sum(), rel=1e-14)


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.07, 1.0, 100.0])
@pytest.mark.parametrize("size", [1, 2, 3, 50, 1024, 1025, 2300])
def test_clip_loss_is_that_of_a_plain_reference(pairs, size, temperature):
    image, text = pairs(size, 24)
    found = clip_loss(image, text, temperature)
    assert np.abs(found - plain_clip_loss(image, text, temperature)).max() < 3e-7


@pytest.mark.parametrize("dimension", [2, 7, 512, 1100])
def test_clip_loss_is_right_in_any_dimension(pairs, dimension):
    image, text = pairs(260, dimension, seed=dimension)
    found = clip_loss(image, text, 0.01)
    assert np.abs(found - plain_clip_loss(image, text, 0.01)).max() < (1e-7 if dimension > 500 else 3e-7)


def test_clip_loss_is_the_same_bits_where_int8_products_are_wrong(pairs, monkeypatch):
    image, text = pairs(300, 40)
    found = clip_loss(image, text, 0.01)
    monkeypatch.setattr(products, "is_sound", lambda *_, **__: False)
    assert np.array_equal(clip_loss(image, text, 0.01), found)


def test_clip_loss_takes_images_and_texts_alike_and_pairs_in_any_order(pairs):
    image, text = pairs(1500, 16)
    found = clip_loss(image, text, 0.01)
    assert np.abs(found - clip_loss(text, image, 0.01)).max() < 1e-14
    order = np.random.default_rng(0).permutation(1500)
    assert np.abs(found[order] - clip_loss(image[order], text[order], 0.01)).max() < 1e-14


def test_the_same_bits_on_any_number_of_threads(pairs):
    image, text = pairs(1400, 40)
    targets, _ = pairs(333, 40, seed=5)

    def all_scores(threads):
        torch.set_num_threads(threads)
        norms = TargetGram(gram([targets])).norms(image)
        return clip_loss(image, text, 0.01), norms, greatest_cosines(image, [targets])

    before = torch.get_num_threads()
    try:
        one, several = all_scores(1), all_scores(3)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(clip_loss(image, text, 0.01, threads=5), one[0])
    for a, b in zip(one, several, strict=True):
        assert np.array_equal(a, b)


def test_the_gram_matrix_is_exact(unit_rows):
    rows = unit_rows(5000, 6)
    whole = (rows.astype(np.float64) * 2.0**24).astype(np.int64).astype(object)  # Python's integers
    exact = (whole.T @ whole).astype(object)
    found = gram([rows])
    error = max(abs(int(found[i, j] * 2.0**48) - exact[i, j]) for i in range(6) for j in range(6))
    assert error <= 2**48 * 5000 * 2.0**-53
    assert np.array_equal(found, gram([rows[:1], rows[1:4100], rows[4100:]]))
    order = np.random.default_rng(0).permutation(5000)
    assert np.array_equal(found, gram([rows[order]]))


@pytest.mark.parametrize(("targets", "dimension"), [(1, 5), (3, 64), (700, 64), (4000, 17), (300, 387)])
def test_norms_are_those_of_a_plain_reference(unit_rows, targets, dimension):
    image = unit_rows(200, dimension, seed=1)
    image[3] = 0
    target = unit_rows(targets, dimension, seed=2)
    image[5] = target[0]
    image[6] = -target[0]
    plain = unit(np.delete(image, 3, axis=0)) @ target.astype(np.float64).T
    norms = TargetGram(gram([target])).norms(image)
    assert np.isnan(norms[3])
    np.testing.assert_allclose(np.delete(norms, 3), np.linalg.norm(plain, axis=1), rtol=1e-8, atol=1e-8)
    pieces = [target[: targets // 2], target[targets // 2 :]] if targets > 1 else [target]
    greatest, other = (greatest_cosines(image, pieces, precision=precision) for precision in ("int8", "float32"))
    assert np.array_equal(greatest, other, equal_nan=True)
    assert np.isnan(greatest[3])
    cosine = np.abs(unit(np.delete(image, 3, axis=0)) @ unit(target).T)
    np.testing.assert_allclose(np.delete(greatest, 3), cosine.max(1), rtol=1e-14, atol=1e-15)
    assert greatest[5] == greatest[6] == pytest.approx(1, abs=1e-15)


def test_a_wrong_product_of_the_screening_is_noticed(unit_rows, monkeypatch):
    image, target = unit_rows(500, 64, seed=1), unit_rows(300, 64, seed=2)
    right = greatest_cosines(image, [target], precision="int8")
    fast, calls = products._fast, []

    def wrong(left, found, scratch):
        calls.append(len(left))
        return fast(left, found, scratch) + 2000

    monkeypatch.setattr(products, "_fast", wrong)
    monkeypatch.setattr(products, "is_sound", lambda *_, onednn=False: not onednn)
    monkeypatch.setattr(products, "_distrusted", threading.Event())
    assert np.array_equal(greatest_cosines(image, [target], precision="int8"), right)
    assert calls
    assert products._distrusted.is_set()


def test_chunks_play_no_role(pairs):
    image, text = pairs(100, 48)
    target, _ = pairs(90, 48, seed=3)
    target_gram = TargetGram(gram([target]))
    for score in (
        lambda rows: cosines(image[rows], text[rows]),
        lambda rows: target_gram.norms(image[rows]),
        lambda rows: greatest_cosines(image[rows], [target]),
    ):
        whole = score(slice(None))
        pieces = [score(slice(start, start + 7)) for start in range(0, 100, 7)]
        assert np.array_equal(whole, np.concatenate(pieces))


@pytest.mark.parametrize("size", [1, 2, 16, 17, 1000])
def test_a_range_of_a_permutation_is_a_piece_of_it(size):
    key = stream_key(0, "test")
    whole = permutation(key, size)
    assert sorted(whole.tolist()) == list(range(size))
    assert permute_range(key, size, size // 3, size - size // 3).tolist() == whole[size // 3 :].tolist()
