"""Names that are cut to fit: whole characters, and still told apart."""

import re

from backup_pipeline.domain.names import cut_name


def test_a_cut_name_never_splits_a_character() -> None:
    for limit in range(20, 40):
        cut = cut_name("é" * 40, limit)
        assert len(cut.encode()) <= limit
        assert re.fullmatch(r"é+~[0-9a-f]{8}", cut)
