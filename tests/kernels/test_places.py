"""Places of equal values, against a plain search."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tailwise.kernels.places import by_value


@given(st.lists(st.integers(-3, 5), max_size=30))
def test_each_value_comes_once_with_all_its_places(values):
    found = [(value, places.tolist()) for value, places in by_value(np.array(values, np.int64))]
    assert found == [
        (value, [at for at, other in enumerate(values) if other == value]) for value in sorted(set(values))
    ]
