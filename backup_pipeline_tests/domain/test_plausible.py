"""Sizes that one would expect, and sizes that a person should hear of."""

import pytest

from backup_pipeline.domain.plausible import assess_size

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("size", "before", "said"),
    [
        (10 * MIB, [], "size: 10.0 MiB; 0 earlier backups to hold it against"),
        (MIB, [10 * MIB, 10 * MIB], "size: 1.0 MiB; 2 earlier backups to hold it against"),
        (10 * MIB, [9 * MIB] * 3, "size plausible: 10.0 MiB, where the 3 before had 9.0 MiB (median)"),
        (5 * MIB, [10 * MIB] * 9, "size plausible: 5.0 MiB, where the 7 before had 10.0 MiB (median)"),
        (40 * MIB, [10 * MIB] * 3, "size plausible: 40.0 MiB, where the 3 before had 10.0 MiB (median)"),
        (10 * MIB, [MIB, 10 * MIB, 11 * MIB], "size plausible"),  # one odd size is outvoted
        (2 * MIB, [2 * MIB] * 7 + [90 * MIB] * 50, "size plausible"),  # it shrank long ago
        (1024, [60 * 1024] * 3, "size plausible"),  # too small for shares to say anything
        (0, [0, 0, 0], "size plausible"),
    ],
)
def test_what_is_plausible_is_checked(size: int, before: list[int], said: str) -> None:
    found = assess_size(size, before)
    assert found.checked[0].startswith(said)
    assert not found.notes
    assert not found.differences


@pytest.mark.parametrize(
    ("size", "before", "said"),
    [
        (
            4 * MIB,
            [10 * MIB] * 3,
            "the dump is much smaller than usual: 4.0 MiB, where the 3 before had 10.0 MiB (median);"
            " were rows deleted on purpose?",
        ),
        (0, [MIB] * 3, "the dump is much smaller than usual: 0 B"),
        (41 * MIB, [10 * MIB] * 3, "the dump is much larger than usual: 41.0 MiB"),
    ],
)
def test_what_is_not_is_noted_and_fails_nothing(size: int, before: list[int], said: str) -> None:
    found = assess_size(size, before)
    assert found.notes[0].startswith(said)
    assert not found.checked
    assert not found.differences
