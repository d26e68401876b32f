"""Sizes, durations and lines as people read and write them: "200GB", "26h". Pure."""

import re
from datetime import timedelta

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kKMGTP]i?B|B)")
_POWERS = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d|w)")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_size_bytes(text: str) -> int:
    """Read "200GB" (powers of 1000) or "200GiB" (powers of 1024). Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'found "{text}", expected a size such as "200GB" or "512MiB"')
    unit = match["unit"]
    base = 1024 if "i" in unit else 1000
    return int(float(match["number"]) * float(base ** _POWERS[unit[0].upper()]))


def parse_duration(text: str) -> timedelta:
    """Read "60s", "15m", "26h", "14d". Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'found "{text}", expected a duration such as "60s", "15m", "26h" or "14d"')
    try:
        return timedelta(seconds=float(match["number"]) * _SECONDS[match["unit"]])
    except OverflowError:
        raise ValueError(f'found "{text}", which is longer than any duration') from None


def show_count(number: int, one: str, many: str = "") -> str:
    """`1 table`, `2,000 tables`; `many` where the plural takes more than an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def show_bytes(size_bytes: float) -> str:
    """1536 -> "1.5 KiB"; whole bytes below 1 KiB."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def show_seconds(seconds: float) -> str:
    """0.42 -> "0.4 s"; 75 -> "1 min 15 s"; 7300 -> "2 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def show_line(text: str) -> str:
    """`text` as one line: names may hold anything; what is shown holds no line ends, escapes, or halves
    of letters.
    """
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
