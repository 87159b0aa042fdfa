"""A run as an optimizer's `state_dict`, and back: what it holds, and whether it fits.

Belongs here: the form of a saved state, its checks, and the forms of earlier versions. Does not belong here: what a part keeps (rules.py,
directions.py, projection.py), the record of a run (journal/).

The form is torch's, so that what saves and moves the state of any optimizer (torch.distributed.checkpoint, which takes `state` and `param_groups` and
leaves the rest) has all of ours: tensors of a parameter are in `state`, by its number; everything else is in the first group, under `KEY`. What the
parts remember is JSON there, one piece: lists that are taken apart and laid over another state's would be of neither run. Earlier versions
had it all beside the groups.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zo_kernels import parameters
from zo_kernels.optim import directions, projection, record, rules

if TYPE_CHECKING:
    from zo_kernels.optim.step import ZOStep

KEY = "zo"
PARTS = ("rule", "direction", "projection")  # that keep something


@dataclass
class Loaded:
    """What a state holds, as parts of the optimizer that it was read for, which are its own from then on."""

    groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]  # of others, who keep theirs beside ours
    numbers: dict[str, int]  # seed, tag, first_tag, skipped
    streams: dict[str, int]
    kept: rules.Kept
    held: directions.Held
    projector: projection.Projector | None
    past: list[float]


def memory(optimizer: ZOStep) -> int:
    """See `ZOStep.state_bytes`."""
    held = [t for part in _parts(optimizer).values() for t in part.memory()]
    if optimizer._first_order is not None:
        held += [t for own in optimizer._first_order.state.values() for t in own.values() if isinstance(t, Tensor) and t.ndim]
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(pieces.values())


def method(optimizer: ZOStep) -> dict[str, Any]:
    """What the numbers of a state mean: a state of another one is refused. Clipping is not in it: like a learning rate, it may change in a run."""
    return {
        **{what: None if part is None else record.described(part) for what, part in optimizer._configured().items()},
        "kind": optimizer._kind,
        "terms": optimizer._terms,
    }


def _parts(optimizer: ZOStep) -> dict[str, Any]:
    mine = {"rule": optimizer._kept, "direction": optimizer._held, "projection": optimizer._projection}
    return {what: part for what, part in mine.items() if part is not None}


def _fresh(optimizer: ZOStep) -> dict[str, set[str]]:
    """What each part keeps, by name."""
    found = {"rule": set(optimizer._rule.of().state()), "direction": set(optimizer._direction.of(0).state())}
    if optimizer._projection is not None:
        found["projection"] = set(optimizer._projection.state())
    return found


def pack(optimizer: ZOStep) -> dict[str, Any]:
    """The state of a run whose weights are clean."""
    numbers: dict[int, int] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            numbers.setdefault(id(p), len(numbers))
        groups.append({**group, "params": [numbers[id(p)] for p in group["params"]]})
    state: dict[Any, Any] = {
        numbers.get(id(k), k) if isinstance(k, Tensor) else k: dict(v) if isinstance(v, dict) else v
        for k, v in optimizer.state.items()
    }
    places = {n: numbers[id(p)] for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=False)}
    parts: dict[str, dict[str, Any]] = {}
    tensors: dict[str, str] = {}
    for part, keeper in _parts(optimizer).items():
        content = keeper.state()
        if optimizer._complete:
            _complete(optimizer, part, content)
        parts[part] = {}
        for what, value in content.items():
            if not (isinstance(value, dict) and value and all(isinstance(t, Tensor) for t in value.values())):
                parts[part][what] = value
                continue
            tensors[what] = part
            for name, t in value.items():
                if name in places:  # still in a group
                    state.setdefault(places[name], {})[what] = t
    if tensors:  # torch.distributed.checkpoint wants all parameters to have something, or none
        for k in numbers.values():
            state.setdefault(k, {})
    groups[0][KEY] = {
        "seed": optimizer._seed,
        "tag": optimizer._tag,
        "first_tag": optimizer._first_tag,
        "skipped": optimizer.skipped,
        "method": method(optimizer),
        "streams": dict(optimizer._streams),
        "parts": json.dumps({**parts, "past": [float(g) for g in optimizer._past]}),
        "tensors": tensors,
    }
    return {"state": state, "param_groups": groups}


def _complete(optimizer: ZOStep, part: str, content: dict[str, Any]) -> None:
    """Add the tensors that parameters will have and do not yet, with the values that they begin with: what loads into the memory of a state (as
    torch.distributed.checkpoint does) finds a place for each."""
    trained = optimizer._trained()
    if part == "rule":
        for what, dtype in optimizer._rule.keeps.items():
            for n, p in trained.items():
                content[what].setdefault(n, torch.zeros(p.numel(), dtype=dtype, device=p.device))
    elif part == "direction" and isinstance(optimizer._direction, directions.InverseRoot):
        for n, p in trained.items():
            content["diagonal"].setdefault(n, torch.ones(p.numel(), dtype=torch.float32, device=p.device))
    elif part == "projection" and optimizer._projection is not None:
        for n, p in optimizer._projection.chosen(trained).items():
            content["anchors"].setdefault(n, p.detach().clone())


# ---- back -------------------------------------------------------------------------------------------------------------


class _Refused(ValueError):
    """A refusal that says what is wrong, beside those of what a damaged state makes fail."""


def _refuse(why: str) -> _Refused:
    return _Refused(f"state_dict {why}")


def read(optimizer: ZOStep, state_dict: Any, check_group: Callable[[str, dict[str, Any]], None]) -> Loaded:
    """A saved state for this optimizer, which is not changed.

    Raises:
        TypeError, ValueError: it is no state of a zo_kernels optimizer, is damaged, or belongs to another method or other parameters; says which.
    """
    if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("param_groups"), Sequence):
        raise TypeError(f"state_dict={state_dict!r:.80} is not what an optimizer's state_dict() returns")
    saved_groups, state = state_dict["param_groups"], state_dict.get("state", {})
    if not all(isinstance(g, Mapping) and isinstance(g.get("params"), Sequence) for g in saved_groups) or not isinstance(
        state, Mapping
    ):
        raise TypeError(
            "state_dict['param_groups'] must be a list of groups, each with its 'params', and state_dict['state'] a dict"
        )
    zo = state_dict.get(KEY) or next((g[KEY] for g in saved_groups if KEY in g), None)
    if not isinstance(zo, Mapping):
        raise _refuse(
            f"has no entry {KEY!r}: it was not saved by zo_kernels (or went through a form that keeps a part of it, such as flatten_optimizer_state_dict); "
            "give the state_dict of one of its optimizers"
        )
    _check_method(optimizer, zo)
    numbers = _numbers(optimizer, zo)
    renamed, streams = _streams(optimizer, zo)
    groups, order = _groups(optimizer, saved_groups, renamed, check_group)
    try:
        contents, others = _contents(optimizer, zo, state, order, renamed, numbers)
        kept, held = optimizer._rule.of(), optimizer._direction.of(numbers["seed"], optimizer._kind, optimizer._backend)
        projector = None
        if optimizer._projection is not None:
            projector = optimizer._projection.config.of(numbers["seed"], optimizer._trained(), optimizer._backend)
        kept.load(contents["rule"])
        held.load(contents["direction"])
        if projector is not None and numbers["tag"] > numbers["first_tag"]:  # a run's anchors are the weights at its first step
            projector.load(contents["projection"])
        past = [float(g) for g in contents["past"]]
    except _Refused:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        raise _refuse(f"is damaged, or of a version that this one does not know: {type(error).__name__}: {error}") from error
    return Loaded(groups, others, numbers, streams, kept, held, projector, past)


def _check_method(optimizer: ZOStep, zo: Mapping[str, Any]) -> None:
    """The parts of the run are those of the optimizer. A state of an earlier version does not name them: `_upgraded` looks at what it holds."""
    mine, saved = method(optimizer), zo.get("method", {"kind": zo.get("kind")})
    if not isinstance(saved, Mapping):
        raise _refuse(f"has method={saved!r:.80}: it is damaged")
    for what in [what for what in mine if what in saved or "method" in zo]:
        if (theirs := saved.get(what)) != mine[what]:
            raise _refuse(
                f"belongs to another method: its {what} is {theirs!r:.200}, this optimizer's {mine[what]!r:.200}; make the optimizer as that run's, "
                "or begin a new run"
            )


def _numbers(optimizer: ZOStep, zo: Mapping[str, Any]) -> dict[str, int]:
    found = {"first_tag": 0, **{k: zo[k] for k in ("seed", "tag", "first_tag", "skipped") if k in zo}}
    for what, bits in (("seed", 64), ("tag", 33), ("first_tag", 32), ("skipped", 32)):
        value = found.get(what)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise _refuse(f"has {what}={value!r:.80}: give an integer of 0 .. 2^{bits} - 1")
    steps, rest = divmod(found["tag"] - found["first_tag"], optimizer._terms)
    if rest or steps < found["skipped"] or found["tag"] > 1 << 32:
        raise _refuse(
            f"belongs to another method, or is damaged: tags {found['first_tag']} .. {found['tag']} with {found['skipped']} steps skipped are no steps of "
            f"{optimizer._terms} tags each"
        )
    return found


def _streams(optimizer: ZOStep, zo: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, int]]:
    """The names here by those of the state, which may have been saved within other wrappers; and the run's streams, by the names here."""
    saved = zo.get("streams")
    if not isinstance(saved, Mapping):
        raise _refuse("has no streams: it is damaged")
    for name, stream in saved.items():
        if not isinstance(name, str) or isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < 1 << 32:
            raise _refuse(f"has the stream {stream!r:.80} for parameter {name!r:.80}: give an integer of 0 .. 2^32 - 1")
    bare = {parameters.canonical_name(name): name for name in saved}
    renamed: dict[str, str] = {}
    for name in optimizer._streams:
        if name in saved:
            renamed[name] = name
        elif (bare_name := parameters.canonical_name(name)) in bare:
            renamed[bare[bare_name]] = name
    here = set(renamed.values())
    if absent := [name for g in optimizer.param_groups for name in g["param_names"] if name not in here]:
        raise _refuse(f"has no stream for parameter {absent[0]!r} ({len(absent)} in all): it belongs to another model")
    streams: dict[str, int] = {}
    for theirs, stream in saved.items():
        streams[str(renamed.get(theirs, theirs))] = stream
    if len(set(streams.values())) != len(streams):
        raise _refuse("has one stream for two parameters: it is damaged")
    return renamed, parameters.streams_of(optimizer._streams, streams)


def _groups(
    optimizer: ZOStep,
    saved: Sequence[Mapping[str, Any]],
    renamed: Mapping[str, str],
    check_group: Callable[[str, dict[str, Any]], None],
) -> tuple[list[dict[str, Any]], dict[Any, str]]:
    """The groups with the saved numbers and our parameters; and the name here of each of the state's numbers for a parameter."""
    mine = optimizer.param_groups
    if len(saved) != len(mine):
        raise _refuse(f"has {len(saved)} parameter groups, this optimizer {len(mine)}: make the same groups")
    groups: list[dict[str, Any]] = []
    order: dict[Any, str] = {}
    for k, (theirs, own) in enumerate(zip(saved, mine, strict=True)):
        where = f"state_dict['param_groups'][{k}]: "
        names = theirs.get("param_names", own["param_names"])
        if len(theirs["params"]) != len(own["params"]) or len(names) != len(own["params"]):
            raise _refuse(f"has {len(theirs['params'])} parameters in group {k}, this optimizer {len(own['params'])}")
        here = [renamed.get(n, n) for n in names]
        if different := set(here) ^ set(own["param_names"]):
            raise ValueError(f"{where}parameter {min(different)!r} is in this group in only one of the two: make the same groups")
        order.update(zip(theirs["params"], here, strict=True))
        content = {key: copy.deepcopy(v) for key, v in theirs.items() if key not in ("params", "param_names", KEY)}
        # A version that kept it outside the groups: the optimizer's own.
        content.setdefault("maximize", own["maximize"])
        check_group(where, content)
        groups.append({**content, "params": own["params"], "param_names": own["param_names"]})
    return groups, order


def _contents(
    optimizer: ZOStep,
    zo: Mapping[str, Any],
    state: Mapping[Any, Any],
    order: Mapping[Any, str],
    renamed: Mapping[str, str],
    numbers: Mapping[str, int],
) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]]]:
    """What each part loads, by the names here; and the entries of `state` that are not ours."""
    params = {n: p for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    steps = (numbers["tag"] - numbers["first_tag"]) // optimizer._terms
    others: dict[Tensor, dict[str, Any]] = {}
    if "method" not in zo:
        contents = _upgraded(optimizer, zo, steps - numbers["skipped"])
        ours: Mapping[str, str] = {}
    else:
        contents = {**{part: {} for part in PARTS}, **json.loads(zo["parts"])}
        ours = dict(zo["tensors"])
        for what, part in ours.items():
            contents[part][what] = {}
    for number, entry in state.items():
        name = order.get(number)
        if not isinstance(entry, Mapping) or name is None:
            raise _refuse(f"has a state for {number!r:.80}, which is in none of its groups")
        for what, value in entry.items():
            if what in ours:
                contents[ours[what]][what][name] = value
            else:
                others.setdefault(params[name], {})[what] = copy.deepcopy(value)
    for part, keys in _fresh(optimizer).items():
        if missing := keys - set(contents[part]):
            raise _refuse(f"has no {min(missing)!r} of the {part}: it is damaged, or belongs to another method")
        for what, value in contents[part].items():
            if isinstance(value, Mapping):
                contents[part][what] = {renamed.get(n, n): v for n, v in value.items()}
    contents["rule"]["cohorts"] = [
        ([renamed.get(n, n) for n in names], count, places) for names, count, places in contents["rule"]["cohorts"]
    ]
    _check_tensors(optimizer, contents, params, steps - numbers["skipped"])
    return contents, others


def _check_tensors(optimizer: ZOStep, contents: Mapping[str, Any], params: Mapping[str, Tensor], updates: int) -> None:
    """Each has the form of its parameter's, and none is missing that an update must have made."""
    wanted: list[tuple[str, str, torch.dtype | None]] = [("rule", what, dtype) for what, dtype in optimizer._rule.keeps.items()]
    if isinstance(optimizer._direction, directions.InverseRoot):
        wanted.append(("direction", "diagonal", torch.float32))
    if optimizer._projection is not None:
        wanted.append(("projection", "anchors", None))
    counts = {n: count for names, count, _ in contents["rule"]["cohorts"] for n in names}
    for part, what, dtype in wanted:
        found = contents[part][what]
        for name, t in found.items():
            if name not in params:
                raise _refuse(f"has {what!r} of parameter {name!r}, which is in none of its groups")
            shape = tuple(params[name].shape) if dtype is None else (params[name].numel(),)
            if not isinstance(t, Tensor) or t.is_meta or t.layout != torch.strided:
                raise _refuse(f"has {what!r} of parameter {name!r} as a {type(t).__name__} without values")
            if tuple(t.shape) != shape or (t.dtype != dtype if dtype is not None else not t.is_floating_point()):
                raise _refuse(
                    f"has {what!r} of parameter {name!r} as {t.dtype} {tuple(t.shape)}, this optimizer's is {dtype or 'floating point'} {shape}: "
                    "it belongs to another model"
                )
        lost = [n for n, count in counts.items() if n in params and count and n not in found]
        if part == "projection":
            lost = [] if found or not updates else list(params)
        if lost:
            raise _refuse(f"has no {what!r} of parameter {lost[0]!r} after {updates} updates: a part of it was lost")


def _upgraded(optimizer: ZOStep, zo: Mapping[str, Any], updates: int) -> dict[str, Any]:
    """The contents of a state that an earlier version saved, which named no method: it fits if it holds what this optimizer's parts keep, no more and
    no less. Without blocks every parameter that has a state counted all updates of the run."""
    rule, saved = optimizer._rule, zo.get("parts", {})
    if optimizer._blocks is not None and rule.counts:
        raise _refuse(
            f"was saved by a version whose {rule.name!r} counted the steps of all blocks; this one counts a block's own: begin a new run"
        )
    tensors, history = (saved.get("rule", {}).get(what, {}) for what in ("tensors", "history"))
    kept = {what for own in tensors.values() for what in own}
    if (kept and kept != set(rule.keeps)) or (updates and bool(kept) != bool(rule.keeps)):
        raise _refuse(
            f"belongs to another method: it keeps {sorted(kept)} for each weight, the rule {rule.name!r} keeps {sorted(rule.keeps)}"
        )
    recomputed = rule.counts and not rule.keeps
    if bool(history) != (recomputed and bool(history or updates)):
        raise _refuse(f"belongs to another method: it has {len(history)} histories of past steps, the rule is {rule!r}")
    for part, mine in (
        ("direction", set(optimizer._held.state())),
        ("projection", {"anchors"} if optimizer._projection else set()),
    ):
        if (theirs := set(saved.get(part, {}))) != mine:
            raise _refuse(f"belongs to another method: it has {sorted(theirs)} of a {part}, this optimizer's has {sorted(mine)}")
    past: list[Any] = []
    cohorts: list[Any] = [(sorted(tensors), updates, [])] if tensors else []
    for k, steps in history.items():
        places = list(range(len(past), len(past) + len(steps)))
        past += [(tags, coefs, int(live)) for tags, coefs, _, live in steps]
        cohorts.append((list(optimizer.param_groups[k]["param_names"]), updates, places))
    content = {what: {n: own[what] for n, own in tensors.items()} for what in rule.keeps}
    return {
        "rule": {**content, "past": past, "cohorts": cohorts},
        "direction": dict(saved.get("direction", {})),
        "projection": dict(saved.get("projection", {})),
        "past": saved.get("past", []),
    }
