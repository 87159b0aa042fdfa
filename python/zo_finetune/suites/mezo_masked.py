"""MeZO's experiments with RoBERTa-large (Malladi et al. 2023, arXiv 2305.17333; medium_models of its code): k rows a label to train on and k others for
dev, k = 16 or 512.

The paper's figures (its table 18) are not here: they could not be read where they were published. Inputs are cut at 128 tokens; the paper takes 256 for
pairs of sentences.
"""

from __future__ import annotations

from typing import ClassVar

from zo_finetune.suites.base import Column, Suite

FINE_TUNING = {"steps": 1000, "batch_size": 8}  # medium_models/finetune.sh


class MeZOMasked(Suite):
    name = "mezo-masked"
    summary = "k-shot MeZO (full, LoRA, prefix) and Adam with a masked model on six tasks"
    paper, table, model = "MeZO (arXiv 2305.17333)", "table 18", "RoBERTa-large"
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
