import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.plan.methods import Clusters, by_density, complexity, flat, power, proportional

FIXED = settings(derandomize=True, deadline=None, max_examples=100)


@st.composite
def clusters(draw):
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Clusters(rng.integers(1, 10**6, count), rng.random(count), 2 * rng.random(count))


@FIXED
@given(clusters(), st.floats(0.01, 100))
def test_complexity_is_the_softmax_of_the_product_of_distances(clusters, temperature):
    pairs = zip(clusters.d_intra.tolist(), clusters.d_inter.tolist(), strict=True)
    logits = [intra * inter / temperature for intra, inter in pairs]
    total = math.fsum(math.exp(logit) for logit in logits)
    expected = [math.exp(logit) / total for logit in logits]
    np.testing.assert_allclose(complexity(clusters, temperature=temperature), expected, rtol=1e-11)


def test_complexity_does_not_overflow():
    far = Clusters(np.array([5, 5]), np.array([1.9, 1.8]), np.array([2.0, 2.0]))
    weights = complexity(far, temperature=0.001)  # exp(3800) is beyond float64
    np.testing.assert_allclose(weights, [1, math.exp(-200)], rtol=1e-10)


def test_complexity_does_not_look_at_sizes():
    distances = np.array([0.1, 0.3, 0.2]), np.array([0.4, 0.5, 0.6])
    np.testing.assert_array_equal(
        complexity(Clusters(np.array([1, 2, 3]), *distances), temperature=0.1),
        complexity(Clusters(np.array([900, 5, 77]), *distances), temperature=0.1),
    )


@FIXED
@given(clusters(), st.floats(0, 1))
def test_power_is_size_to_the_alpha(clusters, alpha):
    expected = [size**alpha for size in clusters.size.tolist()]
    np.testing.assert_allclose(power(clusters, alpha=alpha), expected, rtol=1e-13)


@FIXED
@given(clusters())
def test_flat_and_proportional_are_the_ends_of_power(clusters):
    np.testing.assert_array_equal(flat(clusters), np.ones(len(clusters.size)))
    np.testing.assert_array_equal(proportional(clusters), clusters.size)


@pytest.mark.parametrize("weight", [flat, proportional])
def test_weights_are_float64(weight):
    assert weight(Clusters(np.array([3]), np.ones(1), np.ones(1))).dtype == np.float64


def test_density_in_place_of_size():
    size, nothing = np.array([10, 10, 40]), np.zeros(3)
    same = Clusters(size, nothing, nothing, density=size)
    np.testing.assert_allclose(by_density(same, alpha=0.2), power(same, alpha=0.2))
    pool = Clusters(
        size, nothing, nothing, density=np.array([1000, 10, 0])
    )  # one in a crowd, one alone, one of scattered members
    rates = by_density(pool, alpha=0.2) / size
    np.testing.assert_allclose(rates, [1000**-0.8, 10**-0.8, 1])
    with pytest.raises(UserError, match="this grouping has no density"):
        by_density(Clusters(size, nothing, nothing), alpha=0.2)
