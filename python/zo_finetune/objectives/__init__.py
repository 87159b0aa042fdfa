"""The objectives by name. A new one is a file beside this one; what it has to say is in base.py."""

from __future__ import annotations

from zo_finetune.objectives.base import Objective
from zo_finetune.registry import discovered

OBJECTIVES: dict[str, Objective] = discovered(__name__, __path__, Objective)
__all__ = ["OBJECTIVES", "Objective"]
