"""Yes or no? What BoolQ, WSC, WIC and MultiRC have in common: their labels, which the data sets call false and true, and MeZO's words."""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.tasks.base import ClassificationTask


class YesNo(ClassificationTask):
    labels = ("no", "yes")
    synonyms: ClassVar = {"false": "no", "true": "yes"}
    words = ("No", "Yes")
