"""Number formatting shared by terminal tables, pages and charts."""

import math
from datetime import UTC, datetime

MISSING = "–"
"""Text of a value that is unknown or undefined."""
BYTE_UNITS = ("kB", "MB", "GB", "TB", "PB")


def format_bytes(number: float) -> str:
    """Return bytes in powers of 1000 with three digits, e.g. 1.50 GB. Topologies state memory in the same units."""
    if number < 999.5:
        return f"{number:.0f} B" if number else "0"
    power = min(max(1, math.ceil(math.log(number / 999.5, 1000))), len(BYTE_UNITS))
    return f"{_three_digits(number / 1000**power)} {BYTE_UNITS[power - 1]}"


def format_count(number: float) -> str:
    """Return a count: all digits below one million, else three digits: 12,345, 1.5 million, 10 billion."""
    for power, word in ((9, "billion"), (6, "million")):
        if number >= 0.9995 * 10**power:
            return f"{number / 10**power:,.3g} {word}"
    return f"{number:,.0f}" if number >= 99.5 else f"{number:.3g}"


def format_ms(milliseconds: float) -> str:
    """Return milliseconds with three digits, without the unit."""
    if milliseconds < 0.9995:
        return "0" if not milliseconds else "<0.001" if milliseconds < 0.0005 else f"{milliseconds:.3f}"
    return _three_digits(milliseconds)


def format_share(used: float, free: float) -> str:
    """Return ``used`` in percent of ``free``; a dash if ``free`` is 0."""
    return f"{used / free:.0%}" if free else MISSING


def format_ratio(number: float, to: float) -> str:
    """Return ``number / to`` with three digits; a dash if ``to`` is 0."""
    return _three_digits(number / to) if to else MISSING


def format_decimals(value: float | None, digits: int) -> str:
    """Return a number with fixed decimals; a dash for None."""
    return MISSING if value is None else f"{value:.{digits}f}"


def format_metric(value: float) -> str:
    """Return four decimals, or two significant digits below 0.01, e.g. the hypervolume of many behaviors."""
    return f"{value:.4f}" if value >= 0.01 or value == 0 else f"{value:.1e}"


def format_signed(value: float, digits: int, minus: str = "-") -> str:
    """Return a number with its sign and fixed decimals; zero, also after rounding, has no sign."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", minus) if float(text) else f"{0:.{digits}f}"


def format_percent(share: float) -> str:
    """Return a share with one decimal, small shares with two digits: 37.0%, 4.2%, 0.50%, 0.013%; a dash for NaN."""
    if math.isnan(share):
        return MISSING
    return f"{100 * share:.1f}%" if share >= 0.00995 else f"{100 * share:#.2g}%" if share else "0%"


def format_probability(probability: float) -> str:
    """Return a probability in percent with one decimal from 10% on, with two below."""
    return f"{probability:.1%}" if probability >= 0.1 else f"{probability:.2%}"


def format_seconds(seconds: float | None, decimal_below: float = 9.95) -> str:
    """Return seconds for a narrow column: 2.0s, 18s; a dash for None.

    Args:
        decimal_below: Seconds below which one decimal is shown.
    """
    if seconds is None:
        return MISSING
    return f"{seconds:.1f}s" if seconds < decimal_below else f"{seconds:.0f}s"


def format_duration(seconds: float) -> str:
    """Return a duration with three digits and a suitable unit: 0.21 s, 47 s, 7.63 h, 2.42 d; a dash for NaN."""
    if math.isnan(seconds):
        return MISSING
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def format_range(from_s: float | None, to_s: float | None, unit: str = "") -> str:
    """Return a half-open range [from, to) of seconds, e.g. < 9.7, 9.7–13.5, ≥ 52; None is unbounded."""
    if from_s is None:
        return "all" if to_s is None else f"< {_range_end(to_s)}{unit}"
    return f"≥ {_range_end(from_s)}{unit}" if to_s is None else f"{_range_end(from_s)}–{_range_end(to_s)}{unit}"


def format_axis_value(value: float) -> str:
    """Return a tick label in few characters: 0.001, 20, 3k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"


def format_utc(ms: int) -> str:
    """Return a Unix time in milliseconds as UTC date and minute."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def strip_zeros(text: str) -> str:
    """Drop trailing zeros of a number that may have a unit: 50 GB, not 50.0 GB."""
    number, *unit = text.split()
    return " ".join([f"{float(number.replace(',', '')):g}", *unit]) if number[0].isdigit() else text


def plural(number: int, noun: str) -> str:
    """Return the number and its noun: 1 rank, 2 ranks."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _three_digits(number: float) -> str:
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}" if number < 99.95 else f"{number:,.0f}"


def _range_end(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}"


def format_weight_entropy(entropy: float) -> str:
    """Return the entropy of an ensemble's weights with its scale."""
    return f"{entropy:.2f} (0: one objective, 1: equal weights)"
