"""What a written answer is worth beside an accepted one: the official scorers' definitions, written out anew.

    squad    evaluate-v1.1 of SQuAD (Rajpurkar et al. 2016): words without case, punctuation and articles; F1 of the two bags of words. Nothing
             beside nothing is 1, as in evaluate-v2.0: v1.1 knows no empty answer.
    drop     drop_eval of DROP (Dua et al. 2019): an answer is a bag of spans, a span a set of words; numbers are numbers, and a span that lacks
             every number of the accepted one is worth nothing; spans are assigned to each other so that the sum of their F1 is the largest.

Belongs here: the comparison of one text with one accepted answer. Does not belong here: the best of several accepted ones and the mean over examples
(base.py), how a text comes about (decoding/).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from zo_finetune.tasks.base import BETWEEN_SPANS

PUNCTUATION = frozenset(string.punctuation)
ARTICLE = re.compile(r"\b(a|an|the)\b")


def without_punctuation(text: str) -> str:
    return "".join(c for c in text if c not in PUNCTUATION)


def harmonic(shared: int, said: int, wanted: int) -> float:
    """F1 of `shared` among `said` and among `wanted`; what has no words has all of them right."""
    precision, recall = shared / said if said else 1.0, shared / wanted if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def squad(text: str, accepted: Sequence[str]) -> tuple[float, float]:
    """(F1, exact match) of SQuAD's scorer."""
    said, wanted = (ARTICLE.sub(" ", without_punctuation(t.lower())).split() for t in (text, BETWEEN_SPANS.join(accepted)))
    shared = (Counter(said) & Counter(wanted)).total()
    f1 = harmonic(shared, len(said), len(wanted)) if said and wanted else float(said == wanted)
    return f1, float(said == wanted)


def number(word: str) -> float | None:
    """Whatever Python reads as one: "3", "1e3", "inf"."""
    try:
        return float(word)
    except ValueError:
        return None


def span_words(span: str) -> list[str]:
    """A span's words as drop_eval compares them: parted at blanks and hyphens; a number, with or without punctuation in it, as float has it."""
    words = []
    for word in re.split("[ -]", span.lower()):
        bare = word if number(word) is not None else without_punctuation(word)
        if (value := number(bare)) is not None:
            bare = str(value)
        words += ARTICLE.sub(" ", bare).split()
    return words


def span_f1(said: frozenset[str], wanted: frozenset[str]) -> float:
    numbers = {w for w in wanted if number(w) is not None}
    if numbers and not numbers & said:
        return 0.0
    return harmonic(len(said & wanted), len(said), len(wanted))


def drop(text: str, accepted: Sequence[str]) -> tuple[float, float]:
    """(F1, exact match) of DROP's scorer, F1 rounded to two digits as there.

    The scorer takes a list of spans; a model writes a text. Beside an accepted answer of several spans it is read as several, beside one of a single
    span as that: a comma may be part of it.
    """
    from scipy.optimize import linear_sum_assignment

    spans = text.split(BETWEEN_SPANS) if len(accepted) > 1 else [text]
    said, wanted = [span_words(s) for s in spans], [span_words(s) for s in accepted]
    table = [[span_f1(frozenset(s), frozenset(w)) for s in said] for w in wanted]
    rows, columns = linear_sum_assignment(table, maximize=True)
    f1 = sum(table[r][c] for r, c in zip(rows, columns, strict=True)) / max(len(said), len(wanted))
    same = len(said) == len(wanted) and {" ".join(s) for s in said} == {" ".join(w) for w in wanted}
    return round(f1, 2), float(same)


COMPARISONS: Mapping[str, Callable[[str, Sequence[str]], tuple[float, float]]] = {"squad": squad, "drop": drop}
