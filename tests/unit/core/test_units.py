"""Lengths as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtrain.core.units import format_token_count, parse_token_count


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("128k", 2**17), ("1M", 2**20), ("1.5k", 1536), ("1e6", 10**6), ("4096", 4096), (" 2K ", 2048), (2048.0, 2048)],
)
def test_units(text: str | float, tokens: int) -> None:
    assert parse_token_count(text) == tokens


@pytest.mark.parametrize("text", ["128kb", "k", "", "-1k", "1.3k", "0.5", "1 000", "1e-3"])
def test_what_is_not_a_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tokens"):
        parse_token_count(text)


@given(st.integers(1, 2**40))
def test_the_spelling_reads_back(count: int) -> None:
    assert parse_token_count(format_token_count(count)) == count
