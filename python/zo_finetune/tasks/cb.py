"""CommitmentBank (de Marneffe et al. 2019; SuperGLUE): does a clause follow from the text that it stands in? Three answers."""

from __future__ import annotations

from zo_finetune.tasks.base import OF_SEVERAL_LABELS
from zo_finetune.tasks.entailment import Suppose


class CB(Suppose):
    name = "cb"
    summary = "does a clause follow from a text? 0 entailment, 1 contradiction, 2 neutral"
    source, source_config = "aps/super_glue", "cb"
    labels = ("entailment", "contradiction", "neutral")
    words = ("Yes", "No", "Maybe")
    metrics = (*OF_SEVERAL_LABELS, "macro-f1")  # SuperGLUE's two: accuracy, and F1 as the mean over the classes
