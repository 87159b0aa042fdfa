"""SNLI (Bowman et al. 2015): does a sentence follow from a picture's caption? The causal prompt is CB's."""

from __future__ import annotations

from zo_finetune.tasks.entailment import ThreeWay


class SNLI(ThreeWay):
    name = "snli"
    summary = "does a sentence follow from another? 0 entailment, 1 neutral, 2 contradiction (causal prompt: ours)"
    source = "stanfordnlp/snli"
