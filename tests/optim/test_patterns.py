"""Patterns that choose parameters by name: a journal may bring them, and no pattern hangs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_kernels.parameters import check_patterns

GOOD = (r"\b(q_proj|v_proj)\.weight", "bias$", r"layers\.\d+\.", ".*attn.*weight", "a{1,9}", "", "[a-z]+_norm")
BAD = (
    "(a+)+$",
    "(a|b*)*c",
    ".*x.*y.*z.*",
    "a{0,100000}b*c*d*",
    r"(.*)\1",
    "((a*)b)*",
    "(?:x+x+)+y",
    "(",
    "a" * 300,
    "(?=(a*)*)",
    "*",
    "(a{1,9}){1,9}",
    "a?" * 30 + "a" * 30,
    "(ab?){30}",
)


def test_patterns_that_end() -> None:
    assert check_patterns("by", list(GOOD)) == GOOD


@pytest.mark.parametrize("pattern", BAD)
def test_patterns_that_might_not_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="layers"):
        check_patterns("layers", [pattern])


@pytest.mark.parametrize("patterns", ["bias", 3, None, [3], [b"bias"]], ids=str)
def test_what_is_no_list_of_patterns_is_refused(patterns: object) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        check_patterns("by", patterns)


@pytest.mark.timeout(120)  # 300 patterns take a second; one that hangs takes for ever
@settings(max_examples=300, deadline=None)
@given(st.text("ab()*+?|.{},19[]^$\\", max_size=24))
def test_what_is_taken_comes_to_an_end(pattern: str) -> None:
    try:
        check_patterns("by", [pattern])
    except ValueError:
        return
    re.search(pattern, "ab" * 40 + "c")
