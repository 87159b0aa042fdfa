"""A model whose weights are not loaded: `zk.offload` brings them in a block at a time.

Belongs here: a module without weights, and weights that are written one after another. Does not belong here: how blocks come and go (zo_kernels), what a folder
must have (folders.py), a model that is loaded as a whole (model.py).
"""

from __future__ import annotations

import contextlib
import json
import struct
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are made within have their parameters on the meta device, and their buffers, which nobody loads, as they make them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        register(module, name, None if p is None else nn.Parameter(p.to("meta"), requires_grad=p.requires_grad))

    with unittest.mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def empty(auto_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """transformers' model of this configuration, in eval mode, its parameters on the meta device and tied as they will be."""
    with without_weights():
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model.eval()


def write_tensors(path: Path, named: list[tuple[str, torch.Tensor]]) -> None:
    """A safetensors file of these tensors, read one after another."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, t in named:
        size = t.numel() * t.element_size()
        head[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, t in named:
            file.write(t.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
