"""`samples_seen` for recipes with phases: one number for each, or a total that is shared exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.recipes import Phase, Recipe, load_recipe
from tailwise.requests import TrainRequest
from tailwise.train.phases import _phases

LENGTHS = st.lists(st.integers(1, 10**12), min_size=1, max_size=6)


def phases_of(recipe, samples_seen):
    return [(phase.epochs, phase.samples_seen) for phase in _phases(TrainRequest(samples_seen=samples_seen), recipe)]


def recipe_of(*phases):
    return Recipe(*"xxxxx", {}, tuple(Phase(**phase) for phase in phases))


@given(LENGTHS, st.integers(1, 10**13), st.sampled_from(["samples_seen", "epochs"]))
def test_a_total_is_shared_in_the_recipe_s_proportions_and_its_shares_sum_to_it(weights, total, unit):
    shares = [samples for _, samples in phases_of(recipe_of(*({unit: weight} for weight in weights)), total)]
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share * sum(weights) - total * weight) < sum(weights)


@given(LENGTHS)
def test_one_number_for_each_phase_is_taken_as_it_is(lengths):
    recipe = recipe_of(*({"epochs": 1} if number % 2 else {"samples_seen": 5} for number in range(len(lengths))))
    text = ",".join(map(str, lengths))
    assert phases_of(recipe, text) == phases_of(recipe, lengths) == [(None, length) for length in lengths]


def test_the_paper_s_longer_run_is_the_shorter_one_s_recipe_with_other_lengths():
    base, longer = load_recipe("dynamics-vit-b16"), load_recipe("dynamics-vit-b16-dfn-2.56b")
    assert phases_of(base, "2560000000,128000000") == [(None, phase.samples_seen) for phase in longer.phases]
    assert phases_of(base, 1_408_000) == [(None, 1_280_000), (None, 128_000)]
    assert phases_of(base, 10) == [(None, 9), (None, 1)]
    assert phases_of(load_recipe("dbp-vit-b32"), 5_000) == [(None, 5_000)]
    assert phases_of(None, "640") == [(None, 640)]


@pytest.mark.parametrize("given", ["", "5,", "5,,5", "a", "1e6", "0", "-3", 0, -1, (5, 0), 1.5, "1_0,x"])
def test_what_is_no_number_of_samples_is_refused(given):
    with pytest.raises(UserError, match=r"`samples_seen` .*: give a whole number of at least 1, or one for each phase"):
        TrainRequest(samples_seen=given)


def test_numbers_that_fit_no_phases_are_refused():
    mixed = recipe_of({"epochs": 2}, {"samples_seen": 5})
    with pytest.raises(
        UserError, match="7: some of the recipe's 2 phases are given in epochs, some in samples: give one number for"
    ):
        phases_of(mixed, 7)
    with pytest.raises(
        UserError, match="1,280,100: 3 numbers for 1 phase: give one number for all of the training, or one for"
    ):
        phases_of(None, "1,280,100")
