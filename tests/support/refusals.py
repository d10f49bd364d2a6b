"""What bad input is answered with."""

from collections.abc import Callable

import pytest

from convneur.data.errors import InputError


def input_error(call: Callable[..., object], *arguments: object, **named: object) -> str:
    """The one line of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)
