"""A model whose weights are not loaded: `zk.offload` brings them in a block at a time.

Belongs here: a module without weights, and weights that are written one after another. Does not belong here: how blocks come and go (zo_kernels), what a folder
must have (folders.py), a model that is loaded as a whole (model.py).
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zo_kernels as zk
from zo_finetune.errors import UserError, one_line
from zo_kernels import Offloaded


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


def offload(spec: str, model: Any, where: str, place: Any, write_back: int, room: Path | None, whole: bool) -> Offloaded:
    """`zk.offload` of a model that was just made.

    Args:
        where: "cpu", or "disk": the model's folder. place: the device. room: of the file that is written back to, or will be. whole: all weights are trained;
            the forwards of a step have nothing in common then but these.

    Raises:
        UserError: the files do not have the weights by the names that transformers gives them, or there is no room.
    """
    folder = None
    if where == "disk" and not Path(spec).expanduser().is_dir():
        raise UserError(
            f"--offload disk reads the weights from a folder, and --model {spec} is none: give a folder, or --offload cpu"
        )
    if where == "disk" and write_back:
        folder = next(p for p in ((room or Path()).absolute(), *(room or Path()).absolute().parents) if p.is_dir())
    source = "cpu" if where == "cpu" else Path(spec).expanduser()
    try:
        return zk.offload(model, source, device=place, write_back=write_back, folder=folder, together=whole)
    except (OSError, ValueError) as error:
        raise UserError(f"--offload {where}: {one_line(error)}") from error


def save(model: Any, offloaded: Offloaded, folder: Path) -> None:
    """The model as transformers saves it, its weights written one after another; a tied one once."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(folder)
    offloaded.save(folder / "model.safetensors")
