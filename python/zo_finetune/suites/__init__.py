"""The suites by name. A new one is a file beside this one; what it has to say is in base.py."""

from __future__ import annotations

from zo_finetune.registry import discovered
from zo_finetune.suites.base import Column, Suite

SUITES: dict[str, Suite] = discovered(__name__, __path__, Suite)
__all__ = ["SUITES", "Column", "Suite"]
