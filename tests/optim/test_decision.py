"""A step's decision and its journal record are each the inverse of the other.

Belongs here: properties of `Decision`. Does not belong here: the bytes of a record (tests/journal), whole runs (test_journal_run.py).
"""

from __future__ import annotations

import math
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import zo_kernels as zk
from zo_kernels import journal
from zo_kernels.optim import method as methods
from zo_kernels.optim.decide import Decided, Numbers, decide
from zo_kernels.optim.decision import Decision, decisions

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ANY = st.floats(width=32)  # a loss may be no number


@st.composite
def runs(draw: st.DrawFn) -> tuple[journal.Header, list[Decision]]:
    """A run of some records, as a journal may have them."""
    groups, terms = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    mode = draw(st.sampled_from(journal.PERTURBATIONS))
    table = tuple(journal.Parameter.of(f"w{k}", torch.zeros(2), k, k) for k in range(groups))
    header = journal.Header(1, table, groups=groups, terms=terms, perturbation=mode)
    found, tag = [], draw(st.integers(0, 9))
    for _ in range(draw(st.integers(0, 5))):
        failed = "" if mode == "scratch" else draw(st.sampled_from(["", "", "plus", "minus"]))
        go = bool(failed) or draw(st.booleans())
        still = failed or not go
        eps = (
            None if mode == "scratch" else draw(st.lists(NUMBERS.filter(lambda x: x > 2.0**-140), min_size=groups, max_size=groups))
        )
        coefs = [draw(st.lists(st.just(0.0) if still else NUMBERS, min_size=terms, max_size=terms)) for _ in range(groups)]
        decay = [1.0] * groups if still else draw(st.lists(NUMBERS, min_size=groups, max_size=groups))
        rounding = draw(st.sampled_from(["nearest", "stochastic"]))
        flushed, clipped = draw(st.booleans()), draw(st.booleans())
        found.append(Decision(tag, decay, coefs, eps, rounding, flushed, draw(ANY), draw(ANY), go, clipped, failed))
        tag += 0 if failed else terms + draw(st.integers(0, 2))
    return header, found


def written(header: journal.Header, found: list[Decision], path: Path) -> journal.Journal:
    with journal.create(path, header, fsync_every=0) as writer:
        for decision in found:
            writer.append(**decision.entry())
    return journal.read(path)


def shown(decision: Decision) -> Any:
    """With NaN equal to itself, and -0 other than 0."""
    return repr(decision)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(runs())
def test_a_record_is_its_decision_and_a_decision_its_record(run: tuple[journal.Header, list[Decision]]) -> None:
    header, found = run
    with tempfile.TemporaryDirectory() as folder:
        first = written(header, found, Path(folder) / "first.zoj")
        again = list(decisions(first.header, first.records))
        assert [shown(d) for d in again] == [shown(d) for d in found]
        second = written(first.header, again, Path(folder) / "second.zoj")
    assert first.records.tobytes() == second.records.tobytes()
    assert np.array_equal(first.flag("skipped"), np.array([not d.go for d in found], dtype=bool))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.lists(NUMBERS, min_size=2, max_size=2), min_size=1, max_size=3), st.booleans(), st.booleans(), ANY, NUMBERS
)
def test_numbers_that_nobody_has_read_say_the_same_later(coefs: Any, go: bool, clipped: bool, loss: float, g: float) -> None:
    """On a device the decision stays there; what is read of it afterwards is what would have been read at once."""
    planned = Decision(5, [0.5] * len(coefs), rounding="stochastic")
    flat = [c if go else 0.0 for group in coefs for c in group]
    values = torch.tensor([loss, g, go, clipped, *flat], dtype=torch.float64)
    at_once = planned.told(values.tolist())
    unread = planned.unread(values, [torch.where(values[2] != 0, 0.5, 1.0)] * len(coefs))
    assert shown(planned.told(unread.unknown().tolist())) == shown(at_once)
    assert [float(d) for d in unread.decay] == at_once.decay


@pytest.mark.parametrize("go", [True, False])
def test_numbers_behind_the_rules_are_the_first_groups(go: bool) -> None:
    told = Decision(0, [0.5, 0.25]).told([1.0, 2.0, float(go), 0.0, 3.0, 4.0], [5.0, 6.0])
    rest = [5.0, 6.0] if go else [0.0, 0.0]
    own = (3.0, 4.0) if go else (0.0, 0.0)
    assert told.coefs == [[own[0], *rest], [own[1], 0.0, 0.0]] and told.decay == ([0.5, 0.25] if go else [1.0, 1.0])
    assert told.share(1, [0], 1).coefs == [own[1]] and math.isnan(replace(told, loss=math.nan).loss)


# ---- one direction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [zk.SGD(), zk.Sign(), zk.Momentum(), zk.Adam()], ids=lambda rule: str(rule.name))
@hypothesis.example(losses=[1e300, 1.0], rows=[(1.0, 1.0, -1.0)], clip=None, behind=())
@hypothesis.given(
    losses=st.lists(st.floats(), min_size=2, max_size=2),
    rows=st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(2.0**-149, 2.0**100, width=32), st.sampled_from([-1.0, 1.0])), min_size=1, max_size=3
    ),
    clip=st.sampled_from([None, 0.5, 1e30]),
    behind=st.sampled_from([(), (0.25,)]),
)
def test_one_direction_is_decided_on_numbers_as_on_arrays(rule: Any, losses: Any, rows: Any, clip: Any, behind: Any) -> None:
    lr, eps, signs = map(list, zip(*rows, strict=True))
    numbers = Numbers(lr, eps, [1.0] * len(rows), signs, [False] * len(rows))
    planned = Decision(3, numbers.decay, eps=eps)

    def found(plain: bool) -> Decided:
        method = methods.Method(rule=rule, clip=zk.optim.clip.clip_of(clip))
        assert method.numbers  # and not cached alone
        method.__dict__["numbers"] = plain
        return decide(method, numbers, torch.tensor(losses, dtype=torch.float64), planned, behind=behind)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of numpy, where a loss is beyond fp32
        a, b = found(True), found(False)
    assert shown(a.decision) == shown(b.decision)
    for x, y in ((a.loss, b.loss), (a.gradient, b.gradient)):
        assert x.dtype == y.dtype and x.shape == y.shape == () and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize(
    "more",
    [{"estimator": zk.TwoSided(2)}, {"estimator": zk.ThreePoint()}, {"rule": zk.Conservative()}, {"rule": zk.HessianDiagonal()}],
    ids=["two queries", "three points", "candidates", "curvature"],
)
def test_what_needs_arrays_is_decided_on_them(more: dict[str, Any]) -> None:
    assert not methods.Method(**more).numbers
