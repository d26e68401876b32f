"""What a comparison has found so far, and how it counts. Pure.

Written by proof.py and proof_schema.py.
"""

from dataclasses import dataclass, field

from backup_pipeline.units import show_count


@dataclass
class Findings:
    """What differs, what was found equal, and what cannot be compared: each a line for a person."""

    differences: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    whole: bool = True  # false: something of the source was not compared, and a note says what


def share(equal: int, total: int, one: str) -> str:
    """`3 tables` when all of them are equal, else `2 of 3 tables`."""
    return show_count(total, one) if equal == total else f"{equal:,} of {show_count(total, one)}"
