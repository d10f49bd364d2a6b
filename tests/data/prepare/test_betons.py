"""Where images lie in a file of FFCV's format."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from convneur.data.prepare.betons import _lay_out


@given(st.lists(st.integers(1, 100), min_size=1), st.integers(0, 5))
def test_images_lie_apart_and_within_pages(sizes: list[int], first: int) -> None:
    places, end = _lay_out(np.array(sizes), first * 128, 128)
    ends = places.astype(int) + sizes
    assert places[0] == first * 128
    assert (places[1:] >= ends[:-1]).all()
    assert (places // 128 == (ends - 1) // 128).all()
    assert ends[-1] <= end < ends[-1] + 128
    assert end % 128 == 0
