"""The metrics by name. A new one is a file beside this one; what it has to say is in base.py."""

from __future__ import annotations

from zo_finetune.metrics.base import Metric
from zo_finetune.registry import discovered

METRICS: dict[str, Metric] = discovered(__name__, __path__, Metric)
__all__ = ["METRICS", "Metric"]
