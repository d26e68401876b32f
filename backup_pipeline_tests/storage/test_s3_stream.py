"""How streams are cut into parts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_pipeline.errors import StoreError
from backup_pipeline.storage.s3_stream import MIB, PART_BYTES, PARTS, PartPlan, Source, plan_parts

GIB = 1024 * MIB
TIB = 1024 * GIB


@pytest.mark.parametrize(
    ("hint", "plan"),
    [
        (0, PartPlan(8 * MIB, 4)),
        (39 * GIB, PartPlan(8 * MIB, 4)),
        (40 * GIB, PartPlan(9 * MIB, 3)),
        (100 * GIB, PartPlan(21 * MIB, 1)),
        (TIB, PartPlan(210 * MIB, 1)),
    ],
)
def test_plans(hint: int, plan: PartPlan) -> None:
    assert plan_parts(hint) == plan


@given(st.integers(0, 2 * TIB))
def test_a_stream_twice_its_hint_fits(hint: int) -> None:
    plan = plan_parts(hint)
    assert plan.limit_bytes >= 2 * hint
    assert plan.part_bytes >= PART_BYTES
    assert plan.part_bytes % MIB == 0
    assert plan.in_flight * plan.part_bytes <= max(32 * MIB, plan.part_bytes)
    assert plan.limit_bytes == plan.part_bytes * PARTS


@given(st.lists(st.binary(max_size=9)), st.integers(0, 40))
def test_gathering_loses_nothing(chunks: list[bytes], size: int) -> None:
    whole = b"".join(chunks)
    source = Source(chunks, limit_bytes=10**6)
    gathered = source.gather(size)
    assert (gathered is None) == (len(whole) > size)
    assert (gathered if gathered is not None else b"".join(source)) == whole
    assert source.exhausted
    assert source.total_bytes == len(whole)
    assert source.raised is None


def test_a_stream_past_the_last_part_is_refused() -> None:
    source = Source([b"x" * 60, b"x" * 60], limit_bytes=100)
    with pytest.raises(StoreError, match="longer than the 100 bytes") as caught:
        list(source)
    assert source.raised is caught.value
    assert not source.exhausted
