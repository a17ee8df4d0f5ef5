import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.reporting import formatting

BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}


@given(st.integers(1, 10**17))
def test_bytes_have_three_digits(number: int) -> None:
    text = formatting.format_bytes(number)
    value, unit = text.split()
    assert float(value.replace(",", "")) * BYTES[unit] == pytest.approx(number, rel=0.0051)
    assert len(text) <= 7


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (8, "8"), (12_345, "12,345"), (1_500_000, "1.5 million"), (10**10, "10 billion"), (5.25, "5.25")],
)
def test_format_count(number: float, text: str) -> None:
    assert formatting.format_count(number) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0.0, "0"), (0.0001, "<0.001"), (0.0234, "0.023"), (5.629, "5.63"), (1234.5, "1,234")]
)
def test_format_ms(milliseconds: float, text: str) -> None:
    assert formatting.format_ms(milliseconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.37, "37.0%"), (0.042, "4.2%"), (0.005, "0.50%"), (0.00013, "0.013%"), (0.0, "0%")]
)
def test_format_percent(share: float, text: str) -> None:
    assert formatting.format_percent(share) == text
    assert formatting.format_percent(math.nan) == formatting.MISSING


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.214, "0.214 s"), (47.0, "47 s"), (27_460.0, "7.63 h"), (209_000.0, "2.42 d")]
)
def test_format_duration(seconds: float, text: str) -> None:
    assert formatting.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("from_s", "to_s", "text"),
    [(None, 9.71, "< 9.71"), (9.71, 13.52, "9.71–13.5"), (1211.3, None, "≥ 1,211"), (None, None, "all")],
)
def test_format_range(from_s: float | None, to_s: float | None, text: str) -> None:
    assert formatting.format_range(from_s, to_s) == text


def test_format_signed_has_no_sign_for_zero() -> None:
    assert formatting.format_signed(-0.00001, 4) == "0.0000"
    assert formatting.format_signed(-0.25, 2, minus="−") == "−0.25"
    assert formatting.format_signed(0.25, 2) == "+0.25"
