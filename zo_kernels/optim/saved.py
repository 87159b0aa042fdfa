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
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_kernels import parameters, shards
from zo_kernels.optim.findings import ZOWarning
from zo_kernels.optim.groups import check_group
from zo_kernels.optim.method import describe
from zo_kernels.optim.refresh import trained
from zo_kernels.optim.run import Run

KEY = "zo"
PARTS = ("rule", "direction", "projection", "scale_free")  # that keep something
LATER = ("scale_free", "anchor")  # of the method: not in every state that names one


Groups = list[dict[str, Any]]  # torch's parameter groups


@dataclass
class Loaded:
    """What a state holds: a run of its own, and what belongs to the groups and to others."""

    groups: Groups
    state: dict[Tensor, dict[str, Any]]  # of others, who keep theirs beside ours
    run: Run


def method(run: Run) -> dict[str, Any]:
    """What the numbers of a state mean: a state of another one is refused. Clipping is not in it: like a learning rate, it may change in a run.
    A part that earlier versions did not know is named where there is one."""
    parts = {what: part for what, part in run.method.configured().items() if part is not None or what not in LATER}
    return {
        **{what: None if part is None else describe(part) for what, part in parts.items()},
        "kind": run.method.kind,
        "terms": run.method.terms,
    }


def _keepers(run: Run) -> dict[str, Any]:
    mine = {"rule": run.rule, "direction": run.direction, "projection": run.projector, "scale_free": run.unit}
    return {what: part for what, part in mine.items() if part is not None}


def _fresh(run: Run) -> dict[str, set[str]]:
    """What each part keeps, by name."""
    return {what: set(keeper.state()) for what, keeper in _keepers(_empty(run)).items()}


def _empty(run: Run, seed: int = 0, streams: Mapping[str, int] | None = None) -> Run:
    """A run of the same method that has not begun."""
    return Run(run.method, seed, streams or {}, run.backend)


def memory(run: Run, first_order: torch.optim.Optimizer | None) -> int:
    """See `ZOStep.state_bytes`."""
    held = [t for keeper in _keepers(run).values() for t in keeper.memory()]
    if first_order is not None:
        held += [t for own in first_order.state.values() for t in own.values() if isinstance(t, Tensor) and t.ndim]
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(pieces.values())


def pack(run: Run, param_groups: Groups, others: Mapping[Any, Any], complete: bool) -> dict[str, Any]:
    """The state of a run whose weights are clean.

    Args:
        others: what an optimizer's `state` holds beside ours. complete: with a place for every tensor that there will be, and the value that it begins
            with: what loads into the memory of a state (as torch.distributed.checkpoint does) finds a place for each.
    """
    numbers: dict[int, int] = {}
    groups: Groups = []
    for group in param_groups:
        for p in group["params"]:
            numbers.setdefault(id(p), len(numbers))
        groups.append({**group, "params": [numbers[id(p)] for p in group["params"]]})
    state: dict[Any, Any] = {
        numbers.get(id(k), k) if isinstance(k, Tensor) else k: dict(v) if isinstance(v, dict) else v for k, v in others.items()
    }
    held = {n: p for g in param_groups for n, p in zip(g["param_names"], g["params"], strict=False)}
    parts: dict[str, dict[str, Any]] = {}
    tensors: dict[str, str] = {}
    for part, keeper in _keepers(run).items():
        content = keeper.state()
        if complete:
            for what, first in keeper.begin(trained(param_groups)).items():
                for name, t in first.items():
                    content[what].setdefault(name, t)
        parts[part] = {}
        for what, value in content.items():
            if not (isinstance(value, dict) and value and all(isinstance(t, Tensor) for t in value.values())):
                parts[part][what] = value
                continue
            tensors[what] = part
            for name, t in value.items():
                if name in held:  # still in a group
                    state.setdefault(numbers[id(held[name])], {})[what] = shards.as_part(held[name], t)
    if tensors:  # torch.distributed.checkpoint wants all parameters to have something, or none
        for k in numbers.values():
            state.setdefault(k, {})
    anchor = run.method.anchor
    groups[0][KEY] = {
        **({} if anchor is None else {"base": anchor.fingerprint(run.streams)}),
        "seed": run.seed,
        "tag": run.tag,
        "first_tag": run.first_tag,
        "skipped": int(run.skipped),
        "method": method(run),
        "streams": dict(run.streams),
        "parts": json.dumps({**parts, "past": [float(g) for g in run.past]}),
        "tensors": tensors,
    }
    return {"state": state, "param_groups": groups}


def asked_for(param_groups: Groups) -> bool:
    """Whether a step without a closure is torch.distributed.checkpoint's, which makes an optimizer's state by one with lr = 0 and gradients of zero."""
    params = [p for g in param_groups for p in g["params"] if p.requires_grad]
    return all(float(g.get("lr", 1)) == 0 for g in param_groups) and all(p.grad is not None and not p.grad.any() for p in params)


def same(a: Run, b: Run) -> bool:
    """Whether two runs of one method are at the same place, with the same memory, to the bit."""
    numbers = [(run.seed, run.tag, run.first_tag, int(run.skipped), [float(g) for g in run.past]) for run in (a, b)]
    mine, theirs = ({what: keeper.state() for what, keeper in _keepers(run).items()} for run in (a, b))
    return numbers[0] == numbers[1] and _alike(mine, theirs)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_alike(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_alike, a, b))
    return bool(a == b)


def tell(run: Run, mine: Groups, loaded: Loaded) -> None:
    """Warn where a state has other numbers than the optimizer that loads it: those are the run's. A rate is the one before any scheduler."""
    found = [f"seed {loaded.run.seed} (made with {run.seed})"] if loaded.run.seed != run.seed else []
    for k, groups in enumerate(zip(mine, loaded.groups, strict=True)):
        where = f" of group {k}" if len(mine) > 1 else ""
        for what in ("lr", "eps", "weight_decay", "maximize"):
            own, theirs = ({**g, "lr": g.get("initial_lr", g["lr"])}[what] for g in groups)
            if float(own) != float(theirs):
                values = f"{theirs}" if what == "maximize" else f"{float(theirs):g} (made with {float(own):g})"
                found.append(f"{what}{where} {values}")
    if found:
        warnings.warn(
            f"load_state_dict(): the state's numbers count from here on, as in torch's optimizers, and are others than this optimizer has: {', '.join(found)}. "
            "Numbers that are set in param_groups afterwards stay; the noise of a run has one seed",
            ZOWarning,
            stacklevel=3,
        )


# ---- back -------------------------------------------------------------------------------------------------------------


class StateError(ValueError):
    """A state that an optimizer cannot go on from: the text says why, and what to do."""


def _refuse(why: str) -> StateError:
    return StateError(f"state_dict {why}")


def read(run: Run, param_groups: Groups, state_dict: Any) -> Loaded:
    """A saved state for an optimizer with this run and these groups, which are not changed.

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
    _check_method(run, zo)
    numbers = _numbers(run, zo)
    renamed, streams = _streams(run, param_groups, zo)
    _check_base(run, zo)
    groups, order = _groups(param_groups, saved_groups, renamed)
    try:
        contents, others = _contents(run, param_groups, zo, state, order, renamed, numbers)
        found = _empty(run, numbers["seed"], streams)
        found.rule.load(contents["rule"])
        found.direction.load(contents["direction"])
        if (
            found.projector is not None and numbers["tag"] > numbers["first_tag"]
        ):  # a run's anchors are the weights at its first step
            found.projector.load(contents["projection"])
        if found.unit is not None:
            found.unit.load(contents["scale_free"])
        found.past.extend(torch.tensor(float(g), dtype=torch.float64, device="cpu") for g in contents["past"])
    except StateError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        raise _refuse(f"is damaged, or of a version that this one does not know: {type(error).__name__}: {error}") from error
    found.go_on(numbers["tag"], numbers["first_tag"])
    found.skipped = numbers["skipped"]
    return Loaded(groups, others, found)


def _check_method(run: Run, zo: Mapping[str, Any]) -> None:
    """The parts of the run are those of the optimizer. A state of an earlier version does not name them: `_upgraded` looks at what it holds."""
    mine, saved = method(run), zo.get("method", {"kind": zo.get("kind")})
    if not isinstance(saved, Mapping):
        raise _refuse(f"has method={saved!r:.80}: it is damaged")
    for what in [what for what in dict.fromkeys((*LATER, *mine, *saved)) if what in saved or "method" in zo]:
        if (theirs := saved.get(what)) != (ours := mine.get(what)):
            raise _refuse(
                f"belongs to another method: its {what} is {theirs!r:.200}, this optimizer's {ours!r:.200}; make the optimizer as that run's, "
                "or begin a new run"
            )


def _check_base(run: Run, zo: Mapping[str, Any]) -> None:
    """The weights that the run is pulled toward are those that it began with. States of the first version with anchors do not have their digest."""
    if run.method.anchor is not None and "base" in zo and zo["base"] != run.method.anchor.fingerprint(run.streams):
        raise _refuse(
            "is of a run that is pulled toward another base than this optimizer's Anchor has (such as weights that had been loaded before it was made): "
            "give the weights that the run began with"
        )


def _numbers(run: Run, zo: Mapping[str, Any]) -> dict[str, int]:
    found = {"first_tag": 0, **{k: zo[k] for k in ("seed", "tag", "first_tag", "skipped") if k in zo}}
    for what, bits in (("seed", 64), ("tag", 33), ("first_tag", 32), ("skipped", 32)):
        value = found.get(what)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise _refuse(f"has {what}={value!r:.80}: give an integer of 0 .. 2^{bits} - 1")
    steps, rest = divmod(found["tag"] - found["first_tag"], run.method.terms)
    if rest or steps < found["skipped"] or found["tag"] > 1 << 32:
        raise _refuse(
            f"belongs to another method, or is damaged: tags {found['first_tag']} .. {found['tag']} with {found['skipped']} steps skipped are no steps of "
            f"{run.method.terms} tags each"
        )
    return found


def _streams(run: Run, param_groups: Groups, zo: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, int]]:
    """The names here by those of the state, which may have been saved within other wrappers; and the run's streams, by the names here."""
    saved = zo.get("streams")
    if not isinstance(saved, Mapping):
        raise _refuse("has no streams: it is damaged")
    for name, stream in saved.items():
        if not isinstance(name, str) or isinstance(stream, bool) or not isinstance(stream, int) or not 0 <= stream < 1 << 32:
            raise _refuse(f"has the stream {stream!r:.80} for parameter {name!r:.80}: give an integer of 0 .. 2^32 - 1")
    bare = {parameters.canonical_name(name): name for name in saved}
    renamed: dict[str, str] = {}
    for name in run.streams:
        if name in saved:
            renamed[name] = name
        elif (bare_name := parameters.canonical_name(name)) in bare:
            renamed[bare[bare_name]] = name
    here = set(renamed.values())
    if absent := [name for g in param_groups for name in g["param_names"] if name not in here]:
        raise _refuse(f"has no stream for parameter {absent[0]!r} ({len(absent)} in all): it belongs to another model")
    streams: dict[str, int] = {}
    for theirs, stream in saved.items():
        streams[str(renamed.get(theirs, theirs))] = stream
    if len(set(streams.values())) != len(streams):
        raise _refuse("has one stream for two parameters: it is damaged")
    return renamed, parameters.streams_of(run.streams, streams)


def _groups(mine: Groups, saved: Sequence[Mapping[str, Any]], renamed: Mapping[str, str]) -> tuple[Groups, dict[Any, str]]:
    """The groups with the saved numbers and our parameters; and the name here of each of the state's numbers for a parameter."""
    if len(saved) != len(mine):
        raise _refuse(f"has {len(saved)} parameter groups, this optimizer {len(mine)}: make the same groups")
    groups: Groups = []
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
    run: Run,
    param_groups: Groups,
    zo: Mapping[str, Any],
    state: Mapping[Any, Any],
    order: Mapping[Any, str],
    renamed: Mapping[str, str],
    numbers: Mapping[str, int],
) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]]]:
    """What each part loads, by the names here; and the entries of `state` that are not ours."""
    params = {n: p for g in param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    steps = (numbers["tag"] - numbers["first_tag"]) // run.method.terms
    others: dict[Tensor, dict[str, Any]] = {}
    if "method" not in zo:
        contents = _upgraded(run, param_groups, zo, steps - numbers["skipped"])
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
    for part, keys in _fresh(run).items():
        if missing := keys - set(contents[part]):
            raise _refuse(f"has no {min(missing)!r} of the {part}: it is damaged, or belongs to another method")
        for what, value in contents[part].items():
            if isinstance(value, Mapping):
                contents[part][what] = {renamed.get(n, n): v for n, v in value.items()}
    contents["rule"]["cohorts"] = [
        ([renamed.get(n, n) for n in names], count, places) for names, count, places in contents["rule"]["cohorts"]
    ]
    _check_tensors(run, contents, params, steps - numbers["skipped"])
    return contents, others


def _check_tensors(run: Run, contents: Mapping[str, Any], params: Mapping[str, Tensor], updates: int) -> None:
    """Each has the form of its parameter's, and none is missing that an update must have made."""
    counts = {n: count for names, count, _ in contents["rule"]["cohorts"] for n in names}
    wanted = [(part, what, dtype) for part, keeper in _keepers(run).items() for what, dtype in keeper.keeps.items()]
    for part, what, dtype in wanted:
        found = contents[part][what]
        for name, t in found.items():
            if name not in params:
                raise _refuse(f"has {what!r} of parameter {name!r}, which is in none of its groups")
            p = params[name]
            shape = tuple(p.shape) if dtype is None or shards.is_part(p) else (p.numel(),)
            if not isinstance(t, Tensor) or t.is_meta or t.layout != torch.strided:
                raise _refuse(f"has {what!r} of parameter {name!r} as a {type(t).__name__} without values")
            if not shards.alike(t, p):
                raise _refuse(
                    f"has {what!r} of parameter {name!r} as a {type(t).__name__}, and not as the part of it that this process has: load it by "
                    "torch.distributed.checkpoint, into a state of weights that are sharded as they were when it was saved, or otherwise, but sharded"
                )
            if tuple(t.shape) != shape or (t.dtype != dtype if dtype is not None else not t.is_floating_point()):
                raise _refuse(
                    f"has {what!r} of parameter {name!r} as {t.dtype} {tuple(t.shape)}, this optimizer's is {dtype or 'floating point'} {shape}: "
                    "it belongs to another model"
                )
            found[name] = shards.memory_of(t).reshape(-1) if shards.is_part(p) else t
        lost = [n for n, count in counts.items() if n in params and count and n not in found]
        if part == "projection":
            lost = [] if found or not updates else list(params)
        if lost:
            raise _refuse(f"has no {what!r} of parameter {lost[0]!r} after {updates} updates: a part of it was lost")


def _upgraded(run: Run, param_groups: Groups, zo: Mapping[str, Any], updates: int) -> dict[str, Any]:
    """The contents of a state that an earlier version saved, which named no method: it fits if it holds what this optimizer's parts keep, no more and
    no less. Without blocks every parameter that has a state counted all updates of the run."""
    rule, saved = run.method.rule, zo.get("parts", {})
    if run.method.blocks is not None and rule.counts:
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
        ("direction", set(run.direction.state())),
        ("projection", {"anchors"} if run.projector else set()),
    ):
        if (theirs := set(saved.get(part, {}))) != mine:
            raise _refuse(f"belongs to another method: it has {sorted(theirs)} of a {part}, this optimizer's has {sorted(mine)}")
    past: list[Any] = []
    cohorts: list[Any] = [(sorted(tensors), updates, [])] if tensors else []
    for k, steps in history.items():
        places = list(range(len(past), len(past) + len(steps)))
        past += [(tags, coefs, int(live)) for tags, coefs, _, live in steps]
        cohorts.append((list(param_groups[k]["param_names"]), updates, places))
    content = {what: {n: own[what] for n, own in tensors.items()} for what in rule.keeps}
    return {
        "rule": {**content, "past": past, "cohorts": cohorts},
        "direction": dict(saved.get("direction", {})),
        "projection": dict(saved.get("projection", {})),
        "past": saved.get("past", []),
    }
