"""`offload`: a model whose weights do not fit the device, or the machine, is trained and evaluated there.

Belongs here: which parameters are a block, where their values lie, what a user sees of it. Does not belong here: how a block comes and goes (views/away.py),
how a step perturbs and updates it (views/visiting.py).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import parameters
from zo_kernels.views.away import Away, Block, Traffic
from zo_kernels.views.files import DTYPES, KINDS, Held, Kept, tensors_of, write_tensors
from zo_kernels.views.memory import aligned

SMALL = 1 << 20  # bytes of a module outside of the lists of layers that is not worth a visit
EVERY = 8


class Offloaded:
    """What `offload` made of a model.

    Attributes:
        traffic: `bytes` that came in, `visits`, bytes `written` back, since it was made. write_back: steps between writes, 0: never.
    """

    def __init__(self, away: Away, resident: int, named: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor]) -> None:
        self._away, self._resident, self._named, self._buffers = away, resident, named, buffers
        self.write_back = away.every or 0

    @property
    def traffic(self) -> Traffic:
        return self._away.traffic

    @property
    def blocks(self) -> dict[str, int]:
        """Each block's bytes on the device, by name, in the order of a forward."""
        return {block.name: block.size for block in self._away.blocks}

    @property
    def device_bytes(self) -> int:
        """That weights take on the device: two blocks, and what is resident."""
        return sum(slot.memory.numel() for slot in self._away.slots) + self._resident

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that the model had when it was offloaded by name, those of no block too, with the values of the steps so far: each tensor is good
        until the next one is asked for. A tied one comes once."""
        for name, p in self._named.items():
            yield name, p.data  # who asks gets its block

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write these, and the persistent buffers that there were, one after another, to a safetensors file, as transformers' `save_pretrained` does of a
        resident model. `path` may be the file that they are read from: it is replaced when all is written.

        Raises:
            OSError: there is no room, or a file cannot be read; what was at `path` stays.
        """
        tensors: dict[str, Tensor] = {**self._named, **self._buffers}
        write_tensors(path, tensors, lambda name: tensors[name].data)

    def __repr__(self) -> str:
        sizes = self.blocks.values()
        return (
            f"Offloaded({len(sizes)} blocks of {sum(sizes):,} bytes, {self.device_bytes:,} on {self._away.device}, {self.traffic})"
        )


def offload(
    model: nn.Module,
    source: str | os.PathLike[str] = "cpu",
    *,
    blocks: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    write_back: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    prefetch: bool = True,
    together: bool = False,
    small: int = SMALL,
) -> Offloaded:
    """Let a model's weights lie in host memory or on disk, from where they visit the device a block at a time, when a forward, or anything else, reads them.

    An optimizer of this library whose updates are terms along directions then trains the model with the bits of a resident run (the idea is ZO2's, arXiv
    2503.12668): a visiting block is perturbed, and makes up for the updates that it missed. Give it the model after this call. What is trained beside the
    blocks, as adapters that are added afterwards, is resident, by whatever method, and nothing is written back then.

    Args:
        model: any module in plain Python. Its parameters keep names, shapes and dtypes. Those on the meta device are replaced by new ones.
        source: "cpu": host memory, where the values that the model has now go; or the path of a safetensors file, or of a folder of such files, which has a
            tensor for each parameter by its name, of any floating-point dtype. Files are read, never mapped and never written, and processes may share
            them; the values that the model has now are dropped, and those of persistent buffers that the files have.
        blocks: names of modules, each of which is a block with all that is in it; weights of no block are resident. None: every module of an
            `nn.ModuleList` that lies in no other one is a block, and so is any other module by its own weights of at least `small` bytes. A tied weight is of
            the first block that has it.
        device: which the blocks visit. None: the model's, "cpu" where all of it is on the meta device.
        write_back: after so many steps a block that visits is written back: to host memory, or, of files, to a file without a name in `folder`, as large as the
            blocks, that is gone with the process. 0: never; a block then makes all steps so far at each visit. None: 8, and 0 for files without a folder.
        folder: for what is written back of files.
        prefetch: the next block comes in a thread of its own while one is used.
        together: a block that comes serves all forwards of a step before the next one does: it comes once a step (and micro-batch) and not once a forward; to
            a worker (`process_group`) once for each micro-batch of its share. Their activations are there at once, and a closure is called in several threads,
            of which one runs at a time and is left in the middle of a forward for another: give it where closure and model have nothing in common between
            forwards but weights, and buffers that no forward writes.

    Returns:
        What counts the traffic and gives the values.

    Raises:
        TypeError, ValueError: an argument is wrong, a module is in two blocks, a file lacks a parameter or has it in another shape, a buffer has no values; the
            model is as it was.
        OSError: a file cannot be read, or `folder` has no room.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a module")
    parameters.refuse_parallel("model", model)
    if any(parameters.block_of(p) is not None for p in model.parameters()):
        raise ValueError("model: its weights are offloaded already")
    if write_back is not None and (isinstance(write_back, bool) or not isinstance(write_back, int) or write_back < 0):
        raise ValueError(f"write_back={write_back!r} must be a number of steps, or 0: never")
    host = os.fspath(source) == "cpu"
    if write_back is None:
        write_back = EVERY if host or folder is not None else 0
    if write_back and not host and folder is None:
        raise ValueError(f"write_back={write_back} of files needs a folder for what is written: give folder=, or write_back=0")
    known = [p for p in model.parameters() if not p.is_meta]
    place = torch.device(device) if device is not None else known[0].device if known else torch.device("cpu")
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    parts = split(model, blocks, small)
    away_ids = {id(p) for members in parts.values() for p in members.values()}
    others = {n: p for n, p in model.named_parameters() if id(p) not in away_ids}
    there = {} if host else tensors_of(source)
    kept: dict[str, Kept] = {}
    for name, p in [pair for members in (*parts.values(), others) for pair in members.items()]:
        if host and p.is_meta:
            raise ValueError(
                f"model: parameter {name!r} is on the meta device and has no values: give the path of its files as the source"
            )
        if not host:
            kept[name] = _found(there, names[id(p)], p, model, source)
    if host:
        for members in parts.values():
            kept |= {name: _held(p, place) for name, p in members.items()}
    stored = _buffers(model, there, source)
    made = _real(model, place)
    for module, name, value in stored:
        module._buffers[name] = value
    for name, p in others.items():
        q = made.get(id(p), p)
        if not host:
            value = torch.empty(kept[name].nbytes, dtype=torch.uint8)
            kept[name].read(value, 0)
            q.data = value.view(kept[name].dtype).view(p.shape).to(place, p.dtype)
        elif q.device != place:
            q.data = q.data.to(place)
    for module in model.modules():
        for name, b in module._buffers.items():
            if b is not None and not b.is_meta and b.device != place:
                module._buffers[name] = b.to(place)
    found = [_block(label, {n: made.get(id(p), p) for n, p in members.items()}, kept) for label, members in parts.items()]
    away = Away(found, place, write_back or None, host, folder, prefetch, together)
    away.settle()
    model.__dict__["_zo_away"] = away  # lives as long as the model
    resident = sum(p.numel() * p.element_size() for p in (made.get(id(p), p) for p in others.values()))
    if there:
        _left_over(model, set(there), source)
    buffers = {name: b for name, _, _, b, saved in _held_buffers(model) if saved and b.dtype in KINDS}
    return Offloaded(away, resident, dict(model.named_parameters()), buffers)


def split(model: nn.Module, blocks: Sequence[str] | None, small: int) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each block by name, a tied one in the first alone.

    Raises:
        TypeError, ValueError: see `offload`.
    """
    modules = dict(model.named_modules())
    if blocks is None:
        layers: list[str] = []
        for name, module in modules.items():
            if isinstance(module, nn.ModuleList) and not any(f"{name}.".startswith(f"{one}.") for one in layers):
                layers += [f"{name}.{child}" if name else child for child in module._modules]
    else:
        if isinstance(blocks, str):
            raise TypeError(f"blocks={blocks!r}: give a list of names of modules")
        layers = list(blocks)
        if unknown := [name for name in layers if name not in modules]:
            raise ValueError(f"blocks: the model has no module {unknown[0]!r:.80}; it has {', '.join(list(modules)[1:4])}, ...")
        for a in layers:
            if any(b != a and f"{b}.".startswith(f"{a}.") for b in layers) or layers.count(a) > 1 or a == "":
                raise ValueError(f"blocks: {a!r} has another block inside, or occurs twice, or is the whole model")
    owner = {name: max((one for one in layers if f"{name}.".startswith(f"{one}.")), key=len, default=None) for name in modules}
    found: dict[str, dict[str, nn.Parameter]] = {}
    taken: set[int] = set()
    for name, module in modules.items():
        own = {f"{name}.{n}" if name else n: p for n, p in module._parameters.items() if p is not None and id(p) not in taken}
        label = owner[name]
        if label is None:
            if blocks is not None or sum(p.numel() * p.element_size() for p in own.values()) < max(1, small):
                continue
            label = name or "the model's own"
        found.setdefault(label, {}).update(own)
        taken.update(map(id, own.values()))
    if not (found := {label: members for label, members in found.items() if members}):
        raise ValueError(
            f"model={type(model).__name__} has no list of layers and no module of {small:,} bytes: name its blocks, blocks=[...]"
        )
    return found


def _found(there: Mapping[str, Any], names: Sequence[str], p: Tensor, model: nn.Module, source: Any) -> Kept:
    """Where a file has a parameter of these names."""
    for name in names:
        for one in _names_of(name, model):
            if one in there:
                if there[one].shape != tuple(p.shape):
                    raise ValueError(f"{source}: {one} has the shape {list(there[one].shape)}, the model's {list(p.shape)}")
                if p.dtype not in DTYPES.values():
                    raise ValueError(f"model: parameter {name!r} is {p.dtype}, which does not come from a file: give source='cpu'")
                found: Kept = there[one]
                return found
    raise ValueError(
        f"{source} has no tensor for parameter {names[0]!r}; it has {', '.join(sorted(there)[:3])}, ... An adapter, or a head, that is new is added to the "
        "model behind zk.offload; weights that are tied are tied before (model.tie_weights())"
    )


def _names_of(name: str, model: nn.Module) -> tuple[str, ...]:
    """By which a file may have this tensor: as it is, without wrappers' prefixes, or with or without transformers' prefix of the bare model."""
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    bare = parameters.canonical_name(name)
    return name, bare, bare.removeprefix(prefix), prefix + bare


def _buffers(model: nn.Module, there: Mapping[str, Any], source: Any) -> list[tuple[nn.Module, str, Tensor]]:
    """The buffers that the files have, with their values.

    Raises:
        ValueError: one has no values, or another shape.
    """
    found: list[tuple[nn.Module, str, Tensor]] = []
    for name, module, n, b, saved in _held_buffers(model):
        kept = next((there[one] for one in _names_of(name, model) if one in there), None)
        if kept is not None and saved and b.dtype in DTYPES.values():
            if kept.shape != tuple(b.shape):
                raise ValueError(f"{source}: {name} has the shape {list(kept.shape)}, the model's {list(b.shape)}")
            value = torch.empty(kept.nbytes, dtype=torch.uint8)
            kept.read(value, 0)
            value = value.view(kept.dtype).view(b.shape)
            found.append((module, n, value.to("cpu" if b.is_meta else b.device, b.dtype)))
        elif b.is_meta:
            raise ValueError(
                f"model: buffer {name!r} is on the meta device and has no values, and {source} has none for it: make the model with its parameters alone "
                "there (accelerate.init_empty_weights() in place of torch.device('meta'), and model.tie_weights() behind it)"
            )
    return found


def _held_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    """Each buffer of each module: its name, the module, the attribute, the buffer, whether it is saved with the model."""
    for prefix, module in model.named_modules():
        for n, b in module._buffers.items():
            if b is not None:
                yield f"{prefix}.{n}" if prefix else n, module, n, b, n not in module._non_persistent_buffers_set


def _left_over(model: nn.Module, there: set[str], source: Any) -> None:
    """Say which tensors of the files the model has no place for: another model's, perhaps."""
    for name in (n for pairs in (model.named_parameters(remove_duplicate=False), model.named_buffers()) for n, _ in pairs):
        there.difference_update(_names_of(name, model))
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if left := sorted(name for name in there if not any(re.search(pattern, name) for pattern in ignored)):
        warnings.warn(
            f"{source} has {len(left)} tensors that the model has no place for, and that are left out: {', '.join(left[:3])}"
            f"{', ...' if len(left) > 3 else ''}. Is it this model's?",
            stacklevel=3,
        )


def _held(p: Tensor, device: torch.device) -> Held:
    """Where the parameter's values lie in host memory: where they are, if they are there; for a GPU pinned, and the first ones go at once."""
    values = p.detach().to("cpu").contiguous()
    if device.type == "cuda":
        values = values.pin_memory()
        p.data = values
    return Held(values.reshape(-1).view(torch.uint8), p.dtype)


def _real(model: nn.Module, device: torch.device) -> dict[int, nn.Parameter]:
    """For each parameter on the meta device, by its id, the empty one that stands in its place in all modules."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(
                        torch.empty((), dtype=p.dtype, device=device).expand(p.shape), requires_grad=p.requires_grad
                    )
                    made[id(p)].__dict__.update(p.__dict__)
                module._parameters[name] = made[id(p)]
    return made


def _block(name: str, members: Mapping[str, nn.Parameter], kept: Mapping[str, Kept]) -> Block:
    at, places = 0, {}
    for n, p in members.items():
        places[n] = (p, at)
        at += aligned(kept[n].nbytes // kept[n].dtype.itemsize * p.element_size())
    return Block(name, places, {n: kept[n] for n in members}, at)
