"""What an answer is worth: hand-worked cases of the official scorers' definitions, and the metrics made of them.

Belongs here: texts beside accepted answers, chosen candidates beside labels. Does not belong here: how answers come about (test_generation.py), what a run
makes of them (test_cli.py).
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from zo_finetune.decoding import Answers
from zo_finetune.metrics import METRICS
from zo_finetune.metrics.base import standard_error
from zo_finetune.metrics.texts import COMPARISONS, span_f1

SQUAD = [
    # text, accepted, F1, EM
    ("the Normans", "Normans", 1, 1),  # articles
    ("A cat, an apple.", "cat apple", 1, 1),
    ("thermal", "the rmal", 0, 0),  # an article is a word of its own
    ("Saint-Denis", "saintdenis", 1, 1),  # punctuation goes, and joins what stood beside it
    ("U.S.A.", "usa", 1, 1),
    ("  in \t Paris ", "IN paris", 1, 1),
    ("1,000", "1000", 1, 1),  # by punctuation; numbers mean nothing
    ("5", "5 yards", 2 / 3, 0),
    ("5.0", "5", 0, 0),
    ("to to be", "to be", 4 / 5, 0),  # bags: of two "to" one is there
    ("Denver Broncos", "Carolina Panthers", 0, 0),
    ("Zürich, Straße", "zürich strasse", 1 / 2, 0),  # lower case is no case folding
    ("“Paris”", "paris", 0, 0),  # string.punctuation is ASCII's
    ("don't", "dont", 1, 1),
    ("", "Paris", 0, 0),
    ("the", "a", 1, 1),  # nothing beside nothing
    ("Paris", "the", 0, 0),
]
DROP = [
    # text, the accepted spans, F1, EM
    ("the Bears", ("Bears",), 1, 1),
    ("1,000", ("1000",), 1, 1),  # numbers are numbers
    ("5.0", ("5",), 1, 1),
    ("5", ("5 yards",), 0.67, 0),
    ("5 yards", ("5",), 0.67, 0),
    ("six", ("6",), 0, 0),
    ("3 yards", ("5 yards",), 0, 0),  # the numbers disagree: nothing
    ("yards", ("5 yards",), 0, 0),
    ("5 yards", ("yards",), 0.67, 0),  # the accepted one has no number
    ("5 5 yards", ("5 yards",), 1, 0),  # a span is a set of words; a match is of the words in order
    ("22-yard", ("22 yard",), 1, 1),  # parted at hyphens
    ("$1.5", ("1.5",), 0, 0),  # no number with its sign, and without punctuation it is 15
    ("Tom Brady, Eli Manning", ("Eli Manning", "Tom Brady"), 1, 1),  # spans in any order
    ("Tom Brady", ("Tom Brady", "Eli Manning"), 0.5, 0),
    ("Tom Brady, Eli Manning, Nobody", ("Tom Brady", "Eli Manning"), 0.67, 0),
    ("Brady, Tom", ("Tom Brady",), 1, 0),  # one span is accepted, so that the comma is a part of it; drop_eval's F1 knows no order
    ("a", ("Bears",), 0, 0),
    ("", ("Bears",), 0, 0),
    ("", ("the",), 1, 1),
    ("São Paulo", ("são paulo",), 1, 1),
    ("x y z, x", ("x y", "x y z"), 0.83, 0),  # the best assignment: (1 + 2/3) / 2
    ("x y, z", ("x y z", "x"), 0.58, 0),  # and not each span at its best: (2/3 + 1/2) / 2, where 4/5 + 0 is less
]


@pytest.mark.parametrize(("text", "accepted", "f1", "em"), SQUAD)
def test_squad(text: str, accepted: str, f1: float, em: float) -> None:
    assert COMPARISONS["squad"](text, (accepted,)) == pytest.approx((f1, em))


@pytest.mark.parametrize(("text", "accepted", "f1", "em"), DROP)
def test_drop(text: str, accepted: tuple[str, ...], f1: float, em: float) -> None:
    assert COMPARISONS["drop"](text, accepted) == pytest.approx((f1, em))


def test_spans_are_assigned_as_well_as_can_be() -> None:
    draw = random.Random(0)
    for _ in range(100):
        said, wanted = ([frozenset(draw.choices("uvwxyz", k=draw.randint(1, 3))) for _ in range(draw.randint(2, 4))] for _ in "ab")
        small, large = sorted((said, wanted), key=len)
        orders = itertools.permutations(large, len(small))
        best = max(sum(span_f1(a, b) for a, b in zip(small, order, strict=True)) for order in orders) / len(large)
        text = ", ".join(" ".join(sorted(s)) for s in said)
        assert COMPARISONS["drop"](text, [" ".join(w) for w in wanted])[0] == pytest.approx(round(best, 2), abs=0.011)


def answers(texts: list[str], references: list[tuple[tuple[str, ...], ...]], comparison: str) -> Answers:
    nothing = torch.zeros(len(texts), dtype=torch.long)
    return Answers(nothing[:, None].float(), nothing, nothing, None, None, tuple(texts), tuple(references), comparison)


def test_the_best_of_the_accepted_answers_counts() -> None:
    """Each of F1 and exact match by itself, and a mean over examples with its standard error."""
    given = answers(["Paris", "5 yards"], [(("London",), ("in Paris",), ("paris",)), (("5", "6"), ("4 yards",))], "squad")
    assert METRICS["f1"].measure(given)["f1"] == pytest.approx((1 + 0.5) / 2)
    assert METRICS["em"].measure(given) == {"em": 0.5, "em_stderr": pytest.approx(0.5 / 2**0.5)}
    by_spans = answers(["Paris", "5 yards"], list(given.references), "drop")
    assert METRICS["f1"].measure(by_spans)["f1"] == pytest.approx(
        (1 + 0.33) / 2
    )  # 5 yards: half of two spans, and 0 beside 4 yards
    assert "F1 0.6650 ± " in METRICS["f1"].words(METRICS["f1"].measure(by_spans))


def test_macro_f1_and_standard_error() -> None:
    """Worked by hand. Three classes: F1 of 2/3, 0 (never answered) and, of the one without an example or an answer, none."""
    labels, chosen = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, -1, 0])
    given = Answers(torch.zeros(4, 3), labels, chosen, ("a", "b", "c"))
    # each example adds (2 both - F1 either) / b, b = 6/4 and 1/4: to the first class 4/9, 4/9, -4/9, -4/9, to the second nothing
    error = (4 / 9 / 2) / 4**0.5
    assert METRICS["macro-f1"].measure(given) == {
        "macro-f1": pytest.approx((2 * 2 / (3 + 3) + 0) / 2), "macro-f1_stderr": pytest.approx(error)
    }  # fmt: skip
    even = Answers(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), ("a", "b"))
    assert METRICS["macro-f1"].measure(even)["macro-f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert standard_error(torch.tensor([0.2, 0.4, 0.9])) == pytest.approx((((0.3**2 + 0.1**2 + 0.4**2) / 3) / 3) ** 0.5)
    assert standard_error(torch.tensor([1.0])) == 0


def test_macro_f1s_standard_error_is_that_of_resampled_rows() -> None:
    """The bootstrap's; where all answers are right, or one class is all there is, it is 0."""
    g = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), 400, True, generator=g)
    chosen = torch.where(torch.rand(400, generator=g) < 0.7, labels, torch.randint(3, (400,), generator=g))
    macro = METRICS["macro-f1"]

    def of(rows: Tensor) -> dict[str, Any]:
        return macro.measure(Answers(torch.zeros(len(rows), 3), labels[rows], chosen[rows], ("a", "b", "c")))

    drawn = torch.tensor([of(torch.randint(400, (400,), generator=g))["macro-f1"] for _ in range(600)])
    assert of(torch.arange(400))["macro-f1_stderr"] == pytest.approx(drawn.std().item(), rel=0.1)
    right = Answers(torch.zeros(3, 2), labels[:3] % 2, labels[:3] % 2, ("a", "b"))
    assert macro.measure(right) == {"macro-f1": 1.0, "macro-f1_stderr": 0.0}
    assert macro.fits({"macro-f1": 1.0}) and macro.words({"macro-f1": 1.0}) == "macro-F1 1.0000"
    assert macro.words(of(torch.arange(400))).count("±") == 1
