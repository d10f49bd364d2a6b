"""Damaged images, decoded."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convneur.data.prepare.synthetic import SyntheticImages
from convneur.data.views.decode import decode


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["jpeg", "png", "webp", "gif"]))
def test_damaged_images_decode_as_pillow_does_or_raise_one_line(data: st.DataObject, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(decode(SyntheticImages("x", 1, 1, 24, 33)[0].image)).save(buffer, kind)
    content = bytearray(buffer.getvalue()[: data.draw(st.integers(0, 2000))])
    for offset, value in data.draw(st.dictionaries(st.integers(0, 1500), st.integers(0, 255), max_size=3)).items():
        if offset < len(content):
            content[offset] = value
    try:
        expected = Image.open(io.BytesIO(bytes(content))).convert("RGB")
    except Exception:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            decode(bytes(content))
    else:
        assert np.array_equal(decode(bytes(content)), np.asarray(expected))
