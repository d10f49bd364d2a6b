"""Which checkpoints stay and which go."""

import pytest

from convneur.records.retention import Retention


@pytest.mark.parametrize(
    ("retention", "current", "best", "kept"),
    [
        (Retention(1), 50, None, {50}),
        (Retention(3), 50, None, {30, 40, 50}),
        (Retention(1, periods=(20,)), 50, None, {20, 40, 50}),
        (Retention(1, periods=(20, 30)), 50, None, {20, 30, 40, 50}),
        (Retention(1, best=True), 50, 20, {20, 50}),
        (Retention(1, best=False), 50, 20, {50}),
        (Retention(2), 30, None, {20, 30}),  # those of later steps are damaged or of a course that was left
        (Retention(1, periods=(10,)), 10, 40, {10}),
    ],
)
def test_what_is_kept(retention: Retention, current: int, best: int | None, kept: set[int]) -> None:
    steps = [50, 40, 30, 20, 10]
    assert set(steps) - set(retention.obsolete(steps, current, best)) == kept
