"""The methods of `zo-finetune --method`: a name, a constructor, the papers' hyperparameters, the price of a step.

Belongs here: names, presets with the source of each number, a method's own options, forward passes. Does not belong here: what a step computes
(zo_kernels), a run's other options (config.py), how text is read (values.py). Nothing here loads torch before a method is made: `--help` answers
at once.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zo_finetune.errors import UserError, did_you_mean
from zo_finetune.values import parse, written

FREE = "scale_free"  # the option, and the library's argument
PEFTS = ("none", "lora", "ln", "prefix", "prompt")
QZO_CLIP = 100.0  # of public code


@dataclass(frozen=True)
class Preset:
    """The hyperparameters of one method for one kind of tuning, and where each comes from. `eps`: None where nothing is perturbed; `options`: the
    method's own, as text."""

    lr: float
    eps: float | None
    source: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A method with all its numbers, those of a run and, where the run leaves them to the method, those of its preset. `options`: complete."""

    method: Method
    lr: float
    eps: float | None
    options: Mapping[str, Any]

    def forwards(self, steps: int) -> int:
        return self.method.forwards(self.options, steps)

    def steps(self, forwards: int) -> int:
        return self.method.steps(self.options, forwards)

    def make(self, model: Any, **more: Any) -> Any:
        """The optimizer; raises what the library raises."""
        perturbed = {} if self.eps is None else {"eps": self.eps}
        own = dict(self.options)
        if own.pop(FREE, False):
            import zo_kernels

            more[FREE] = zo_kernels.ScaleFree()
        return self.method.function()(model, self.lr, **perturbed, **own, **more)


@dataclass(frozen=True)
class Method:
    """One method. `constructor`: a name in zo_kernels, or a function of this file. `cost`: forward passes of the first so many steps, from the
    method's complete options; what else a step does costs none."""

    name: str
    summary: str
    constructor: str | Callable[..., Any]
    presets: Mapping[str, Preset]
    cost: Callable[[Mapping[str, Any], int], int]
    cost_note: str
    no_journal: str = ""  # why there is none
    options_note: str = ""
    derivatives: Callable[[Mapping[str, Any]], bool] = lambda options: (
        False
    )  # of the loss, besides first-order methods; by complete options
    first_order: bool = False  # backpropagation alone: nothing is perturbed
    scales: bool = (
        True  # with the loss, unless its option `FREE` says so: then lr is how far a step moves a weight along one direction
    )
    packed: bool = False  # trains the scales of packed weights, and nothing else
    looks: bool = False  # at the inputs of the matrices over the training rows, before the first step; its options say for what

    def preset(self, peft: str) -> Preset:
        """The hyperparameters for a kind of tuning. Where no source has any, MeZO's for that kind, times what the method's learning rate for
        full tuning is of MeZO's."""
        if peft in self.presets:
            return self.presets[peft]
        base, full, ours = MEZO[peft], MEZO["none"], self.presets["none"]
        lr = float(f"{base.lr * ours.lr / full.lr:.3g}")
        return Preset(lr, base.eps, f"ours: MeZO's for {peft}, times {ours.lr / full.lr:g} as for full tuning", ours.options)

    def function(self) -> Callable[..., Any]:
        if callable(self.constructor):
            return self.constructor
        import zo_kernels

        made: Callable[..., Any] = getattr(zo_kernels, self.constructor)
        return made

    def parameters(self) -> dict[str, tuple[Any, Any]]:
        """(type, default) of each option of its own."""
        own = _own_parameters(self.function())
        return {**own, FREE: (bool, False)} if self.scales and not self.first_order else own

    def options(self, given: Mapping[str, str], peft: str = "none") -> dict[str, Any]:
        """All options of its own: those given, those of the preset, the constructor's defaults.

        Raises:
            UserError: an option that the method has not, or a value of another type; names it and the remedy.
        """
        known = self.parameters()
        values = {name: default for name, (_, default) in known.items()}
        for name, text in {**self.preset(peft).options, **given}.items():
            if name not in known:
                raise UserError(
                    f"--option {name}={text}: --method {self.name} has no option {name!r}: it has {', '.join(known)}{did_you_mean(name, known)}"
                )
            values[name] = parse(f"--option {name}={text}", text, known[name][0])
        return values

    def differentiates(self, options: Mapping[str, Any]) -> bool:
        """Whether a step takes derivatives of the loss, forwards or backwards. `options`: complete."""
        return self.first_order or self.derivatives(options)

    def forwards(self, options: Mapping[str, Any], steps: int) -> int:
        """Forward passes of so many steps, each over a step's whole batch, evaluations not counted. A pass that carries tangents counts as two,
        a backward pass as two. `options`: complete."""
        return self.cost(options, steps)

    def steps(self, options: Mapping[str, Any], forwards: int) -> int:
        """The most steps that so many forward passes pay for."""
        low, high = 0, forwards
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.forwards(options, middle) <= forwards else (low, middle - 1)
        return low

    def recipe(self, peft: str, given: Mapping[str, str], lr: float | None = None, eps: float | None = None) -> Recipe:
        """For one run; `given`: options of its own, as text. Raises UserError as `options` does, and where a learning rate has to be given."""
        preset, options = self.preset(peft), self.options(given, peft)
        if lr is None and options.get(FREE):
            if peft not in MOVEMENTS:
                raise UserError(
                    f"--option {FREE}=true with --peft {peft}: lr is how far a step moves a weight then, and there is no measured one: give --lr"
                )
            lr = MOVEMENTS[peft].lr
        return Recipe(self, preset.lr if lr is None else lr, preset.eps if eps is None else eps, options)


@functools.cache
def _own_parameters(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    inside = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    hints = typing.get_type_hints(inside)
    return {
        name: (hints[name], p.default)
        for name, p in inspect.signature(inside).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
        and name not in ("factors", "perturbation", "clip")  # of a run, not the method's own
    }


# ---- constructors that the library has no name for ------------------------------------------------------------------------


def random_sparse(
    model: Any, lr: float, eps: float = 1e-3, *, keep: float = 0.1, every: int = 1, queries: int = 1, **more: Any
) -> Any:
    """Each weight takes part with probability `keep`; a new mask every `every` steps."""
    import zo_kernels as zk

    return zk.MeZOStep(model, lr, eps, queries=queries, direction=zk.RandomSparse(keep, every), **more)


def layer_scale(
    model: Any,
    lr: float,
    eps: float = 1e-3,
    *,
    by: str = "rms",
    estimate: str = "variance",
    every: int = 100,
    beta: float = 0.9,
    queries: int = 1,
    **more: Any,
) -> Any:
    """z of each parameter divided by the root mean square of its weights, or of its gradient."""
    import zo_kernels as zk

    return zk.MeZOStep(model, lr, eps, queries=queries, direction=zk.LayerScale(by, estimate, every, beta), **more)


def mezo_inputs(
    model: Any,
    lr: float,
    eps: float = 1e-3,
    *,
    rank: int = 64,
    power: float = -0.5,
    ridge: float = 0.1,
    matrices: str = "",
    others: str = "still",
    queries: int = 1,
    one_sided: bool = False,
    factors: Any = None,
    **more: Any,
) -> Any:
    """MeZO in the space of each matrix's inputs, whose `factors` were made with rank, power, ridge and matrices."""
    import zo_kernels as zk

    return zk.MeZOStep(model, lr, eps, queries=queries, one_sided=one_sided, **_within(factors, others), **more)


def fzoo_inputs(
    model: Any,
    lr: float,
    eps: float = 1e-3,
    *,
    rank: int = 64,
    power: float = -0.5,
    ridge: float = 0.1,
    matrices: str = "",
    others: str = "still",
    queries: int = 8,
    factors: Any = None,
    **more: Any,
) -> Any:
    """FZOO in the space of each matrix's inputs."""
    import zo_kernels as zk

    return zk.FZOO(model, lr, eps, queries=queries, **_within(factors, others), **more)


def _within(factors: Any, others: str) -> dict[str, Any]:
    import zo_kernels as zk

    return {} if factors is None else {"direction": zk.InputSubspace(factors, others)}


def qzo(
    model: Any,
    lr: float,
    eps: float = 1e-3,
    *,
    queries: int = 1,
    one_sided: bool = False,
    perturbation: str = "auto",
    clip: float | None = None,
    **more: Any,
) -> Any:
    """MeZO on the scales of packed weights, whose codes stay, with |g| clipped (Shang et al. 2025, arXiv 2505.13430). eps and lr are of what they make of the
    largest weight of a block, in every format."""
    import zo_kernels as zk
    from zo_kernels.quantized import largest_codes

    scales, codes = zk.quantized_scales(model), largest_codes(model)
    group = {"params": scales, "scale": {name: 1 / codes[name] for name, _ in scales}}
    return zk.MeZOStep(
        [group],
        lr,
        eps,
        queries=queries,
        one_sided=one_sided,
        model=model,
        # A copy of the scales around each forward is what scratch would be.
        perturbation="inplace" if perturbation == "auto" else perturbation,
        clip=QZO_CLIP if clip is None else clip,
        **more,
    )


def hybrid(
    model: Any,
    lr: float,
    eps: float = 1e-3,
    *,
    first_order: str = "adamw",
    first_order_lr: float = 1e-5,
    first_order_params: str = "last-layer",
    **more: Any,
) -> Any:
    """Forwards alone for most parameters, backpropagation for those that `first_order_params` names: a regular expression that matches a part of
    a parameter's name, or "last-layer": the block with the highest number, behind which backpropagation ends. The head is not the default:
    where it is tied to the input embedding, its gradient needs a backward pass through the whole model."""
    import zo_kernels as zk
    from zo_finetune.first_order import KINDS
    from zo_kernels.patterns import Patterns

    if first_order not in KINDS:
        raise UserError(f"--option first_order={first_order}: must be one of {', '.join(KINDS)}")
    if not 0 <= first_order_lr < math.inf:
        raise UserError(f"--option first_order_lr={first_order_lr}: must be finite and at least 0")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if first_order_params == "last-layer":
        numbers = {name: int(found[1]) for name, _ in named if (found := re.search(r"(?:^|\.)(\d+)\.", name))}
        if not numbers:
            raise UserError(
                "--option first_order_params=last-layer: no trained parameter has a layer's number in its name; give a regular expression of names"
            )
        chosen = [p for name, p in named if numbers.get(name) == max(numbers.values())]
    else:
        try:
            pattern = Patterns("--option first_order_params", [first_order_params])
            chosen = [p for name, p in named if pattern.first(name) is not None]
        except ValueError as error:
            raise UserError(str(error)) from None
        if not chosen:
            raise UserError(
                f"--option first_order_params={first_order_params}: matches no trained parameter, such as {named[0][0]}: give another expression"
            )
    return zk.HybridZO(model, lr, eps, first_order=KINDS[first_order](chosen, lr=first_order_lr), **more)


def sgd(model: Any, lr: float, *, momentum: float = 0.0, **more: Any) -> Any:
    """torch.optim.SGD by backpropagation."""
    return _first_order(model, "sgd", lr, momentum=momentum, **more)


def adam(model: Any, lr: float, *, betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, **more: Any) -> Any:
    """torch.optim.Adam by backpropagation."""
    return _first_order(model, "adam", lr, betas=betas, eps=adam_eps, **more)


def adamw(model: Any, lr: float, *, betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, **more: Any) -> Any:
    """torch.optim.AdamW by backpropagation."""
    return _first_order(model, "adamw", lr, betas=betas, eps=adam_eps, **more)


def _first_order(model: Any, kind: str, lr: float, **more: Any) -> Any:
    from zo_finetune.first_order import FirstOrder

    return FirstOrder(model, kind, lr, **more)


# ---- the registry ---------------------------------------------------------------------------------------------------------

_OPT = "MeZO (arXiv 2305.17333), appendix E, OPT"
MEZO: Mapping[str, Preset] = {
    "none": Preset(1e-6, 1e-3, f"{_OPT}: lr 1e-6 or 1e-7, eps 1e-3"),
    "lora": Preset(1e-4, 1e-2, f"{_OPT}: lr 1e-4 or 5e-5, eps 1e-2"),
    "prefix": Preset(1e-2, 1e-1, f"{_OPT}: lr 1e-2 or 1e-3, eps 1e-1"),
    "prompt": Preset(1e-2, 1e-1, "ours: as prefix, since both are five tokens' worth of activations"),
    "ln": Preset(3e-4, 5e-3, "ours: found on SmolLM2-135M, see demo.py"),
}
MOVEMENTS: Mapping[str, Preset] = {  # of methods whose option `FREE` is on, whatever the model
    "none": Preset(
        5e-5,
        None,
        "ours: over 20,000 steps the walk that lowered the loss of two models, see docs/learning.md; of n steps sqrt(20000 / n) times that",
    ),
}
_BENCH = "ZO-LLM benchmark (arXiv 2402.11592), public sweep SST2_opt-1.3b"
_FT = "MeZO (arXiv 2305.17333), its fine-tuning with Adam"
_ADAM = {
    "none": Preset(1e-5, None, f"{_FT}: lr 1e-5 of 1e-5, 5e-5, 8e-5"),
    "lora": Preset(1e-4, None, f"{_FT}, README of its code: LoRA lr 1e-4"),
    "prefix": Preset(1e-2, None, f"{_FT}, README of its code: prefix lr 1e-2"),
    "prompt": Preset(1e-2, None, f"{_BENCH}, its reference run of prompt tuning with Adam: lr 1e-2"),
    "ln": Preset(1e-4, None, "ours: LoRA's"),
}
_SGD = {
    "none": Preset(1e-5, None, f"{_BENCH}, sgd: lr of the grid 1e-3 to 1e-7 the middle one"),
    "lora": Preset(1e-4, None, f"{_BENCH}, sgd: lr of the grid 1e-2 to 1e-6 the middle one"),
    "prefix": Preset(1e-4, None, "ours: LoRA's; the public sweep has none"),
    "prompt": Preset(1e-6, None, f"{_BENCH}, sgd: lr of the grid 1e-4 to 1e-8 the middle one"),
    "ln": Preset(1e-4, None, "ours: LoRA's"),
}


def _sides(options: Mapping[str, Any], steps: int) -> int:
    q = options["queries"]
    return steps * (1 + q if options.get("one_sided") else 2 * q)


def _flat(forwards: int) -> Callable[[Mapping[str, Any], int], int]:
    return lambda options, steps: steps * forwards


def _projected(options: Mapping[str, Any], steps: int) -> int:
    inner = 2 if options["learn"] == "forward" else 3
    return 2 * steps + steps // options["every"] * options["inner"] * inner


_SIDES = "2 queries, or 1 + queries where one_sided"
_BACKWARD = "3: one, and its backward counted as two"
_LOOK = "power: -0.5 whitens, 0 and 0.5 take principal components; matrices: a regular expression of names, or all that are trained; others: still or dense"
_NO_SCALARS = "gradients by backpropagation are no record of scalars"

METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method("mezo", "zeroth-order SGD along Gaussian directions (ZO-SGD)", "MeZOStep", MEZO, _sides, _SIDES),
        Method(
            "sign",
            "only the sign of the projected gradient (ZO-SGD-Sign)",
            "ZOSignSGD",
            {"none": Preset(1e-6, 1e-3, f"{_BENCH}: lr of the grid 1e-4, 1e-6, 1e-8 the middle one; eps of 1e-3, 1e-5")},
            _sides,
            _SIDES,
            scales=False,
        ),
        Method(
            "momentum",
            "heavy-ball momentum, stored or recomputed from the last records (ZO-SGD-MMT)",
            "ZOMomentum",
            {"none": Preset(1e-7, 1e-3, f"{_BENCH}: beta 0.9, lr of the grid 1e-5 to 1e-8, eps of 1e-3 to 1e-5; we took MeZO's lr times 1 - beta")},
            _sides,
            _SIDES,
        ),
        Method(
            "zo-adam",
            "Adam on the estimate, stored or recomputed (ZO-AdaMM, ZO-Adam)",
            "ZOAdam",
            {"none": Preset(1e-6, 1e-3, f"{_BENCH}: lr of the grid 1e-4 to 1e-8 the middle one, eps of 1e-3 to 1e-5; betas and eps torch's")},
            _sides,
            _SIDES,
        ),
        Method(
            "conservative",
            "the best of staying, the step and its opposite (ZO-SGD-Cons)",
            "ZOConservative",
            {"none": Preset(1e-6, 1e-3, f"{_BENCH}: lr of the grid 1e-5 to 1e-8, eps of 1e-2 to 1e-4; we took MeZO's")},
            _flat(5),
            "5: two for g, three candidates",
        ),
        Method(
            "forward-grad",
            "the exact projection, by forward-mode differentiation; no eps",
            "ForwardGrad",
            {"none": Preset(5e-7, 1e-3, f"{_BENCH}: lr marked the best of the grid 1e-5 to 1e-8; eps is not used")},
            _flat(2),
            "2: one pass that carries tangents, which costs as much as two",
            derivatives=lambda o: True,
        ),
        Method(
            "hybrid",
            "backpropagation for a few parameters, forwards for the rest",
            hybrid,
            {"none": Preset(1e-6, 1e-3, "ours: arXiv 2402.11592 gives no numbers for its hybrid; MeZO's, and 1e-5 for AdamW")},
            _flat(5),
            "5: two for g, one with a graph, and its backward counted as two",
            no_journal=_NO_SCALARS,
            options_note="first_order: sgd, adam or adamw; first_order_params: a regular expression of names, or last-layer",
            derivatives=lambda o: True,
        ),
        Method(
            "blockwise",
            "one block of parameters in a step",
            "BlockwiseZO",
            {"none": Preset(1e-6, 1e-3, "ours: MeZO's; the public code of arXiv 2402.11592 has an example with lr 1e-8, eps 1e-3 and no recommendation")},
            _flat(2),
            "2",
            options_note="by: layer, or regular expressions of names",
        ),
        Method(
            "sparse",
            "only the small weights take part (Sparse-MeZO)",
            "SparseMeZO",
            {"none": Preset(1e-6, 1e-3, "Sparse MeZO (arXiv 2402.15751): sparsity 75 %, that is quantile 0.25; lr and eps ours: MeZO's", {"quantile": "0.25"})},
            _flat(2),
            "2",
        ),
        Method(
            "random-sparse",
            "a random share of the weights takes part, drawn anew every few steps",
            random_sparse,
            {"none": Preset(1e-6, 1e-3, f"{_BENCH}: lr 1e-6, eps 1e-3, sparsity 0.1 to 0.9, a new mask every 1 to 20,000 steps; we took keep 0.1, every 1")},
            _sides,
            "2 queries",
        ),
        Method(
            "layer-scale",
            "directions scaled by each parameter's weights or gradient (MeZO, appendix B)",
            layer_scale,
            {"none": Preset(1e-6, 1e-3, "ours: MeZO's; scales are relative to their mean over the parameters, so that lr and eps keep their meaning")},
            lambda o, n: n * (2 * o["queries"] + (2 if o["by"] == "gradient" else 0)),
            "2 queries, and 2 more where by=gradient",
            options_note="by: rms or gradient; estimate: variance or expectation",
        ),
        Method(
            "hizoo",
            "preconditioned by a running diagonal of the Hessian",
            "HiZOO",
            {
                "none": Preset(1e-6, 1e-3, "HiZOO (arXiv 2402.15173), README of its code, OPT-13B: lr 1e-6, eps 1e-3, alpha 1e-8", {"alpha": "1e-8"}),
                "lora": Preset(1e-5, 1e-2, "HiZOO, README of its code's large_models, LoRA: lr 1e-5, eps 1e-2, alpha 1e-6", {"alpha": "1e-6"}),
                "prefix": Preset(1e-2, 1e-1, "HiZOO, README of its code's large_models, prefix: lr 1e-2, eps 1e-1, alpha 1e-10", {"alpha": "1e-10"}),
            },
            _flat(3),
            "3",
            scales=False,
        ),
        Method(
            "dizo",
            "MeZO with learned projections of some layers",
            "DiZO",
            {
                "none": Preset(
                    1e-6,
                    1e-3,
                    "DiZO (arXiv 2502.03304), its code: lr 1e-6 or 1e-7, eps 1e-3, every 50, inner eps 0.1, clip 0.2; inner steps and their lr ours, "
                    "in units of the distance moved",
                    {"every": "50", "inner_eps": "0.1", "tau": "0.2"},
                )
            },
            _projected,
            "2, and 2 inner more at the end of every `every`-th step, 3 inner with learn=backpropagation",
            options_note="layers: regular expressions of names; learn: forward or backpropagation",
            derivatives=lambda o: o["learn"] == "backpropagation",
        ),
        Method(
            "lozo",
            "directions of low rank, with momentum (LOZO-M) where the option says so",
            "LOZO",
            {
                "none": Preset(
                    2e-7,
                    1e-3,
                    "LOZO (arXiv 2410.07698), README of its code, OPT-13B: lr 1e-6 or 1e-7, eps 1e-3, rank 1 or 2, nu 50 or 100; example 1e-7, 2, 50. Its "
                    "code leaves out the paper's 1 / rank: times the rank here",
                    {"rank": "2", "every": "50"},
                )
            },
            _flat(2),
            "2",
        ),
        Method(
            "fzoo",
            "one-sided Rademacher queries, normalised by the losses' standard deviation",
            "FZOO",
            {
                "none": Preset(
                    5e-9,
                    1e-4,
                    "FZOO (arXiv 2506.09034), README of its code, OPT-13B: lr 5e-5, eps 1e-4, N 8. Its code leaves out the paper's 1 / eps: times eps here",
                    {"queries": "8"},
                )
            },
            lambda o, n: n * (1 + o["queries"]),
            "1 + queries",
            scales=False,
        ),
        Method(
            "mezo-inputs",
            "two-sided queries in the space of each matrix's inputs over the training rows; other parameters stay",
            mezo_inputs,
            {"none": Preset(1e-5, 1e-3, "ours: MeZO's, lr times 10: for two small models the dev rows chose 12 times MeZO's or more, benchmarks/ranking.py")},
            _sides,
            _SIDES,
            options_note=_LOOK,
            looks=True,
        ),
        Method(
            "fzoo-inputs",
            "FZOO's one-sided queries in the space of each matrix's inputs; other parameters stay",
            fzoo_inputs,
            {"none": Preset(1.25e-8, 1e-4, "ours: FZOO's, lr times 2.5: for two small models the dev rows chose 2 and 3 times FZOO's, benchmarks/choices.py")},
            lambda o, n: n * (1 + o["queries"]),
            "1 + queries",
            options_note=_LOOK,
            looks=True,
            scales=False,
        ),
        Method(
            "qzo",
            "MeZO on the scales of a base that --quantize packed; codes stay, |g| is clipped (QZO)",
            qzo,
            {"none": Preset(1e-6, 1e-3, "ours: MeZO's, a first guess, not yet measured; clip 100 as public code")},
            _sides,
            _SIDES,
            options_note=f"|g| is clipped at {QZO_CLIP:g} where --clip says nothing; eps and lr are of the largest weight of a block",
            packed=True,
        ),
        Method("sgd", "first-order SGD, by backpropagation (FO-SGD)", sgd, _SGD, _flat(3), _BACKWARD, _NO_SCALARS, first_order=True),
        Method("adam", "first-order Adam, by backpropagation (fine-tuning, FT)", adam, _ADAM, _flat(3), _BACKWARD, _NO_SCALARS, first_order=True),
        Method("adamw", "first-order AdamW: Adam, its weight decay decoupled", adamw, _ADAM, _flat(3), _BACKWARD, _NO_SCALARS, first_order=True),
    )
}  # fmt: skip


def get(name: str) -> Method:
    """Raises UserError where there is none of that name."""
    if name not in METHODS:
        raise UserError(f"--method {name!r} must be one of {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    return METHODS[name]


def listing() -> str:
    """What `--list-methods` prints."""
    lines = []
    for m in METHODS.values():
        lines.append(f"{m.name}: {m.summary}")
        lines.append(f"    forward passes a step: {m.cost_note}")
        options = ", ".join(f"{name}={written(default)}" for name, (_, default) in m.parameters().items())
        lines.append(f"    options: {options or 'none'}" + (f" ({m.options_note})" if m.options_note else ""))
        for peft in PEFTS if not m.packed else ("none",):
            p = m.preset(peft)
            own = "".join(f", {name}={text}" for name, text in p.options.items())
            eps = "" if p.eps is None else f", eps {p.eps:g}"
            lines.append(f"    --peft {peft}: lr {p.lr:g}{eps}{own} ({p.source})")
        if FREE in m.parameters():
            lines += [f"    --peft {peft}, {FREE}=true: lr {p.lr:g} ({p.source})" for peft, p in MOVEMENTS.items()]
        if m.no_journal:
            lines.append(f"    writes no journal, cannot be resumed or replayed: {m.no_journal}")
    return "\n".join(lines)
