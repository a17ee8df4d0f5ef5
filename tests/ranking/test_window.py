"""Times in other units than milliseconds."""

import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.errors import UserError
from a2gen_rec.ranking.window import check_time, read_candidates

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
moments = st.datetimes(datetime(2000, 1, 1), datetime(9999, 12, 31, 23, 59, 59), timezones=st.just(UTC))


@given(moments)
def test_accepts_every_moment_in_milliseconds_only(moment: datetime) -> None:
    elapsed = moment - EPOCH
    check_time(elapsed // timedelta(milliseconds=1), "ts_ms", True)
    check_time(np.int64(elapsed // timedelta(milliseconds=1)), "ts_ms", True)
    wrong = {"seconds": timedelta(seconds=1), "microseconds": timedelta(microseconds=1)}
    for unit, size in wrong.items():
        with pytest.raises(UserError, match=rf"^ts_ms -?\d+ is .*, not {unit}$"):
            check_time(elapsed // size, "ts_ms", True)
    for count in (elapsed // timedelta(days=1), 1000 * (elapsed // timedelta(microseconds=1))):
        with pytest.raises(UserError, match=re.escape(f"ts_ms {count} is ")):
            check_time(count, "ts_ms", True)


@given(st.integers(-(10**14), 10**14))
def test_times_without_calendar_have_any_origin(ts_ms: int) -> None:
    check_time(ts_ms, "ts_ms", False)


def test_candidate_files(tmp_path):
    file = tmp_path / "candidates.txt"
    for text in ("v1\nv2\n", "\ufeffv1\r\nv2\r\n\r\nv1", "v1\r v2 \r"):
        file.write_bytes(text.encode())
        assert read_candidates(str(file)) == ["v1", "v2"]
    file.write_bytes("a\u2028b\x0bc\n".encode())
    assert read_candidates(str(file)) == ["a\u2028b\x0bc"]
    file.write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"candidates.txt: cannot be read \(.*utf-8"):
        read_candidates(str(file))
