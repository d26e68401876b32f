"""How a stream of unknown length is cut into the parts of an upload, and watched while it runs.

s3.py calls it. Pure but for running the producer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from backup_pipeline.errors import StoreError

MIB = 1024 * 1024
PART_BYTES = 8 * MIB
PARTS = 10_000  # S3's limit
IN_FLIGHT = 4


@dataclass(frozen=True)
class PartPlan:
    """How a stream is cut: the size of a part, and how many are under way at once."""

    part_bytes: int
    in_flight: int

    @property
    def limit_bytes(self) -> int:
        """The longest stream that can be cut so."""
        return self.part_bytes * PARTS

    @property
    def slowness(self) -> float:
        """How many times as long as for the smallest plan a part may take to be sent."""
        return max(1.0, self.part_bytes * self.in_flight / (PART_BYTES * IN_FLIGHT))


def plan_parts(size_hint_bytes: int) -> PartPlan:
    """Parts for a stream of about this length, which may turn out twice as long.

    8 MiB and four at once, about 50 MiB of memory, up to a hint of 39 GiB. Beyond it the parts
    grow, fewer at once, and from 156 GiB the memory with them: about two parts.
    """
    needed = -(-2 * size_hint_bytes // PARTS)
    part_bytes = max(PART_BYTES, -(-needed // MIB) * MIB)
    return PartPlan(part_bytes, max(1, min(IN_FLIGHT, IN_FLIGHT * PART_BYTES // part_bytes)))


class Source:
    """The producer's chunks, and what it raised: its errors must not be taken for the store's."""

    def __init__(self, chunks: Iterable[bytes], *, limit_bytes: int) -> None:
        self.raised: BaseException | None = None
        self.exhausted = False
        self.total_bytes = 0
        self._limit_bytes = limit_bytes
        self._chunks = self._watched(chunks)
        self._first: Sequence[bytes] = ()

    def gather(self, size_bytes: int) -> bytes | None:
        """The whole stream, if it ends within this size; otherwise None, and nothing is lost."""
        gathered = []
        for chunk in self._chunks:
            gathered.append(chunk)
            if self.total_bytes > size_bytes:
                self._first = gathered
                return None
        return b"".join(gathered)

    def __iter__(self) -> Iterator[bytes]:
        first, self._first = self._first, ()
        yield from first
        del first
        yield from self._chunks

    def _watched(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        try:
            for chunk in chunks:
                self.total_bytes += len(chunk)
                if self.total_bytes > self._limit_bytes:
                    raise StoreError(
                        f"the stream is longer than the {self._limit_bytes} bytes that its parts can hold",
                        hint="Give its expected size, so that larger parts are chosen.",
                    )
                if chunk:
                    yield chunk
            self.exhausted = True
        except GeneratorExit:
            raise
        except BaseException as error:
            self.raised = error
            raise
