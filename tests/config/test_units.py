"""Numbers as people write them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_hpc.config.units import format_count, format_seconds, parse_count, parse_seconds


@pytest.mark.parametrize(
    ("text", "number"),
    [("960", 960), ("500k", 500_000), ("1.5M", 1_500_000), ("345B", 345 * 10**9), (" 1.3921 T ", 1_392_100_000_000)],
)
def test_a_count_has_an_optional_unit(text: str, number: int) -> None:
    assert parse_count(text) == number


@settings(deadline=None)
@given(st.integers(0, 2**80))
def test_a_count_of_any_size_is_exact(number: int) -> None:
    assert parse_count(str(number)) == number


@pytest.mark.parametrize("text", ["", "k", "1.5m", "1 345", "-3", "1e9", "1.T", "3 tokens"])
def test_what_is_no_count_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a count; write for example 500k"):
        parse_count(text)


@pytest.mark.parametrize("value", [7, 1.5, None, True, [1]])
def test_what_is_no_text_is_left_for_the_type_check(value: object) -> None:
    assert parse_count(value) is value


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30min", 1800), ("1.5h", 5400), ("2d", 172_800), (" 24 h ", 86_400)]
)
def test_a_duration_has_a_unit(text: str, seconds: int) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("value", ["90", 90, 1.5, None, "1m", "1h30min", "-5s", ""])
def test_a_duration_without_a_unit_is_refused_with_examples(value: object) -> None:
    with pytest.raises(ValueError, match="not a duration; write for example 90s, 30min"):
        parse_seconds(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (960, "960"),
        (999.4, "999"),
        (999.6, "1k"),
        (1000, "1k"),
        (4_325_376, "4.33M"),
        (999_499, "999k"),
        (999_999, "1M"),
        (999_999_999, "1B"),
        (1_392_100_000_000, "1.39T"),
        (2.5e15, "2.5e+03T"),
    ],
)
def test_a_count_is_shown_in_three_digits(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (3.21, "3.2s"), (60, "1min 00s"), (250, "4min 10s"), (3900, "1h 05min"), (183_600, "2d 03h")],
)
def test_a_duration_is_shown_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
