"""Update rules that keep state for every weight: one pass over weights and state, the noise generated in it.

    u <- scale * mask * sum_k c_k z(seed, stream, tag_k);   (theta, states) <- rule(theta, states, u)          docs/numerics.md, "Update rules"

Belongs here: `update_`, its checks and its dispatch to a backend, and what a backend receives beside the `plan.Plan`: `RulePass` and the
state tensors. Does not belong here: the rules' arithmetic (csrc/rules.h, reference.py, _backends/), what a step does with them (optim/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels import _backends as backends
from zo_kernels import checks
from zo_kernels.plan import Mask, Plan, Terms, capturing, make_plans, make_terms, move, written

ROUNDED = (torch.float32, torch.bfloat16)  # a state that may be held in 16 bits, rounded stochastically
EXACT = (torch.float32,)
STATE_WORDS = 2  # of zo_states


@dataclass(frozen=True)
class Rule:
    """What a rule is given: its number in zo_kernels.h, the names of its numbers in order, and its states with the dtypes they may have."""

    code: int
    numbers: tuple[str, ...]
    states: tuple[tuple[str, tuple[torch.dtype, ...]], ...]


RULES = {
    "momentum": Rule(0, ("go", "decay", "lr", "beta"), (("b", ROUNDED),)),
    "adam": Rule(
        1,
        ("go", "decay", "lr1", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "v_factor", "eps"),
        (("m", ROUNDED), ("v", EXACT)),
    ),
    "hizoo": Rule(2, ("go", "decay", "lrg", "alpha", "kappa", "low", "high"), (("h", EXACT),)),
    "adam_history": Rule(3, ("go", "decay", "lr", "eps"), ()),
}

States = Sequence[Sequence[Tensor]]  # of a plan: for each entry its states, in the order of the rule


@dataclass(frozen=True)
class RulePass:
    """What is done to a plan's tensors and their states.

    `tags`/`coefs` as in `plan.Pass`. `numbers`: those of the rule (`RULES[rule].numbers`), a list of floats or a 1-d fp32 tensor on the
    plan's device. `squares`: of the rule "adam_history" the coefficients q_k, as `coefs`; else None.
    """

    seed: int
    tags: Sequence[int] | Tensor
    coefs: Sequence[float] | Tensor
    kind: str
    rounding: str
    rule: str
    numbers: Sequence[float] | Tensor
    squares: Sequence[float] | Tensor | None = None

    def on(self, device: torch.device) -> RulePass:
        """The same, with what is a tensor on `device`; without waiting for either device."""
        values: list[Any] = [self.tags, self.coefs, self.numbers, self.squares]
        if all(not isinstance(v, Tensor) or v.device == device for v in values):
            return self
        tags, coefs, numbers, squares = (move(v, device) if isinstance(v, Tensor) else v for v in values)
        return replace(self, tags=tags, coefs=coefs, numbers=numbers, squares=squares)

    def tensors_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tags int64 [K], coefs fp32 [K], numbers fp32, squares fp32 [K] or [0]) as contiguous tensors on `device`."""
        tags = torch.as_tensor(self.tags, dtype=torch.int64, device=device)
        given = (self.coefs, self.numbers, () if self.squares is None else self.squares)
        coefs, numbers, squares = (torch.as_tensor(x, dtype=torch.float32, device=device).contiguous() for x in given)
        return tags.contiguous(), coefs, numbers, squares


# ---- checks -----------------------------------------------------------------------------------------------------------


def check_numbers(rule: str, numbers: Any) -> list[float] | Tensor:
    names = RULES[rule].numbers
    wanted = f"of the rule {rule!r}: ({', '.join(names)})"
    if isinstance(numbers, Tensor):
        if numbers.dtype != torch.float32 or numbers.shape != (len(names),):
            raise TypeError(f"numbers is {numbers.dtype} {tuple(numbers.shape)}; give float32 ({len(names)},), {wanted}")
        return numbers.contiguous()
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != len(names):
        raise ValueError(f"numbers={numbers!r} must be {len(names)} numbers or a tensor of them, {wanted}")
    values = [checks.check_fp32(f"numbers[{k}] ({name})", x) for k, (name, x) in enumerate(zip(names, numbers, strict=True))]
    if rule == "hizoo" and not 0 < np.float32(values[5]) <= np.float32(values[6]):
        raise ValueError(
            f"numbers: low={values[5]!r} and high={values[6]!r} must satisfy 0 < low <= high in fp32: h is divided by its root"
        )
    return values


def check_squares(rule: str, squares: Any, coefs: Any) -> list[float] | Tensor | None:
    if rule != "adam_history":
        if squares is not None:
            raise ValueError(f"squares is for the rule 'adam_history' only, and the rule is {rule!r}: leave it out")
        return None
    if isinstance(coefs, Tensor) and isinstance(squares, Tensor):
        if squares.dtype != torch.float32 or squares.shape != coefs.shape:
            raise TypeError(
                f"squares is {squares.dtype} {tuple(squares.shape)}; give float32 {tuple(coefs.shape)}, one for each term"
            )
        return squares.contiguous()
    if isinstance(squares, (Tensor, str)) or not isinstance(squares, Sequence) or len(squares) != len(coefs):
        raise ValueError(f"squares={squares!r} must be {len(coefs)} numbers, one for each term (a tensor if the terms are tensors)")
    values = [checks.check_fp32(f"squares[{k}]", q) for k, q in enumerate(squares)]
    if isinstance(coefs, Tensor):
        return torch.tensor(values, dtype=torch.float32, device=coefs.device)
    return values


def check_single(rule: str, coefs: Any) -> None:
    if rule == "hizoo" and (len(coefs) != 1 or (not isinstance(coefs, Tensor) and coefs[0] != 1.0)):
        raise ValueError(
            f"terms: the rule 'hizoo' takes one direction with coefficient 1, not the coefficients {coefs!r}; g goes into lrg"
        )


def check_states(rule: str, states: Any, params: Sequence[Tensor]) -> list[list[Tensor]]:
    """One list for each parameter, whose dtypes are the same for all of them."""
    wanted = RULES[rule].states
    if not wanted:
        if states is not None and any(len(s) for s in states):
            raise ValueError(f"states: the rule {rule!r} keeps none; leave it out")
        return [[] for _ in params]
    names = ", ".join(name for name, _ in wanted)
    result = []
    for k, (own, t) in enumerate(zip(checks.check_length("states", states, len(params)), params, strict=True)):
        if isinstance(own, Tensor) or not isinstance(own, Sequence) or len(own) != len(wanted):
            raise TypeError(
                f"states[{k}] must be a list of the {len(wanted)} states ({names}) of its tensor under the rule {rule!r}"
            )
        for j, (s, (name, dtypes)) in enumerate(zip(own, wanted, strict=True)):
            label = f"states[{k}][{j}] ({name})"
            checks.check_tensor(label, s)
            if s.dtype not in dtypes:
                raise TypeError(f"{label} has dtype {s.dtype}; give {' or '.join(str(d) for d in dtypes)}")
            if s.shape != t.shape or s.device != t.device:
                raise ValueError(f"{label} is {tuple(s.shape)} on {s.device}; its tensor is {tuple(t.shape)} on {t.device}")
            if s.dtype != states[0][j].dtype:
                raise TypeError(f"{label} has dtype {s.dtype} and states[0][{j}] {states[0][j].dtype}: give all of them one dtype")
        result.append([s.detach() for s in own])
    named = [(f"params[{k}]", t) for k, t in enumerate(params)]
    named += [(f"states[{k}][{j}]", s) for k, own in enumerate(result) for j, s in enumerate(own)]
    checks.check_overlap(named, "a pass reads and writes each of them once")
    return result


def check_plan(plan: Plan, states: States, p: RulePass) -> None:
    """What a plan may not have for a rule, and what the kernels use to find their way in memory."""
    rule = RULES[p.rule]
    if (plan.table[:, 0] != plan.table[:, 1]).any():
        raise ValueError(f"rule {p.rule!r}: the plan writes to tensors other than it reads; a rule works in place")
    if plan.table[:, 7].any():
        raise ValueError(f"rule {p.rule!r}: the plan has gathered rows, which have no states of their own; give the whole table")
    if plan.extended:
        raise ValueError(f"rule {p.rule!r}: the plan has factors or inverse-square-root scales, which the rules do not take")
    if p.rule == "hizoo" and plan.table[:, 5].any():
        raise ValueError("rule 'hizoo': the plan has scales; the rule divides by the root of h itself: leave them out")
    if len(states) != len(plan.entries):
        raise ValueError(f"states has {len(states)} entries, the plan {len(plan.entries)}: give a list of states for each")
    for k, (own, entry) in enumerate(zip(states, plan.entries, strict=True)):
        if len(own) != len(rule.states):
            raise ValueError(f"states[{k}] has {len(own)} tensors; the rule {p.rule!r} has {len(rule.states)} states")
        for j, s in enumerate(own):
            if s.numel() != entry.src.numel() or s.dtype != states[0][j].dtype or s.dtype not in rule.states[j][1]:
                raise ValueError(
                    f"states[{k}][{j}] is {s.dtype} with {s.numel()} elements; its tensor has {entry.src.numel()} elements"
                )


# ---- what backends need of the states ---------------------------------------------------------------------------------


def state_table(plan: Plan, states: States) -> np.ndarray:
    """uint64 [n, 2]: the structs zo_states of csrc/zo_kernels.h, row by row those of the plan's table, 0 where the rule has no such state."""
    table = np.zeros((len(plan.table), STATE_WORDS), dtype=np.uint64)
    first = 0
    for entry, rows, own in zip(plan.entries, plan.rows, states, strict=True):
        for word, s in enumerate(own):
            steps = np.arange(rows, dtype=np.uint64) * np.uint64(entry.width * s.element_size())
            table[first : first + rows, word] = np.uint64(s.data_ptr()) + steps
        first += rows
    return table


@dataclass
class ResidentTable:
    """`state_table` in the memory of a plan's device. `addresses`: what was uploaded. `ready` was recorded after it; None in host memory."""

    addresses: bytes
    table: Tensor
    ready: torch.cuda.Event | None


def resident_table(plan: Plan, states: States) -> Tensor:
    """`state_table` as int64 [n, 2] in the memory of the plan's device, in order before the work that the current stream gets next; uploaded anew where a
    state has moved, which in a capture is refused."""
    table = state_table(plan, states)
    addresses = table.tobytes()
    held: ResidentTable | None = plan.cache.get("states")
    on_gpu = plan.device.type == "cuda"
    if held is None or held.addresses != addresses:
        if on_gpu and capturing(plan.device):
            raise RuntimeError(
                "a CUDA graph is being captured and this rule has never run on these states: run it once before the capture"
            )
        held = ResidentTable(
            addresses, move(torch.from_numpy(table.view(np.int64)), plan.device), torch.cuda.Event() if on_gpu else None
        )
        if held.ready is not None:
            held.ready.record(torch.cuda.current_stream(plan.device))
        plan.cache["states"] = held
    elif held.ready is not None and not capturing(plan.device):  # a capture begins with a synchronisation
        stream = torch.cuda.current_stream(plan.device)
        stream.wait_event(held.ready)
        held.table.record_stream(stream)
    return held.table


def state_dtype(states: States) -> torch.dtype:
    """Of the first state; the second is always float32."""
    return states[0][0].dtype if states and states[0] else torch.float32


# ---- dispatch ---------------------------------------------------------------------------------------------------------


def run_rule(plans: Sequence[Plan], states: Sequence[States], p: RulePass, backend: str | None = None) -> None:
    """One launch for each plan; `states[k]` are the states of plan k, a list for each entry. The inner door: values are already checked."""
    for plan, own in zip(plans, states, strict=True):
        check_plan(plan, own, p)
    for plan, own in zip(plans, states, strict=True):
        backends.pick(plan.device, backend).update(plan, own, p.on(plan.device))
    written(plans)
    changed = [s for own in states for entry in own for s in entry if not s.is_inference()]
    if changed:
        torch.autograd.graph.increment_version(changed)


def update_(
    params: Sequence[Tensor],
    terms: Terms,
    *,
    rule: str,
    numbers: Sequence[float] | Tensor,
    states: Sequence[Sequence[Tensor]] | None = None,
    seed: int,
    streams: Sequence[int],
    masks: Sequence[Mask] | None = None,
    scales: Sequence[Any] | None = None,
    offsets: Sequence[int] | None = None,
    kind: str = "gaussian",
    rounding: str = "nearest",
    squares: Sequence[float] | Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of an update rule with the gradient estimate ``u = scale * mask * sum_k c_k z(seed, stream, tag_k)``, in one pass.

    Weights and states are read and written once, u is never stored; every backend writes the same bits (docs/numerics.md, "Update rules").
    Each operation is rounded to fp32. The rules, with their numbers in order and their states:

    - "momentum" (go, decay, lr, beta), state b: ``b <- beta b + u; theta <- decay theta - lr b``.
    - "adam" (go, decay, lr1 = lr / (1 - beta1^t), beta1, 1 - beta1, beta2, 1 - beta2, v_factor = 1 / (1 - beta2^t), eps), states m and v
      (Kingma and Ba, arXiv 1412.6980): ``m <- beta1 m + (1 - beta1) u; v <- beta2 v + (1 - beta2) u^2;
      theta <- decay theta - lr1 m / (sqrt(v_factor v) + eps)``.
    - "hizoo" (go, decay, lrg = lr g, alpha, kappa, low, high), state h (Zhao et al., arXiv 2402.15173), one term of coefficient 1, no
      scale: ``h <- clamp(h + h alpha (kappa z^2 - 1), low, high); theta <- decay theta - lrg z / sqrt(h)``.
    - "adam_history" (go, decay, lr, eps), no state: Adam recomputed from its last K terms, with the coefficients c_k of m and
      ``squares`` q_k of v: ``theta <- decay theta - lr (sum_k c_k z_k) / (sqrt(sum_k q_k z_k^2) + eps)``.

    With go = 0, or if any of the numbers, coefficients and squares is not finite, nothing is written, neither weights nor states. A
    weight that a mask leaves out keeps its states and is multiplied by decay.

    Args:
        params: contiguous tensors of dtype float32, float16 or bfloat16, of any shape, that do not overlap; written in place.
        terms: as in `perturb_`: a list of ``(tag, coefficient)``, or two tensors.
        rule, numbers: see above; numbers are floats, or a float32 tensor (on the weights' device the host never waits for it).
        states: for each tensor the list of its states, contiguous, of its shape and on its device. Float32; b and m may be bfloat16
            (all of them), whose new values are rounded stochastically while theta takes the unrounded ones.
        seed, streams, masks, scales, offsets, kind, rounding, backend: as in `perturb_`.
        squares: of "adam_history" q_k for each term, as the coefficients.

    Raises:
        TypeError, ValueError: an argument is wrong; names it, its value and the remedy. Nothing has been changed. A host number that is
            not finite is an error; one in a tensor skips the pass.
        RuntimeError: the backend asked for is not available; says why.
    """
    checks.check_choice("rule", rule, RULES)
    checks.check_word("seed", seed, 64)
    checks.check_choice("kind", kind, checks.KINDS)
    checks.check_choice("rounding", rounding, checks.ROUNDINGS)
    checks.check_list(params)
    tags, coefs = make_terms(terms)
    check_single(rule, coefs)
    given = check_numbers(rule, numbers)
    q = check_squares(rule, squares, coefs)
    kept = check_states(rule, states, params)
    read = {"terms: the tags": tags, "terms: the coefficients": coefs, "numbers": given, "squares": q}
    plans = make_plans(
        params, streams, masks=masks, scales=scales, offsets=offsets,
        read=[(name, x) for name, x in read.items() if isinstance(x, Tensor)],
        written=[(f"states[{k}][{j}]", s) for k, own in enumerate(kept) for j, s in enumerate(own)],
    )  # fmt: skip
    p = RulePass(seed, tags, coefs, kind, rounding, rule, given, q)
    plans = [plan.part([k for k, e in enumerate(plan.entries) if e.src.numel()]) for plan in plans]
    own = [[kept[i] for i in plan.members] for plan in plans]
    for plan, of_plan in zip(plans, own, strict=True):
        check_plan(plan, of_plan, p)
        backends.pick(plan.device, backend)
    run_rule(plans, own, p, backend)
