"""MeZO (Malladi et al. 2023, arXiv 2305.17333), table 1: OPT-13B on eleven tasks.

Sizes are the paper's and the defaults of `zo-finetune train`: 1,000 training, at most 500 dev and 1,000 evaluation rows, 20,000 steps of 16. Of small
data sets at most a fifth is dev: with the paper's 500 dev rows WSC keeps 54 to train on. Fine-tuning is 5 epochs of 1,000 rows by 8, as in
large_models/finetune.sh of its code.
"""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.suites.base import Column, Suite


class MeZO(Suite):
    name = "mezo"
    summary = "zero-shot, in-context, linear probing, MeZO (full, LoRA, prefix) and Adam on eleven tasks"
    paper, table, model = "MeZO (arXiv 2305.17333)", "table 1", "OPT-13B"
    tasks = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop")
    columns = (
        Column("zero-shot", "zero-shot"),
        Column("in-context", "ICL"),
        Column("probe", "LP"),
        Column("mezo", "MeZO"),
        Column("mezo:peft=lora", "MeZO (LoRA)"),
        Column("mezo:peft=prefix", "MeZO (prefix)"),
        Column("adam", "FT", {"steps": 625, "batch_size": 8}),
    )
    scores: ClassVar = {
        "sst2": (58.8, 87.0, 93.4, 91.4, 89.6, 90.7, 92.0),
        "rte": (59.6, 62.1, 68.6, 66.1, 67.9, 70.8, 70.8),
        "cb": (46.4, 57.1, 67.9, 67.9, 66.1, 69.6, 83.9),
        "boolq": (59.0, 66.9, 59.3, 67.6, 73.8, 73.1, 77.1),
        "wsc": (38.5, 39.4, 63.5, 63.5, 64.4, 60.6, 63.5),
        "wic": (55.0, 50.5, 60.2, 61.1, 59.7, 59.9, 70.1),
        "multirc": (46.9, 53.1, 63.5, 60.1, 61.5, 63.7, 71.1),
        "copa": (80.0, 87.0, 55.0, 88.0, 84.0, 87.0, 79.0),
        "record": (81.2, 82.5, 27.1, 81.7, 81.2, 81.4, 74.1),
        "squad": (46.2, 75.9, 3.7, 84.7, 83.8, 84.2, 84.9),
        "drop": (14.6, 29.6, 11.1, 30.9, 31.4, 28.9, 31.3),
    }
