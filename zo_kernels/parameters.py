"""From a model's parameters to what a pass needs: names, streams, masks, scales, plans.

Belongs here: canonical names, the stream of a name, reading what a user hands to an optimizer, `Member`, one parameter as a pass sees it, and
`Weights`, one parameter group in the form of `plan.Plan`s. Does not belong here: step rules (optim/), how a forward sees the perturbation (views/).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_kernels import checks, looks, shards
from zo_kernels.plan import Entry, Mask, Plan, make_plans

_TRAINS = attrgetter("requires_grad")

# What wrappers put into a parameter's name: DDP/DataParallel, FSDP, torch.compile, activation checkpointing, peft.
_WRAPPERS = re.compile(r"(^|\.)(?:module|_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|base_layer)(?=\.)")
_PEFT_PREFIX = re.compile(r"^base_model\.model\.")


def canonical_name(name: str) -> str:
    """The parameter's name in the bare model: without the prefixes of DDP, FSDP, torch.compile, checkpointing and peft.

    >>> canonical_name("module.base_model.model.layers.0.q_proj.base_layer.weight")
    'layers.0.q_proj.weight'
    """
    stripped = re.sub(r"^\.", "", _WRAPPERS.sub("", name))
    return _PEFT_PREFIX.sub("", stripped) or name


def hash_of(text: str) -> int:
    """The first four bytes, little-endian, of the SHA-256 of the text's UTF-8."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def stream_of(name: str) -> int:
    """The 32-bit stream of a parameter's noise: the first four bytes, little-endian, of the SHA-256 of its canonical name. The prefixes of peft, DDP,
    FSDP and torch.compile do not count, so that a name as `named_parameters()` gives it will do. In a model where two names have one hash, the
    optimizer's own `stream_of` knows which of them got another.

    >>> stream_of("base_model.model.layers.0.q_proj.base_layer.weight") == stream_of("layers.0.q_proj.weight")
    True
    """
    return hash_of(canonical_name(name))


def streams_of(names: Iterable[str], known: Mapping[str, int] | None = None) -> dict[str, int]:
    """A stream for every name, none twice. `names` are all names of the model, the frozen ones too, so that freezing cannot
    change the outcome; a collision (odds n^2 / 2^33) moves the later name in alphabetical order to its next hash. `known`: streams that
    stay what they are, of names that were there before these."""
    table = dict(known or {})
    taken = set(table.values())
    for name in sorted(set(names) - table.keys()):
        # Not `stream_of`: a canonical name may have a prefix of its own that a second look would take off.
        bare, again = canonical_name(name), 0
        stream = hash_of(bare)
        while stream in taken:
            again += 1
            stream = hash_of(f"{bare}#{again}")
        table[name] = stream
        taken.add(stream)
    return table


def no_decay(model: nn.Module) -> set[int]:
    """ids of the parameters that weight decay skips: biases, and every parameter of a normalization layer, which is
    recognised by its class (LayerNorm, LlamaRMSNorm, ...) since attribute names differ (`norm`, `ln_1`, `input_layernorm`)."""
    found = set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
        for attribute, p in module.named_parameters(recurse=False):
            if is_norm or attribute == "bias" or attribute.endswith("_bias"):
                found.add(id(p))
    return found


def persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong to the model's state, by name: packed weights, running statistics. What a model makes again by itself (rotary
    tables) is registered as not persistent and left out, and so is what has no bytes of its own (sparse, sharded, on the meta device)."""
    found = []
    for prefix, module in model.named_modules():
        for name, b in module._buffers.items():
            if b is None or name in module._non_persistent_buffers_set or b.is_meta or b.layout != torch.strided:
                continue
            if not is_traceable_wrapper_subclass(b):
                found.append((f"{prefix}.{name}" if prefix else name, b))
    return found


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The model's trainable parameters by name, tied ones once; an error if there are none, or one has no values."""
    pairs = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not pairs:
        raise ValueError(
            f"model={type(model).__name__} has no trainable parameter (requires_grad is False on all {sum(1 for _ in model.parameters())}): "
            "unfreeze some, or add an adapter"
        )
    if empty := next((name for name, p in pairs if p.is_meta), None):
        if hasattr(model.get_submodule(empty.rpartition(".")[0]), "_hf_hook"):
            raise ValueError(
                f"parameter {empty!r} is offloaded by accelerate (device_map, cpu_offload, disk_offload): its values are there for the time of its module's "
                "forward alone, past every update. Load the model without that and give it to zk.offload(model, source); or freeze the parameter"
            )
        raise ValueError(f"parameter {empty!r} is on the meta device and has no values: load its weights first")
    return pairs


_PARALLEL = {
    "FullyShardedDataParallel": "its weights are shards that come and go with the forwards; give the module as it is before FSDP wraps it",
    "DistributedDataParallel": "each process would step with a loss of its own, and its weights drift from the others'; give the plain module, "
    "model.module, and process_group=..., whose processes share each step",
    "DataParallel": "its replicas run in threads, past the perturbed weights; give the plain module, model.module",
}


def refuse_parallel(what: str, module: nn.Module) -> None:
    """Wrappers that spread a module over devices or processes, recognised by class name, subclasses too, wherever in the module they are.

    Raises:
        TypeError: names the wrapper, where it is, and what to give instead.
    """
    for name, inner in module.named_modules():
        for cls in type(inner).__mro__:
            if reason := _PARALLEL.get(cls.__name__):
                found = f"{what} has a {cls.__name__} inside, {name!r}" if name else f"{what} is a {cls.__name__}"
                raise TypeError(f"{found}: {reason}. Run the step in one process, on one device or with layers on several")


@dataclass(frozen=True)
class Named:
    """What a user handed to an optimizer, in one form: parameter groups whose 'params' are (name, tensor) pairs."""

    groups: list[dict[str, Any]]
    model: nn.Module | None
    all_names: list[str]


def _listed(where: str, members: Any) -> list[Any]:
    """An ordered collection as a list.

    Raises:
        TypeError: it has no order, or none of tensors.
    """
    if isinstance(members, (Set, Mapping, str)):
        raise TypeError(
            f"{where} is a {type(members).__name__}: give an ordered collection, for example named_parameters() or a list; a set has no order"
        )
    return [members] if isinstance(members, Tensor) else list(members)


def taken_by(first_order: torch.optim.Optimizer | None) -> set[int]:
    """The ids of the parameters that backpropagation trains.

    Raises:
        TypeError: it is no optimizer.
    """
    if first_order is None:
        return set()
    if not isinstance(first_order, torch.optim.Optimizer):
        raise TypeError(
            f"first_order is a {type(first_order).__name__}: give a torch optimizer of the parameters that backpropagation trains"
        )
    return {id(p) for group in first_order.param_groups for p in group["params"]}


def read_params(
    source: Any, model: nn.Module | None, weight_decay: float, without: Collection[int] = (), positions: bool = True
) -> Named:
    """Read a module, (name, tensor) pairs, tensors, or parameter groups of either. `without`: ids of a module's parameters to leave out. `positions`:
    tensors without a name are named by their place.

    Raises:
        TypeError: not a collection of tensors, or one without an order; or a module is wrapped for many workers.
        ValueError: a parameter is frozen, or two have one name.
    """
    for what, module in (("model_or_params", source), ("model", model)):
        if isinstance(module, nn.Module):
            refuse_parallel(what, module)
            shards.settle(module)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: give the module whose parameters are in the first argument, or leave it out"
        )
    if model is not None and isinstance(source, nn.Module) and model is not source:
        raise ValueError(
            f"model={type(model).__name__} beside a module as the first argument ({type(source).__name__}), whose forwards it would be: leave model out, or "
            "give the parameters to be trained as (name, tensor) pairs"
        )
    if isinstance(source, nn.Module):
        pairs: list[tuple[str, Tensor]] = [pair for pair in trainable(source) if id(pair[1]) not in without]
        if not pairs:
            raise ValueError(
                "model: the first-order optimizer has all of its trainable parameters, none is left to train with forwards alone"
            )
        names = [name for name, _ in source.named_parameters()]
        if not weight_decay:
            return Named([{"params": pairs}], source, names)
        skip = no_decay(source)
        decayed = [(n, p) for n, p in pairs if id(p) not in skip]
        kept = [(n, p) for n, p in pairs if id(p) in skip]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        return Named([g for g in groups if g["params"]], source, names)
    if isinstance(source, (Tensor, str, Mapping, Set)):
        raise TypeError(
            f"params is a {type(source).__name__}: give a module, named_parameters(), a list of tensors, or parameter groups"
        )
    items = list(source)
    if not items:
        raise ValueError("params is empty: give a module, named_parameters(), a list of tensors, or parameter groups")
    groups = [dict(g) for g in items] if isinstance(items[0], dict) else [{"params": items}]
    by_id = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    position, nameless = 0, False
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f"params[{number}] is not a parameter group: a group is a dict with the key 'params'")
        pairs = []
        for item in _listed(f"params[{number}]['params']", group["params"]):
            if isinstance(item, tuple):
                if len(item) != 2 or not isinstance(item[0], str):
                    raise TypeError(f"params: {item!r:.80} is neither a tensor nor a pair (name, tensor)")
                name, p = item
            else:
                p = item
                name = by_id.get(id(p))
                if name is None and not positions:
                    raise ValueError("param_group: its parameters need names for their noise: give (name, tensor) pairs")
                if name is None:
                    name, nameless = f"param.{position}", True
            if not isinstance(p, Tensor):
                raise TypeError(f"params: {name} is a {type(p).__name__}, not a tensor")
            if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
                raise TypeError(
                    f"params: {name} lies in a shard of FullyShardedDataParallel: give the parameters of the module before it is wrapped"
                )
            if id(p) in without:
                raise ValueError(f"params: {name} is in the first-order optimizer too: leave it out of one of the two")
            if not p.requires_grad:
                raise ValueError(f"params: {name} is frozen (requires_grad=False): leave it out, or set requires_grad_(True)")
            pairs.append((name, p))
            position += 1
        group["params"] = pairs
    if nameless:
        warnings.warn(
            "parameters without names take their noise stream from their position in the list: adding, freezing or reordering "
            "parameters then changes the noise. Give a module, or model.named_parameters().",
            stacklevel=4,
        )
    names = [name for g in groups for name, _ in g["params"]]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"params: the name {twice!r} occurs twice: names give parameters their noise and must be unique")
    if model is not None:
        names = sorted({*names, *by_id.values()})
    return Named(groups, model, names)


def _of(option: Any, name: str) -> Any:
    """A group option that is one value for all of its parameters, or a mapping from names."""
    return option.get(name) if isinstance(option, Mapping) else option


def _own(group: Mapping[str, Any], names: Iterable[str]) -> list[tuple[Any, list[int]]]:
    """A group's masks and scales of these parameters, each with the counts of writes to its tensors."""
    given = group.get("mask"), group.get("scale")
    if given[0] is None and given[1] is None:
        return []
    options = [_of(option, n) for option in given for n in names]
    return [
        (o, [t._version for t in (o if isinstance(o, tuple) else (o,)) if isinstance(t, Tensor) and not t.is_inference()])
        for o in options
    ]


@dataclass(frozen=True)
class Member:
    """One parameter as a pass sees it: what its noise is named, where its first element lies in the full tensor, and what limits its noise.

    `mask`, `scale` and `factors` are as `perturb_` takes them. `update_scale`: of the update, where that does not take the perturbation's scale.
    `whole`: the DTensor of which `tensor` is this process's part, None where a process has all of it. `columns`: (width, pitch) of a part that is a
    block of columns.
    """

    name: str
    tensor: Tensor
    stream: int
    offset: int = 0
    columns: tuple[int, int] | None = None
    whole: Tensor | None = None
    mask: Mask = None
    scale: Any = None
    factors: Any = None
    update_scale: Any = None

    @classmethod
    def of(cls, name: str, p: Tensor, stream: int, **limits: Any) -> Member:
        """Of a model's parameter.

        Raises:
            ValueError: it is a part of a tensor of a kind that passes cannot serve.
        """
        if not shards.is_part(p):
            return cls(name, p, stream, **limits)
        offset, columns = shards.place_of(name, p)
        return cls(name, shards.memory_of(p), stream, offset, columns, p, **limits)

    @property
    def param(self) -> Tensor:
        """What the model has by this name."""
        return self.tensor if self.whole is None else self.whole

    def limited(self, limits: Any, update_differs: bool) -> Member:
        """With what a direction says of it (limits.Limits).

        Raises:
            ValueError: it has a mask or scale where the direction has one.
        """
        for what, mine, theirs in (("mask", self.mask, limits.mask), ("scale", self.scale, limits.scale)):
            if mine is not None and (theirs is not None or (what == "scale" and update_differs)):
                raise ValueError(
                    f"parameter {self.name!r} has a {what} of its group and one of the direction: leave one of them out"
                )
        mask = self.mask if self.mask is not None else limits.mask
        scale = self.scale if self.scale is not None else limits.scale
        return replace(self, mask=mask, scale=scale, factors=limits.factors, update_scale=limits.update_scale)


@dataclass
class Weights:
    """The active (not frozen) parameters of one parameter group, with the plans of its in-place passes.

    `update_differs`: the update takes the members' `update_scale` and not the perturbation's `scale`.
    """

    members: list[Member]
    update_differs: bool = False
    plans: list[Plan] = field(init=False)
    update_plans: list[Plan] = field(init=False)
    parts: dict[frozenset[str], list[tuple[Plan, list[str]]]] = field(init=False, default_factory=dict)
    own: list[tuple[Any, list[int]]] = field(init=False, default_factory=list)  # the group's masks and scales, as they were given

    def __post_init__(self) -> None:
        self.plans = self.update_plans = self._plans([m.scale for m in self.members])
        if self.update_differs:
            self.update_plans = self._plans([m.update_scale for m in self.members])

    def _plans(self, scales: list[Any]) -> list[Plan]:
        """Blocks that come and go have plans of their own: not all of them are there at once."""
        together: dict[Any, list[int]] = {}
        for i, m in enumerate(self.members):
            together.setdefault(block_of(m.tensor), []).append(i)
        return [plan for places in together.values() for plan in self._plans_of(places, scales)]

    def _plans_of(self, places: list[int], scales: list[Any]) -> list[Plan]:
        members = [self.members[i] for i in places]
        made = make_plans(
            [m.tensor for m in members],
            [m.stream for m in members],
            masks=[m.mask for m in members],
            scales=[scales[i] for i in places],
            offsets=[m.offset for m in members],
            columns=[m.columns for m in members],
            factors=[m.factors for m in members],
            names=[f"parameter {m.name}" for m in members],
        )
        if len(members) == len(self.members):
            return made
        return [replace(plan, members=tuple(places[k] for k in plan.members)) for plan in made]

    @functools.cached_property
    def names(self) -> list[str]:
        return [m.name for m in self.members]

    @functools.cached_property
    def params(self) -> list[Tensor]:
        return [m.tensor for m in self.members]

    @functools.cached_property
    def held(self) -> list[Tensor]:
        """What the model has, in the order of `params`, which are the tensors that passes see."""
        return [m.param for m in self.members]

    @functools.cached_property
    def lie_at(self) -> looks.Columns:
        """Every member's memory as the plans have it, which stay while their masks change."""
        return looks.MEMORY.at([e.src for _, e in self.entries()])

    @functools.cached_property
    def stand_as(self) -> looks.Columns:
        """The same of members that are all trained."""
        return [True] * len(self.members), *self.lie_at

    @functools.cached_property
    def parted(self) -> bool:
        """Some of them are parts of whole tensors."""
        return any(m.whole is not None for m in self.members)

    def entries(self) -> list[tuple[Member, Entry]]:
        """Every member beside its entry in `plans`, in the group's order."""
        at = {i: e for plan in self.plans for i, e in zip(plan.members, plan.entries, strict=True)}
        return [(m, at[i]) for i, m in enumerate(self.members)]

    def part(self, names: Collection[str]) -> list[tuple[Plan, list[str]]]:
        """The plans of an update of these parameters alone, each with the names of its entries; the same plans for the same names."""
        key = frozenset(names)
        if key not in self.parts:
            parts = [plan.part([k for k, i in enumerate(plan.members) if self.names[i] in key]) for plan in self.update_plans]
            self.parts[key] = [(plan, [self.names[i] for i in plan.members]) for plan in parts if plan.entries]
        return self.parts[key]

    @classmethod
    def of_group(
        cls,
        group: Mapping[str, Any],
        streams: Mapping[str, int],
        among: Collection[str] | None = None,
        limits: Callable[[str, Tensor], Any] | None = None,
        update_differs: bool = False,
    ) -> Weights:
        """The weights of a torch parameter group: those with a name in `among` (None: all), with what `limits` says of each (limits.Limits), if
        anything; a group's own masks and scales otherwise. `update_differs`: the update takes the limits' update_scale.

        Raises:
            ValueError: the group's list was edited; or it has a mask or scale where the direction has one.
        """
        if len(group["params"]) != len(group["param_names"]):
            raise ValueError(
                f"a parameter group has {len(group['params'])} parameters and {len(group['param_names'])} names: its list was edited; "
                "add parameters with add_param_group, and freeze (requires_grad_(False)) what shall not be trained"
            )
        active = [
            (n, p)
            for n, p in zip(group["param_names"], group["params"], strict=True)
            if p.requires_grad and (among is None or n in among)
        ]
        for what in ("mask", "scale"):
            if isinstance(group.get(what), Mapping) and (unknown := sorted(set(group[what]) - set(streams), key=str)):
                raise ValueError(
                    f"{what} of a parameter group: no parameter is called {unknown[0]!r}; they are {', '.join(list(streams)[:3])}, ..."
                )
        mask, scale = group.get("mask"), group.get("scale")
        members = [Member.of(n, p, streams[n], mask=_of(mask, n), scale=_of(scale, n)) for n, p in active]
        if limits is not None:
            found = [limits(m.name, m.tensor) for m in members]
            members = [m.limited(f, update_differs) for m, f in zip(members, found, strict=True)]
        made = cls(members, limits is not None and update_differs)
        made.own = _own(group, made.names)
        return made

    def current(self, group: Mapping[str, Any], among: Collection[str] | None = None) -> bool:
        """Whether the plans still describe the group: nothing frozen, unfrozen, added, replaced, moved or converted, no other mask or scale."""
        return (
            (self._whole(group["params"]) if among is None and not self.parted else self._part(group, among))
            and len(own := _own(group, self.names)) == len(self.own)
            and all(a is b and v == w for (a, v), (b, w) in zip(own, self.own, strict=True))
        )

    def _whole(self, params: Sequence[Tensor]) -> bool:
        """`current` of members that are a whole group, or all of it that is trained."""
        if len(params) != len(self.members):
            params = list(itertools.compress(params, map(_TRAINS, params)))
        return (
            len(params) == len(self.members)
            and not any(map(is_not, params, self.held))
            and looks.TRAINED.first_change(self.held, self.stand_as) < 0
        )

    def _part(self, group: Mapping[str, Any], among: Collection[str] | None) -> bool:
        """`current` of members that are some of a group, or parts of sharded tensors."""
        named = zip(group["param_names"], group["params"], strict=False)
        active = [p for n, p in named if p.requires_grad and (among is None or n in among)]
        return (
            len(active) == len(self.members)
            and not any(map(is_not, active, self.held))
            and looks.MEMORY.first_change([shards.memory_of(p) for p in active] if self.parted else active, self.lie_at) < 0
        )


def block_of(p: Tensor) -> Any:
    """What a parameter of an offloaded model comes and goes with (views/away.py); None: it is resident."""
    return getattr(p, "zo_block", None)


def check_apart(groups: Sequence[Weights], trained: Iterable[tuple[str, Tensor]]) -> None:
    """No mask, scale or factor of a group shares memory with a trained parameter, be it another group's: steps would change it.

    Raises:
        ValueError: names both.
    """
    read = []
    for m, e in (pair for w in groups for pair in w.entries()):
        limits = {"mask": e.mask, "scale": e.scale, "left factor": e.left, "right factor": e.right}
        read += [(f"the {what} of parameter {m.name}", t) for what, t in limits.items() if t is not None]
    checks.check_apart([(f"parameter {n}", shards.memory_of(p)) for n, p in trained], read)
