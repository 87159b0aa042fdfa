"""What makes a step's numbers wrong without an error, and how it shows: in the losses, in the weights, in what a closure reads.

Belongs here: the findings as functions of losses and weights, their words, and `Warner`, which looks at a run's own steps and says each
once. Does not belong here: evaluations of their own (check.py), what is refused (step.py).

The `Warner` costs a comparison a step. It looks closely at the first steps alone; on a GPU later steps are looked at rarely, since every look
waits for the device.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zo_kernels import views
from zo_kernels.optim.refresh import Groups, active
from zo_kernels.views.reads import walk

FIRST = 4  # steps that are looked at closely
EQUAL = 100  # steps in a row whose losses are equal, before a word: accuracy over few examples may be equal for a while
SKIPPED = 10  # steps in a row that were skipped; at a run's start FIRST are enough
RARELY = 1000  # on a device, later steps between two looks
MEMBERS = 100  # steps between two looks for parameters that were unfrozen or added in a run
GRAINS = 8  # a difference of fewer grains is off by more than a twentieth (sqrt(1/6) of a grain, root mean square)
MOVES = 0.5  # of a tensor's elements have to move; with half of them the move's correlation with z is 0.9
MATTERS = 0.1  # share of the trained elements that may lie in tensors that do not move, before a step says so
SAMPLE = 64  # elements of each tensor

SIGNIFICANT = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # bits
_LEAST_EXPONENT = {torch.bfloat16: -125, torch.float16: -13, torch.float32: -125}  # of normal numbers, as frexp has it


class ZOWarning(UserWarning):
    """Something makes a run's numbers worth less than they look; the text says what, and what to do."""


class Words(NamedTuple):
    """A finding for people: what it is, and the remedy."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


def idle(count: int, size: int, table: str, how: str) -> Words:
    return Words(
        f"{count} of {size} workers make forwards of others again, and bring nothing: a table of {table} has no more parts for them ({how})",
        "Take fewer workers, more queries or micro-batches, or another cut (docs/parallel.md)",
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def names_of(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- the loss ---------------------------------------------------------------------------------------------------------


def grain(value: float, dtype: torch.dtype) -> float:
    """The distance of neighbouring numbers of this type near the value."""
    return math.ldexp(1.0, math.frexp(value)[1] - SIGNIFICANT[dtype])


def sixteen_bits(values: Sequence[float], kinds: Sequence[Any], model_has: bool) -> torch.dtype | None:
    """The 16-bit type that a closure's losses were rounded to at some point, also where they came as float32; None: no sign of it.

    A float32 number is a bfloat16 number by chance once in 2^16, a float16 number once in 2^13; but counts are, such as accuracies over 2^k
    examples. So nothing is said of fewer than four numbers, nor unless one uses the type's last bits. And where the model has no 16 bits
    (`model_has`), nothing of shares of 256 or fewer.

    Args:
        values: finite losses, one an evaluation. kinds: the dtype of each if it was a tensor, otherwise its Python type.
    """
    for kind in kinds:
        if isinstance(kind, torch.dtype) and kind in (torch.bfloat16, torch.float16):
            return kind
        if kind in (bool, int) or (isinstance(kind, torch.dtype) and not kind.is_floating_point):
            return None
    if len(values) < 4:
        return None
    if not model_has and all(0 <= v <= 1 and (v * 256).is_integer() for v in values):
        return None
    for dtype in (torch.bfloat16, torch.float16):
        scaled = [math.ldexp(math.frexp(v)[0], SIGNIFICANT[dtype]) for v in values]
        if all(s.is_integer() for s in scaled) and any(s % 4 for s in scaled):
            return dtype
    return None


def shares_of(values: Sequence[float]) -> int | None:
    """The least n <= 1024 of which all values are shares k / n in [0, 1], as accuracies over n examples are; None: there is none, or one value alone.

    Two float32 numbers of another kind in [0, 1] have such an n by chance once in a million times: n is theirs with a probability of about
    (n / 2^24)^2, and the sum of these is 1024^3 / (3 * 2^48).
    """
    distinct = set(values)
    if len(distinct) < 2 or not all(0 <= v <= 1 for v in distinct):  # NaN is not
        return None
    for n in range(1, 1025):
        if all(v in (share := round(v * n) / n, float(np.float32(share))) for v in distinct):
            return n
    return None


def coarse(dtype: torch.dtype, values: Sequence[float], spreads: Sequence[float], eps: float) -> Words | None:
    """Words about a loss whose grain is not fine enough for these differences L+ - L-; None where it is."""
    step = grain(statistics.median(abs(v) for v in values), dtype)
    size = math.sqrt(sum(s * s for s in spreads) / len(spreads))
    if size >= GRAINS * step:
        return None
    where = f"near {statistics.median(values):.4g} its values are {step:.2g} apart, and L(theta ± eps z) differ by {size:.2g} (root mean square)"
    if dtype == torch.float32:
        return Words(
            f"the loss is too coarse for these differences: {where}", "Take a larger eps, or a sum or mean over more examples"
        )
    return Words(
        f"the loss comes in 16 bits ({name_of(dtype)}; float() afterwards does not help): {where}, so that g is a multiple of {step / (2 * eps):.3g}, mostly 0",
        "Compute it in float32 from the logits: cross_entropy(logits.float().flatten(0, -2), labels.flatten())",
    )


# ---- the weights ------------------------------------------------------------------------------------------------------


def moved(params: Mapping[str, tuple[Tensor, float]], kind: str) -> dict[str, float]:
    """The share of each tensor's elements that a perturbation changes at all, after rounding to the tensor's type.

    An element w moves where |c z| is beyond half the distance to its neighbour, which below a power of two is half of that above it. The share is
    worked out for the distribution of z over up to SAMPLE elements a tensor; nothing is drawn.

    Args:
        params: name -> (weight, c), c the standard deviation of the perturbation: eps, times a scale if there is one.
        kind: "gaussian" or "rademacher".
    """
    shares: dict[str, float] = {}
    batches: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor, float]]] = {}
    for name, (p, c) in params.items():
        if p.numel():
            batches.setdefault((p.device, p.dtype), []).append((name, p.detach(), c))
    for (device, dtype), members in batches.items():
        sizes = [min(p.numel(), SAMPLE) for _, p, _ in members]
        # Copies: of an offloaded model not all are there at once.
        parts = [p.as_strided((n,), (p.numel() // n,)).clone() for (_, p, _), n in zip(members, sizes, strict=True)]
        counts = torch.tensor(sizes)
        size = torch.tensor([c for *_, c in members], dtype=torch.float64).repeat_interleave(counts).to(device)
        mantissa, exponent = torch.frexp(torch.cat(parts).double())
        up = torch.ldexp(torch.ones_like(size), exponent.clamp(min=_LEAST_EXPONENT[dtype]) - SIGNIFICANT[dtype] - 1) / size
        up = torch.where(mantissa == 0, 0.0, up)
        down = torch.where(mantissa.abs() == 0.5, up / 2, up)
        if kind == "gaussian":
            moves = (torch.erfc(up / math.sqrt(2)) + torch.erfc(down / math.sqrt(2))) / 2
        else:
            moves = ((up < 1).double() + (down < 1).double()) / 2
        ends = torch.cat([moves.new_zeros(1), moves.cumsum(0)]).cpu()[torch.cat([counts.new_zeros(1), counts.cumsum(0)])]
        shares |= dict(zip([n for n, *_ in members], (ends.diff() / counts).tolist(), strict=True))
    return shares


def enough(p: Tensor) -> float:
    """An eps at which four fifths of a tensor's elements move, about: twice the distance of neighbours at the middle of its magnitudes."""
    middle = float(p.detach().abs().double().median()) if p.numel() else 0.0
    return 2 * grain(middle, p.dtype) if middle else 0.0


def swallowed(shares: Mapping[str, float], params: Mapping[str, Tensor]) -> tuple[list[str], float]:
    """The tensors that do not move, those that move least first, and their part of all elements."""
    still = sorted((n for n, share in shares.items() if share < MOVES), key=lambda n: (shares[n], n))
    return still, sum(params[n].numel() for n in still) / max(1, sum(p.numel() for p in params.values()))


def stiff(still: Sequence[str], shares: Mapping[str, float], params: Mapping[str, Tensor], eps: float) -> Words:
    """Words about tensors that swallow eps z."""
    least, p = shares[still[0]], params[still[0]]
    return Words(
        f"{len(still)} trained tensors in {name_of(p.dtype)} swallow the perturbation ({eps:g} z changes {least:.2g} of the elements of {still[0]}): "
        f"{names_of(still)}",
        f"Train them in float32, give their group a larger eps (from {enough(p):.2g} on most elements move), or freeze them (requires_grad_(False))",
    )


# ---- what a closure reads ---------------------------------------------------------------------------------------------


class ClosureReads(TorchDispatchMode):
    """Notes which parameters the operations inside it read, as they stand. A write to one is refused before it happens.

    `buffers`: those of at most SMALL bytes that an operation receives, and any that one says to write to, are copied first.
    """

    SMALL = 1 << 20

    def __init__(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.read: set[str] = set()
        self.copies: dict[str, Tensor] = {}
        known = [(n, t, False) for n, t in params.items()] + [(n, t, True) for n, t in (buffers or {}).items()]
        self.owners = views.Owners((t, (name, t, buffer)) for name, t, buffer in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:
            changed = {id(t) for t in views.written(func, args, kwargs)}
            for t in walk((args, kwargs)):
                for name, known, buffer in self.owners.of(t):
                    if views.there(known):
                        self._note(name, known, buffer, id(t) in changed)
        return func(*args, **kwargs)

    def _note(self, name: str, t: Tensor, buffer: bool, written: bool) -> None:
        if not buffer:
            if written:
                raise views.changed(name, "written to")
            self.read.add(name)
        elif name not in self.copies and (written or t.nbytes <= self.SMALL):
            self.copies[name] = t.detach().clone()


def nobodys(names: Sequence[str]) -> Words:
    return Words(
        f"{len(names)} trainable parameters of the model are not in this optimizer and nothing trains them ({names_of(names)}): they were unfrozen or added "
        "after it was made",
        "Make a new optimizer, or add_param_group(); freeze them if they are not to be trained",
    )


FROZEN = Words(
    "all parameters of this optimizer are frozen: nothing is trained",
    "Unfreeze them, or make a new optimizer of what is trainable now (another adapter?)",
)
UNREAD = Words(
    "the closure reads nothing of what is trained: the steps have no effect on its loss",
    "It runs another model object, an inactive or merged adapter, or returns a number that was computed before: evaluate the module that the optimizer has, "
    "inside the closure",
)


# ---- a run's own steps ------------------------------------------------------------------------------------------------


class Warner:
    """Looks at the steps of one optimizer, and has words for the user, each once. Costs no evaluation; raises nothing.

    Args:
        model: whose forwards the closure runs; None: not known. first_order: trains other parameters of it. kind: of the directions.
        whole: every parameter of the model was the optimizer's to take.
    """

    def __init__(self, model: nn.Module | None, first_order: torch.optim.Optimizer | None, kind: str, whole: bool) -> None:
        self.model, self.first_order, self.kind, self.whole = model, first_order, kind, whole
        self.steps = 0  # that it was told of
        self.equal = self.skipped = 0  # in a row
        self.good = False  # a step had a gradient that is finite and not 0
        self.membership = True  # parameters may have come or gone
        self.suspicious = False  # the next step's forwards are to be watched
        self.said: set[str] = set()
        self.words: list[str] = []
        self.noted: tuple[Any, Any, Any] | None = None  # of this step: its losses, g, and whether all is finite
        self.heard: list[tuple[Tensor | float, Any]] = []  # this step's losses, and what they came as
        self.losses: list[float] = []
        self.kinds: list[Any] = []
        self.spreads: list[float] = []
        self.reads: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def say(self, what: str, words: Words) -> None:
        if what not in self.said:
            self.said.add(what)
            self.words.append(str(words))

    def __getstate__(self) -> dict[str, Any]:
        """A copy's weights lie elsewhere."""
        return {**self.__dict__, "heard": [], "noted": None, "reads": contextlib.nullcontext()}

    def begin(self, params: Mapping[str, Tensor]) -> None:
        """The forwards of a step of these parameters come now."""
        self.heard, self.noted = [], None
        self.reads = ClosureReads(params) if self.suspicious else contextlib.nullcontext()

    def hearing(self, as_loss: Callable[[Any], Tensor | float]) -> Callable[[Any], Tensor | float]:
        """`as_loss`, and a note of what it is given while the steps are looked at closely."""
        if self.steps >= FIRST:
            return as_loss

        def heard(value: Any) -> Tensor | float:
            loss = as_loss(value)
            first = loss.reshape(-1)[0] if isinstance(loss, Tensor) else loss
            self.heard.append((first, value.dtype if isinstance(value, Tensor) else type(value)))
            return loss

        return heard

    def heard_of_all(self, since: int, losses: Sequence[Tensor | float]) -> None:
        """In place of what this one of several workers has heard since then: the losses of all, as what this one's came as."""
        if own := self.heard[since:]:
            self.heard[since:] = [(x.reshape(-1)[0] if isinstance(x, Tensor) else x, own[0][1]) for x in losses]

    def note(self, losses: Sequence[Tensor] | Tensor, gradient: Any, finite: Any) -> None:
        """What a step has found: its losses, one a point, g, and whether all is finite (None: g alone tells). On a device: tensors, which nobody waits
        for here."""
        self.noted = losses, gradient, finite

    def look(self, groups: Groups, view: views.View) -> list[str]:
        """When the step of these parameter groups is done; what is to be said now."""
        if self.noted is None:
            return []
        (losses, gradient, finite), self.noted = self.noted, None
        number = self.steps
        self.steps += 1
        if number >= FIRST and isinstance(gradient, Tensor) and number % RARELY and not (self.equal or self.skipped):
            return []
        self.membership |= not self.steps % MEMBERS
        g = float(gradient)
        go = math.isfinite(g) if finite is None else bool(finite)
        if go and g:
            self.equal = self.skipped = 0
            self.good = True
            if number >= FIRST and not self.membership:
                return []
        else:
            self._count(losses, go)
        if self.membership:
            self._members(groups)
        if number < FIRST:
            self._closely(number, groups, view, len(losses))
        if isinstance(self.reads, ClosureReads):
            if not self.reads.read and not self.good:
                self.say("unread", UNREAD)
            self.reads, self.suspicious = contextlib.nullcontext(), False
        elif self.equal == 2 and not self.good and view.served is None and active(groups):
            # The losses alone do not tell a loss that depends on nothing from a coarse one: see what the next step's forwards read.
            self.suspicious = True
        words, self.words = self.words, []
        return words

    def _count(self, losses: Sequence[Tensor] | Tensor, go: bool) -> None:
        rows = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
        found = rows.reshape(len(rows), -1)[:, 0].tolist()
        if go or (len(found) > 1 and math.isfinite(found[0]) and len(set(found)) == 1):
            self.equal, self.skipped = self.equal + 1, 0
        else:
            self.equal, self.skipped = 0, self.skipped + 1
        if self.equal == EQUAL and "unread" not in self.said:
            self.say(
                "equal",
                Words(
                    f"g was 0 in each of the last {EQUAL} steps, to the bit: they changed nothing but by weight decay",
                    "A measure that counts (accuracy) over few examples has equal losses: take more examples a step, or a larger eps. Otherwise "
                    "zk.check(step, closure, batches) finds the reason",
                ),
            )
        if self.skipped == SKIPPED or (self.skipped == FIRST == self.steps):
            self.say(
                "skipped",
                Words(
                    f"{self.skipped} steps in a row were skipped, since a loss or g was not finite (losses: {', '.join(f'{x:g}' for x in found[:2])}): "
                    "nothing is trained",
                    "A loss in float16 overflows at 65504, a mask may leave no token, lr or eps may be too large",
                ),
            )

    def _members(self, groups: Groups) -> None:
        self.membership = False
        if not active(groups):
            self.say("frozen", FROZEN)
        if names := self.unowned(groups):
            self.say("unowned", nobodys(names))

    def unowned(self, groups: Groups) -> list[str]:
        """The model's trainable parameters that neither optimizer has, where all were ours to take."""
        if self.model is None or not self.whole:
            return []
        theirs = self.first_order.param_groups if self.first_order is not None else ()
        owned = {id(p) for g in (*groups, *theirs) for p in g["params"]}
        return [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in owned]

    def _closely(self, number: int, groups: Groups, view: views.View, points: int) -> None:
        heard = [(float(loss), kind) for loss, kind in self.heard]
        self.heard = []
        self.losses += [v for v, _ in heard if math.isfinite(v)]
        self.kinds += [kind for _, kind in heard]
        calls = len(heard) // points
        columns = [[v for v, _ in heard[k::calls]] for k in range(calls)] if points > 1 and calls else []
        self.spreads += [max(c) - min(c) for c in columns if all(map(math.isfinite, c))]
        eps = float(groups[0]["eps"])
        if self.spreads and "coarse" not in self.said:
            dtype = sixteen_bits(self.losses, self.kinds, holds_sixteen(self.model, view.params.values()))
            if dtype and (words := coarse(dtype, self.losses, self.spreads, eps)):
                self.say("coarse", words)
        if number == 0:
            if view.served is not None and not view.served and active(groups):
                self.say("unread", UNREAD)
            if points > 1:
                self._stiffness(groups, view)
        if number == FIRST - 1:
            self.losses, self.kinds, self.spreads = [], [], []

    def _stiffness(self, groups: Groups, view: views.View) -> None:
        sixteen = {n: pc for n, pc in deviations(groups, view).items() if pc[0].dtype.itemsize == 2 or pc[1] < 1e-6}
        shares = moved(sixteen, self.kind)
        still, part = swallowed(shares, view.params)
        if still and part > MATTERS:
            self.say("stiff", stiff(still, shares, view.params, float(groups[0]["eps"])))


def holds_sixteen(model: nn.Module | None, trained: Iterable[Tensor]) -> bool:
    """Whether a loss may have come through 16 bits without the closure's own doing."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return True
    return any(p.dtype.itemsize == 2 for p in (*trained, *(model.parameters() if model is not None else ())))


def deviations(groups: Groups, view: views.View) -> dict[str, tuple[Tensor, float]]:
    """(weight, standard deviation of its perturbation) by name, of the parameters of a view; a scale with many values counts as 1."""
    found = {}
    for weights, group in zip(view.groups, groups, strict=True):
        for m in weights.members:
            value = m.scale if isinstance(m.scale, (int, float)) else 1.0
            if isinstance(m.scale, Tensor) and m.scale.numel() == 1:
                value = float(m.scale)
            found[m.name] = (m.tensor, abs(float(group["eps"]) * value) or float(group["eps"]))
    return found
