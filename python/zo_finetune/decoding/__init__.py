"""The ways to decode by name. A new one is a file beside this one; what it has to say is in base.py."""

from __future__ import annotations

from zo_finetune.decoding.base import Answers, Decoding
from zo_finetune.registry import discovered

DECODINGS: dict[str, Decoding] = discovered(__name__, __path__, Decoding)
__all__ = ["DECODINGS", "Answers", "Decoding"]
