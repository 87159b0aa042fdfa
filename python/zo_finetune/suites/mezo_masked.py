"""MeZO's experiments with RoBERTa-large (Malladi et al. 2023, arXiv 2305.17333; medium_models of its code): k rows a label to train on and k others for
dev, k = 16 or 512.

The figures of its table 18 are means over the five seeds, of 1,000 test rows at most. Inputs are cut at 128 tokens; the paper takes 256 for pairs of
sentences.
"""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.suites.base import Column, Suite

FINE_TUNING = {"steps": 1000, "batch_size": 8}  # medium_models/finetune.sh


class MeZOMasked(Suite):
    name = "mezo-masked"
    summary = "k-shot MeZO (full, LoRA, prefix) and Adam with a masked model on six tasks"
    paper, table, model = "MeZO (arXiv 2305.17333)", "table 18, k = 16", "RoBERTa-large"
    tasks = ("sst2", "sst5", "snli", "mnli", "rte", "trec")
    columns = (
        Column("zero-shot", "zero-shot"),
        Column("probe", "LP"),
        Column("mezo", "MeZO"),
        Column("mezo:peft=lora", "MeZO (LoRA)"),
        Column("mezo:peft=prefix", "MeZO (prefix)"),
        Column("adam", "FT", FINE_TUNING),
        Column("adam:peft=lora", "FT (LoRA)", FINE_TUNING),
        Column("adam:peft=prefix", "FT (prefix)", FINE_TUNING),
    )
    options: ClassVar = {"k_shot": 16, "steps": 100_000, "batch_size": 64, "max_length": 128, "keep": "best"}
    seeds = (13, 21, 42, 87, 100)
    scores: ClassVar = {
        "sst2": (79.0, 76.0, 90.5, 91.4, 90.8, 91.9, 91.4, 91.9),
        "sst5": (35.5, 40.3, 45.5, 43.0, 45.8, 47.5, 46.7, 47.7),
        "snli": (50.2, 66.0, 68.5, 69.7, 71.6, 77.5, 74.9, 77.2),
        "mnli": (48.8, 56.5, 58.7, 64.0, 63.4, 70.0, 67.7, 66.5),
        "rte": (51.4, 59.4, 64.0, 64.9, 65.4, 66.4, 66.1, 66.6),
        "trec": (32.0, 51.3, 76.9, 73.1, 80.3, 85.0, 82.7, 85.7),
    }


class MeZOMasked512(MeZOMasked):
    name = "mezo-masked-512"
    summary = "the same with 512 rows a label"
    table = "table 18, k = 512"
    options: ClassVar = {**MeZOMasked.options, "k_shot": 512}
    scores: ClassVar = {
        "sst2": (79.0, 91.3, 93.3, 93.4, 93.3, 93.9, 94.2, 93.7),
        "sst5": (35.5, 51.7, 53.2, 52.4, 53.6, 55.9, 55.3, 54.6),
        "snli": (50.2, 80.9, 83.0, 84.0, 84.8, 88.7, 88.3, 88.3),
        "mnli": (48.8, 71.5, 78.3, 77.9, 79.8, 84.4, 83.9, 83.3),
        "rte": (51.4, 73.1, 78.6, 77.6, 77.2, 82.7, 83.2, 82.5),
        "trec": (32.0, 89.4, 94.3, 95.0, 94.4, 97.3, 97.0, 97.4),
    }
