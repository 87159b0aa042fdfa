"""Patterns that choose parameters by name: a journal may bring them, and no pattern hangs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import zo_kernels as zk
from zo_kernels import patterns
from zo_kernels.patterns import Patterns, check_patterns

GOOD = (
    r"\b(q_proj|v_proj)\.weight", "bias$", r"layers\.\d+\.", ".*attn.*weight", "a{1,9}", "", "[a-z]+_norm", r"\b(q_proj|v_proj)\.(weight$|lora_[AB]\.)",
    # What takes a search with all ways one after another for ever:
    "(a+)+$", "(a|b*)*c", ".*x.*y.*z.*", "((a*)b)*", "(?:x+x+)+y", "(a{1,9}){1,9}", "a?" * 30 + "a" * 30, "(ab?){30}", "(?:.|.){26}!",
)  # fmt: skip
BAD = ("a{0,100000}b*c*d*", r"(.*)\1", "(", "a" * 300, "(?=(a*)*)", "(?<!a)b", "*", "(?>a*)b", "a*+b", "(a)?(?(1)b|c)", "(?m)^a", "(?:(?:(?:){999}){999}){999}",
       "((?:a{99}){99}){99}", "((((((((((x{0,9}){0,9}){0,9}){0,9}){0,9}){0,9}){0,9}){0,9}){0,9}){0,9})")  # fmt: skip


def occurs(pattern: str, name: str) -> bool:
    return Patterns("by", [pattern]).first(name) == 0


def test_patterns_that_end() -> None:
    assert check_patterns("by", list(GOOD)) == GOOD
    names = [
        "model.layers.0.self_attn.q_proj.weight",
        "a.v_proj.lora_A.default.weight",
        "layers.10.bias",
        "xyz",
        "a" * 60,
        "a" * 30 + "c",
        "",
        "x" * 60,
    ]
    for name in names:
        for pattern in GOOD[:8]:  # Python's own search may be asked about these
            assert occurs(pattern, name) == bool(re.search(pattern, name)), (pattern, name)
    assert not occurs("(a+)+$", "a" * 200 + "b") and occurs("(a+)+$", "b" + "a" * 200)
    assert not occurs("(?:.|.){26}!", "a" * 200) and occurs("(?:.|.){26}!", "a" * 26 + "!")
    assert occurs("a?" * 30 + "a" * 30, "a" * 30) and not occurs("a?" * 30 + "a" * 30, "a" * 29)


@pytest.mark.parametrize("pattern", BAD)
def test_patterns_that_might_not_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="layers"):
        check_patterns("layers", [pattern])


@pytest.mark.parametrize("patterns", ["bias", 3, None, [3], [b"bias"]], ids=str)
def test_what_is_no_list_of_patterns_is_refused(patterns: object) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        check_patterns("by", patterns)


def test_too_many_patterns_are_refused_before_they_are_read() -> None:
    for many in ([f"layers\\.{k}\\." for k in range(10_000)], ["a" * 256] * 64):
        with pytest.raises(ValueError, match=r"by has \d+ regular expressions of \d+ characters together, at most 16384 are taken"):
            check_patterns("by", many)
    check_patterns("by", [f"layers\\.{k}\\." for k in range(200)])


def test_names_and_patterns_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = Patterns("by", ["(?:a|aa|aaa|[^z]){40}!"] * 8)
    monkeypatch.setattr(patterns, "WORK", 10_000)
    with pytest.raises(ValueError, match="by: the regular expressions take too long for so many names"):
        [heavy.first(f"a{k}" * 60) for k in range(1000)]
    light = Patterns("by", [r"layers\.1\."])
    assert [light.first(f"layers.{k % 2}.weight") for k in range(200)] == [None, 0] * 100  # known places cost a unit a character


def test_blocks_and_projections_choose_as_search_does() -> None:
    names = [f"model.layers.{k}.{n}" for k in range(3) for n in ("attn.q_proj.weight", "norm.weight", "mlp.bias")]
    by: Any = [r"\bnorm\b", r"layers\.[01]\..*weight$", ".", "zz|bias"]
    want = [[n for n in names if next(k for k, p in enumerate(by) if re.search(p, n)) == k] for k in range(3)]
    assert zk.Blocks(by[:3]).split(names) == want
    with pytest.raises(ValueError, match=r"the pattern 'zz\|bias' matches no parameter"):
        zk.Blocks(by).split(names)
    model = torch.nn.ModuleDict({"layer_of_a_model_with_an_ordinary_name": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="looks around"):
        zk.BlockwiseZO(model, 1e-3, by=[r"(?:.|(?=.).){26}!", "."])


@pytest.mark.timeout(120)  # 300 patterns take a second; one that hangs takes for ever
@settings(max_examples=300, deadline=None)
@given(st.text("ab()*+?|.{},19[]^$\\_-wdBbi:", max_size=20), st.text("ab_1.A", min_size=1, max_size=12))
@example("(?i:B|_)a", "ABA")
@example("(?i)[^b]A$", "aba")
@example(r"\Bb\b", "ab.")
@example(r"\b", "..")
@example("^b|a$", "ba")
@example("[^\\W1]{2}", "1a_")
@example("(|a)+b", "aab")
def test_what_is_taken_is_what_search_finds(pattern: str, name: str) -> None:
    try:
        mine = occurs(pattern, name)
    except ValueError:
        return
    assert mine == bool(re.search(pattern, name))
