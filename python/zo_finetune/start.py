"""The weights that a run begins with, for what pulls back toward them: in the model's file where it has them, else copies in host memory.

Belongs here: where they lie. Does not belong here: the pull (zo_kernels), loading a model (model.py).
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, equal, nn

from zo_kernels.parameters import canonical_name


def start_of(model: nn.Module, source: str) -> dict[str, Tensor]:
    """By name, what of the model is trained, as it is now.

    Args:
        source: the model's folder, whose safetensors files are mapped, not read; of another source, of adapters, and of weights that were made of others (a
            GGUF file's) there are copies.
    """
    folder, there = Path(source), dict[str, Tensor]()
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        there |= load_file(path)
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            t, weights = there.get(canonical_name(name)), p.detach()
            same = t is not None and t.shape == p.shape and equal(t.to(p.device, p.dtype), weights)
            found[name] = t if same and t is not None else weights.to("cpu", copy=True)
    return found
