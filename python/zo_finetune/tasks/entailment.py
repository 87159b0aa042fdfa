"""Does one text follow from another? What RTE, SNLI, MNLI and QNLI have in common, and what they share with CB.

Masked prompt and words are those of MeZO's medium models, after LM-BFF (Gao et al. 2021): "{premise}?<mask>, {hypothesis}" with Yes, Maybe, No; the
premise without the mark at its end, the hypothesis with a small first letter. Their code takes the premise's last character away, whatever it
is; here a letter, a digit and a closing bracket stay.
"""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.tasks.base import OF_SEVERAL_LABELS, ClassificationTask, Row, decapitalized


def without_mark(text: str) -> str:
    """A text without the mark at its end, if it ends with one."""
    return text if text[-1].isalnum() or text[-1] in ")]}" else text[:-1].rstrip()


class Inference(ClassificationTask):
    """Pairs of texts, and whether the second follows from the first. `pair`: the fields of the two."""

    pair: ClassVar[tuple[str, str]] = ("premise", "hypothesis")
    fields = ("premise", "hypothesis", "label")
    aliases: ClassVar = {"premise": ("sentence1",), "hypothesis": ("sentence2",), "label": ("gold_label",)}

    def texts(self, row: Row) -> tuple[str, str]:
        return self.text(row, self.pair[0]), self.text(row, self.pair[1])

    def masked_prompt(self, row: Row) -> tuple[str, str]:
        first, second = self.texts(row)
        return f"{without_mark(first)}?", f", {decapitalized(second)}"


class TwoWay(Inference):
    forms = ("causal", "masked")
    labels = ("entailment", "not_entailment")
    words = ("Yes", "No")


class Suppose(Inference):
    """CB's prompt in MeZO, from PromptSource."""

    def prompt(self, row: Row) -> str:
        premise, hypothesis = self.texts(row)
        return f'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'


class ThreeWay(Suppose):
    """In the label order of SNLI and MNLI; rows on whose label nobody agreed are left out, as the data sets' cards say."""

    forms = ("causal", "masked")
    labels = ("entailment", "neutral", "contradiction")
    words = ("Yes", "Maybe", "No")
    metrics = OF_SEVERAL_LABELS
    unlabelled = (-1, "-1", "-")
