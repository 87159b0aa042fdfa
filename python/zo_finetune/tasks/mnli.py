"""MNLI (Williams et al. 2018; GLUE): does a sentence follow from another, in ten kinds of text? The causal prompt is CB's."""

from __future__ import annotations

from zo_finetune.tasks.entailment import ThreeWay


class MNLI(ThreeWay):
    name = "mnli"
    summary = "does a sentence follow from another? 0 entailment, 1 neutral, 2 contradiction (causal prompt: ours)"
    source, source_config = "nyu-mll/glue", "mnli"
