"""SST-2 (Socher et al. 2013; GLUE): is a sentence of a film review positive? Any file of sentences with two labels will do."""

from __future__ import annotations

from zo_finetune.tasks.sentiment import Sentiment


class SST2(Sentiment):
    name = "sst2"
    summary = "sentiment of a sentence; columns sentence, label (0 negative, 1 positive)"
    source, source_config = "nyu-mll/glue", "sst2"
