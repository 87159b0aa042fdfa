"""The ZO-LLM benchmark (Zhang et al. 2024, arXiv 2402.11592): OPT-1.3B on SST-2, seven methods in four kinds of tuning.

Sizes are those of MeZO's table (README of its code).
"""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.suites.base import Column, Suite

PEFTS = {"none": "FT", "lora": "LoRA", "prefix": "prefix", "prompt": "prompt"}
SCORES = {  # the paper's name -> ours, and its figures in the order of `PEFTS`
    "FO-SGD": ("sgd", (91.1, 93.6, 93.1, 92.8)),
    "Forward-Grad": ("forward-grad", (90.3, 90.3, 90.0, 82.4)),
    "ZO-SGD": ("mezo", (90.8, 90.1, 91.4, 84.4)),
    "ZO-SGD-MMT": ("momentum", (85.2, 91.3, 91.2, 86.9)),
    "ZO-SGD-Cons": ("conservative", (88.3, 90.5, 81.8, 84.7)),
    "ZO-SGD-Sign": ("sign", (87.2, 91.5, 89.5, 72.9)),
    "ZO-Adam": ("zo-adam", (84.4, 92.3, 91.4, 75.7)),
}


class ZOLLM(Suite):
    name = "zo-llm"
    summary = "seven methods with full, LoRA, prefix and prompt tuning on SST-2"
    paper, table, model = "ZO-LLM (arXiv 2402.11592)", "its table of SST-2", "OPT-1.3B"
    tasks = ("sst2",)
    columns = tuple(
        Column(method if peft == "none" else f"{method}:peft={peft}", f"{title}, {kind}")
        for title, (method, _) in SCORES.items()
        for peft, kind in PEFTS.items()
    )
    scores: ClassVar = {"sst2": tuple(score for _, row in SCORES.values() for score in row)}
