"""The space of a matrix's inputs, from forwards alone: which directions of its rows the data see.

Belongs here: one look at a model's linear layers while it runs, and the factors made of what came in. Does not belong here: what z is made of them
(factored.py), their file (journal/factors.py), which rows are run (the closure's business).

Of the inputs x of a matrix the second moment C = mean x x^T is summed; nothing is subtracted from x, since a row of the gradient is a sum of its inputs as they
are. With C = Q diag(l) Q^T and m the mean of all l, the factor has the `rank` columns

    V_k = s q_k (l_k + ridge m)^power,      l_1 >= l_2 >= ...,      s such that the mean over k of E (V_k . x)^2 is m,

which is E (u . x)^2 of a random unit vector u: eps and a learning rate move outputs by what they would along a random V of as many orthonormal columns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import checks
from zo_kernels.journal import InputFactors
from zo_kernels.parameters import canonical_name
from zo_kernels.patterns import Patterns

Only = Sequence[str] | Callable[[str], bool] | None
MOST_COLUMNS = 8192  # 512 MiB a matrix, and minutes for its eigenvectors


def _side(module: nn.Module) -> str | None:
    """Which factor of the module's weight its inputs give: "right" of one that is [outputs, inputs], "left" of one that is [inputs, outputs]."""
    if isinstance(module, nn.Linear):
        return "right"
    return "left" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None  # GPT-2's


class _Moment:
    """Of one matrix. `total`: the sum of x x^T, float64 in host memory; None: nothing came yet."""

    def __init__(self, name: str, side: str, columns: int) -> None:
        self.name, self.side, self.columns = name, side, columns
        self.total: Tensor | None = None
        self.count = 0


class _Look:
    """What the hooks of one pass share: layers side by side (query, key, value) are given the same tensor, whose product is made once."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, int] | None = None
        self.product = torch.empty(0)

    def __call__(self, moment: _Moment, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[-1] != moment.columns:
            raise TypeError(f"model: the layer of {moment.name!r} was given no tensor of [..., {moment.columns}] numbers")
        if self.last is None or self.last[0] is not x or self.last[1] != x._version:
            rows = x.detach().reshape(-1, moment.columns).double()
            self.last, self.product = (x, x._version), (rows.t() @ rows).cpu()
        moment.total = self.product.clone() if moment.total is None else moment.total.add_(self.product)
        moment.count += x.numel() // moment.columns


def _chosen(model: nn.Module, only: Only, limit: int) -> dict[int, tuple[_Moment, list[nn.Module]]]:
    """The matrices that are looked at, by their ids, and the layers that hold each."""
    if only is None or callable(only):
        wanted = only
    else:
        patterns = Patterns("only", only)

        def wanted(name: str) -> bool:
            return patterns.first(name) is not None

    names = {id(p): canonical_name(n) for n, p in model.named_parameters()}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    found: dict[int, tuple[_Moment, list[nn.Module]]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module._parameters, dict) else None
        if (side := _side(module)) is None or weight is None:
            continue
        name = names[id(weight)]
        if not (id(weight) in trained if wanted is None else wanted(name)):
            continue
        columns = weight.shape[side == "right"]
        if columns > limit:
            raise ValueError(
                f"parameter {name!r} has {columns} inputs, whose second moment takes {8 * columns**2:,} bytes: leave it out with only=, or raise limit={limit}"
            )
        moment, holders = found.setdefault(id(weight), (_Moment(name, side, columns), []))
        if moment.side != side:
            raise ValueError(
                f"parameter {name!r} is shared by layers that hold it as it is and transposed: leave it out with only="
            )
        holders.append(module)
    if not found:
        raise ValueError(
            f"only={only!r:.160}: no linear layer's weight {'is trained' if only is None else 'has such a name'}; they are "
            f"{', '.join(n for n in list(names.values())[:3])}, ..."
        )
    return found


@contextlib.contextmanager
def _hooked(found: Iterable[tuple[_Moment, list[nn.Module]]]) -> Iterator[None]:
    look, handles = _Look(), []

    def hook(moment: _Moment) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: look(moment, args[0] if args else next(iter(kwargs.values()), None))

    try:
        for moment, holders in found:
            handles += [module.register_forward_pre_hook(hook(moment), with_kwargs=True) for module in holders]
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_factors(
    model: nn.Module,
    closure: Callable[..., Any],
    batches: Iterable[Any],
    *,
    rank: int = 16,
    only: Only = None,
    power: float = -0.5,
    ridge: float = 0.1,
    limit: int = MOST_COLUMNS,
) -> InputFactors:
    """One factor of each chosen matrix from its inputs over these batches, for `InputSubspace`; no labels, no backpropagation.

    V_k = s q_k (l_k + ridge m)^power: q_k and l_k the leading eigenvectors and values of the inputs' second moment, m the mean of all its eigenvalues, s such
    that the mean squared input along them is m. Each q_k has the sign that makes its largest element positive. The same calls on the same machine give the
    same bits; another machine's may differ in the last ones, so that the factors are data: a journal has their digest.

    Args:
        model: whose linear layers (nn.Linear, and transformers' Conv1D) are looked at; as it is (call eval() where dropout shall not count).
        closure: runs the model; called with each of `batches`, without gradients. Padding that it runs counts as input.
        rank: columns of each factor, 1 .. 64, and no more than a matrix has inputs.
        only: regular expressions; the matrices with a name in which one occurs, trained or not; or a function that says so of a name, which is without
            the prefixes of wrappers. None: those that are trained.
        power: -0.5 whitens; 0 gives principal components of one length, as EVA (Paischer et al. 2024, arXiv 2410.07170) initialises adapters by; 0.5 weighs
            each by the root mean square of the inputs along it.
        ridge: of the mean eigenvalue, what keeps directions without inputs from being blown up, >= 0.
        limit: inputs of a matrix, at most. Memory while it runs: 8 bytes times the inputs squared for each matrix, in host memory; a `model` of many is done
            in parts, with `only`.

    Raises:
        TypeError, ValueError: names the argument, or the matrix: too many inputs, none that is run, too few for the rank, all zeros, no numbers, or shared in
            two ways.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= checks.MAX_RANK:
        raise ValueError(f"rank={rank!r} must be an integer in 1 .. {checks.MAX_RANK}")
    if not (isinstance(power, (int, float)) and abs(power) <= 1):
        raise ValueError(f"power={power!r} must be in -1 .. 1")
    if not (isinstance(ridge, (int, float)) and 0 <= ridge < math.inf):
        raise ValueError(f"ridge={ridge!r} must be finite and at least 0")
    found = _chosen(model, only, limit)
    with torch.no_grad(), _hooked(found.values()):
        for batch in batches:
            closure(batch)
    given: dict[str, dict[str, Tensor]] = {"right": {}, "left": {}}
    known: list[tuple[Tensor, Tensor]] = []  # of the matrices with the same inputs, which come one after another
    for moment, _ in found.values():
        if moment.total is None:
            raise ValueError(f"parameter {moment.name!r}: no forward ran its layer; leave it out with only=, or give other batches")
        same = next((v for total, v in known if torch.equal(total, moment.total)), None)
        factor = _factor(moment, rank, power, ridge) if same is None else same
        known = [*known, (moment.total, factor)][-3:]
        given[moment.side][moment.name] = factor
    return InputFactors(**given)


def _factor(moment: _Moment, rank: int, power: float, ridge: float) -> Tensor:
    """V of one matrix, float64 [inputs, rank]."""
    assert moment.total is not None
    if not moment.total.isfinite().all():
        raise ValueError(f"parameter {moment.name!r}: its inputs hold NaN or an infinity")
    if rank > moment.columns:
        raise ValueError(
            f"rank={rank}: parameter {moment.name!r} has {moment.columns} inputs: leave it out with only=, or give a lower rank"
        )
    values, vectors = torch.linalg.eigh(moment.total / moment.count)
    mean = float(values.clamp(min=0).mean())
    if not mean > 0:
        raise ValueError(f"parameter {moment.name!r}: all of its inputs are 0; leave it out with only=")
    top, q = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    largest = q.gather(0, q.abs().argmax(0, keepdim=True))
    weights = (top + ridge * mean).pow(power) if power else torch.ones_like(top)
    weights = torch.where(weights.isfinite(), weights, 0.0)  # without a ridge, where nothing comes in
    scale = math.sqrt(mean / float((weights.square() * top).mean()))
    return q * largest.sign() * (weights * scale)
