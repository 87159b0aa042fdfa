"""SST-5 (Socher et al. 2013): how good does a sentence of a film review find the film, in five steps?"""

from __future__ import annotations

from zo_finetune.tasks.base import OF_SEVERAL_LABELS
from zo_finetune.tasks.sentiment import Sentiment


class SST5(Sentiment):
    name = "sst5"
    summary = "sentiment of a sentence in five steps, 0 very negative to 4 very positive"
    source = "SetFit/sst5"
    labels = ("very negative", "negative", "neutral", "positive", "very positive")
    words = (" terrible", " bad", " okay", " good", " great")
    metrics = OF_SEVERAL_LABELS
