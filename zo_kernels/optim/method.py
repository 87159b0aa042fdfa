"""A method: the parts of a step as one frozen record, what makes sense together, and the layout of what a step records.

Belongs here: the registry of parts by the names that a journal has, refusals of combinations, a method's JSON, the layout of a record's numbers, the count of
forwards. Does not belong here: what a part computes (estimators.py, rules.py, directions.py, blocks.py, projection.py, clip.py, unit.py), the papers' names
for combinations (methods.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from zo_kernels import journal
from zo_kernels.optim import anchor as anchors
from zo_kernels.optim import blocks as blocking
from zo_kernels.optim import clip as clips
from zo_kernels.optim import directions, estimators, rules, unit
from zo_kernels.optim import projection as projections
from zo_kernels.views import Shift, Tag

PARTS: Mapping[str, Sequence[type[Any]]] = {
    "estimator": estimators.ESTIMATORS,
    "rule": rules.RULES,
    "direction": directions.DIRECTIONS,
    "blocks": (blocking.Blocks,),
    "projection": (projections.Projection,),
    "clip": (clips.QuantileClip,),
    "scale_free": (unit.ScaleFree,),
    "anchor": (anchors.Anchor,),
}
COUNTS = (
    "parameter"  # what a journal's rule counts, where there are blocks: earlier versions counted the run's steps, and wrote nothing
)


@dataclass(frozen=True)
class Method:
    """What a run does in each step, but for its numbers (lr, eps, weight decay).

    Attributes:
        layers: how many parameters the projection moves; 0 without one.

    A record's numbers, in each group: `own` of the rule, `decided - own` of what divides g, `measured - decided` of the projection, `terms - measured`
    of the direction; the last two in the first group, zeros in the others. Each number of a record stands for a tag, of which a step's directions have
    the first.
    """

    estimator: estimators.Estimator = field(default_factory=estimators.TwoSided)
    rule: rules.Rule = field(default_factory=rules.SGD)
    direction: directions.Direction = field(default_factory=directions.Dense)
    blocks: blocking.Blocks | None = None
    projection: projections.Projection | None = None
    clip: clips.FixedClip | clips.QuantileClip = field(default_factory=clips.FixedClip)
    kind: str = "gaussian"
    layers: int = 0
    scale_free: unit.ScaleFree | None = None
    anchor: anchors.Anchor | None = None

    # -- the layout of a record --

    @cached_property
    def own(self) -> int:
        return self.rule.size(self.estimator.directions)

    @cached_property
    def decided(self) -> int:
        return self.own + (self.scale_free.size if self.scale_free is not None else 0)

    @cached_property
    def measured(self) -> int:
        return self.decided + (self.projection.size(self.layers) if self.projection is not None else 0)

    @cached_property
    def terms(self) -> int:
        return self.measured + self.direction.size

    @cached_property
    def numbers(self) -> bool:
        """Whether its parts decide on numbers as they do on arrays: one direction, whose coefficients stay as they are decided."""
        return self.estimator.plain and not self.rule.tries and not self.rule.diagonal

    @cached_property
    def from_clean(self) -> bool:
        """Whether an update begins at the clean weights, and is not one pass with the way back to them: its rule says so, or several directions have their
        sum where the factors of the last one lie."""
        return self.rule.stateful or (self.direction.factored and self.estimator.directions > 1)

    def tags(self, tag: Tag) -> list[Tag]:
        """Of the directions of the step whose first tag this is."""
        return [tag + i if i else tag for i in range(self.estimator.directions)]

    def shifts(self, tags: Sequence[Tag], eps: Sequence[Any]) -> list[list[Shift]]:
        """Where the loss is evaluated: for each point the shift of each group, whose perturbation scales are `eps`.

        Args:
            tags: what `tags` gave, once for the step: terms are added by the tag, and one on a device is the same as itself only.
        """
        return [[[(tags[i], factor * e) for i, factor in point] for e in eps] for point in self.estimator.points()]

    def trials(self, tag: Tag, coefs: Sequence[Sequence[Any]]) -> list[list[Shift]]:
        """Where a rule's candidates are evaluated, once the numbers of each group are known."""
        return [list(shifts) for shifts in zip(*(self.rule.trials(tag, c) for c in coefs), strict=True)]

    def forwards(self, step: int) -> int:
        """Forwards of the step of this number (0: the first), for each micro-batch. One that carries tangents counts as two, a backward pass as two."""
        points = len(self.estimator.points()) * (2 if self.estimator.dual else 1)
        inner = 0
        if self.projection is not None and self.projection.due(step):
            inner = self.projection.inner * (2 if self.projection.learn == "forward" else 3)
        return points + self.rule.tries + 2 * self.direction.size + inner

    # -- what it is --

    @property
    def plain(self) -> bool:
        """Whether every step is the same list of terms, with coefficients of its own losses alone."""
        steady = self.direction.plain and self.blocks is None and self.projection is None
        alone = self.clip.window == 0 and self.scale_free is None and self.anchor is None
        return steady and not self.rule.scheduled and not self.rule.stateful and alone

    @property
    def repeats(self) -> bool:
        """Whether every step is the same work on the same memory, but for numbers that lie there: what a CUDA graph repeats."""
        steady = self.blocks is None and self.projection is None and not self.estimator.dual
        alone = self.clip.window == 0 and self.scale_free is None and self.anchor is None
        return steady and alone and self.rule.repeats and self.direction.repeats

    def configured(self) -> dict[str, Any]:
        """The parts whose options say what the numbers of a record, or of a state, mean."""
        return {what: getattr(self, what) for what in PARTS if what != "clip"}

    def described(self, scratch: bool, together: bool) -> dict[str, Any] | None:
        """What the numbers of a record mean, for a journal's header: JSON; None where they are the coefficients of an update along directions that
        stay, as in plain MeZO.

        Args:
            scratch: the run's passes leave the weights alone. together: see `states.RuleState`.
        """
        if self.plain and (scratch or self.estimator == estimators.TwoSided()):
            return None
        parts = {**self.configured(), "clip": self.clip if self.clip.window else None}
        found = {what: describe(part) for what, part in parts.items() if part is not None}
        if self.blocks is not None and self.rule.counts and not together:
            found["rule"]["counts"] = COUNTS
        return found

    @classmethod
    def of_header(cls, header: journal.Header) -> Method:
        """The method of a recorded run.

        Raises:
            ValueError: it has a part that this version does not know, or would replay to other weights, or whose values are out of range.
        """
        if header.method is None:
            return cls(estimators.TwoSided(header.terms), kind=header.kind)
        return cls(**parts_of(header), kind=header.kind).over([p.name for p in header.parameters])

    def over(self, names: Sequence[str]) -> Method:
        """The same for a run that trains the parameters of these names.

        Raises:
            ValueError: none of them is one that the projection moves, or that the direction has factors of.
        """
        self.direction.over(names)
        return self if self.projection is None else replace(self, layers=len(self.projection.matching(names)))


# ---- parts as JSON ----------------------------------------------------------------------------------------------------


def describe(part: Any) -> dict[str, Any]:
    """A part (a frozen dataclass with a name) as JSON."""
    values = {name: getattr(part, name) for name in _options(part)}
    content: dict[str, Any] = json.loads(json.dumps({"name": part.name, **values}, default=lambda factors: factors.sha256))
    return content


def _options(part: Any) -> list[str]:
    """The names of what describes a part, and of no data that it is given."""
    return [f.name for f in fields(part) if f.compare]


def _part_of(what: str, content: Any, known: Sequence[type[Any]]) -> Any:
    """The part that `describe` wrote.

    Raises:
        ValueError: it is none that this version knows; says which.
    """
    wrong = f"the journal's method has {what}={content!r:.120}"
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise ValueError(f"{wrong}, which is no part of an optimizer")
    cls = next((k for k in known if k.name == content["name"]), None)
    if cls is None or set(content) != {"name", *_options(cls)}:
        raise ValueError(f"{wrong}, which this version of zo_kernels does not know")
    try:
        return cls(**{name: value for name, value in content.items() if name != "name"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wrong}: {error}") from None


def parts_of(header: journal.Header) -> dict[str, Any]:
    """The parts of a recorded run's method, by what they are.

    Raises:
        ValueError: as `Method.of_header`.
    """
    method = header.method or {}
    projected = method.get("projection")
    if isinstance(projected, dict) and projected.get("name") == projections.Projection.name and "learn" not in projected:
        raise ValueError(
            "the journal's run projected (DiZO) before every `every`-th step, on that step's batch; this version projects at the end of a step, as the "
            f"paper has it, and its weights would be other ones: take the version that wrote it ({header.versions!r:.160}, before `learn`)"
        )
    if unknown := sorted(set(method) - set(PARTS)):
        raise ValueError(f"the journal's method has the parts {unknown!r:.160}, which this version of zo_kernels does not know")
    if counted(header):
        rule = {key: value for key, value in method["rule"].items() if key != "counts"}
        method = {**method, "rule": rule}
    return {what: _part_of(what, content, PARTS[what]) for what, content in method.items()}


def counted(header: journal.Header) -> bool:
    """Whether the run's rule counted a parameter's own updates."""
    rule = (header.method or {}).get("rule")
    return isinstance(rule, dict) and rule.get("counts") == COUNTS


# ---- parts that make sense together -----------------------------------------------------------------------------------


def make(
    estimator: Any, rule: Any, direction: Any, blocks: Any, projection: Any, clip: Any, kind: str, names: Sequence[str], *, scale_free: Any = None,
    anchor: Any = None, first_order: Any, lazy: bool, cuda_graph: bool, scratch: bool, shared: bool = False,
) -> Method:  # fmt: skip
    """The method of these parts; None: the default.

    Args:
        names: of the parameters that are trained, some of which a projection moves.
        first_order, lazy, cuda_graph: of the optimizer. scratch: its passes leave the weights alone. shared: workers share its steps.

    Raises:
        TypeError, ValueError: one is no part, or they make no sense together; says which, and why.
    """
    limit = clips.clip_of(clip)
    estimator, rule, direction = estimator or estimators.TwoSided(), rule or rules.SGD(), direction or directions.Dense()
    for what, part in (("estimator", estimator), ("rule", rule), ("direction", direction)):
        known = tuple(PARTS[what])
        if not isinstance(part, known):
            raise TypeError(f"{what}={part!r} must be one of {', '.join(k.__name__ for k in known)}")
    if not isinstance(scale_free, (unit.ScaleFree, type(None))):
        raise TypeError(f"scale_free={scale_free!r} must be a ScaleFree, or None: g as it is")
    if not isinstance(anchor, (anchors.Anchor, type(None))):
        raise TypeError(f"anchor={anchor!r:.80} must be an Anchor, or None: no pull back to the start")
    method = Method(estimator, rule, direction, blocks, projection, limit, kind, scale_free=scale_free, anchor=anchor)
    _check(method, first_order, lazy, cuda_graph, scratch)
    if shared:
        _check_shared(method, first_order, cuda_graph)
    return method.over(names)


def _check(method: Method, first_order: Any, lazy: bool, cuda_graph: bool, scratch: bool) -> None:
    estimator, rule, direction, blocks, projection = (
        method.estimator, method.rule, method.direction, method.blocks, method.projection,
    )  # fmt: skip
    rule.check(estimator.directions, direction)
    if method.anchor is not None:
        _check_anchor(method)
    if method.scale_free is not None:
        _check_scale_free(estimator, rule)
    simple = method.plain and first_order is None
    if lazy and not (simple and estimator == estimators.TwoSided()):
        raise ValueError(
            "lazy=True merges a step's update with the next step's first perturbation: two-sided with one query, SGD or Sign, dense directions only, g as it is"
        )
    if cuda_graph and not (method.repeats and first_order is None):
        raise ValueError(
            "cuda_graph=True with a method whose steps differ: a graph repeats one step. A rule may keep a stored state (a recomputed one differs), and "
            "directions be dense, MagnitudeSparse() or HiZOO's; leave out blocks, projection, anchor, scale_free, a clip of past steps, first_order and "
            "ForwardGradient()"
        )
    if lazy and cuda_graph:
        raise ValueError("lazy=True and cuda_graph=True: a lazy step depends on the one before it; choose one")
    if rule.diagonal != direction.diagonal or (rule.diagonal and not estimator.curved):
        raise ValueError("HessianDiagonal, InverseRoot and ThreePoint are the parts of one method, HiZOO: give all three")
    if rule.diagonal and method.kind != "gaussian":
        raise ValueError(
            f"kind={method.kind!r} with HessianDiagonal: z^2 = 1 everywhere tells nothing about single weights; take 'gaussian'"
        )
    direction.check(estimator.directions, method.kind, blocks is not None)
    if rule.tries and direction.update_differs:
        raise ValueError(
            f"rule={type(rule).__name__}() with direction={type(direction).__name__}(): it tries the update by perturbing, and the two have other scales here"
        )
    if estimator.dual:
        if not scratch:
            raise ValueError(
                "estimator=ForwardGradient() differentiates the model: give a plain (not compiled) module, and perturbation='auto' or 'scratch'"
            )
        if rule.tries:
            raise ValueError(f"rule={type(rule).__name__}() with ForwardGradient(): its trials perturb weights; take TwoSided()")
    if projection is not None and first_order is not None:
        raise ValueError(
            "projection with first_order: a projection that fails takes its step back, which a first-order optimizer cannot; leave one out"
        )
    if projection is not None and (blocks is not None or rule.tries):
        raise ValueError(
            "projection with blocks or Conservative: a projection moves layers as a whole between plain steps; leave one out"
        )


def _check_shared(method: Method, first_order: Any, cuda_graph: bool) -> None:
    if cuda_graph:
        raise ValueError(
            "cuda_graph=True with process_group: a step waits for the others' losses, which no graph does: leave one out"
        )
    if first_order is not None or (method.projection is not None and method.projection.learn == "backpropagation"):
        raise ValueError(
            "process_group with backpropagation: workers share losses, of 8 bytes each, and no gradients: leave first_order out, and take a projection with "
            "learn='forward'; or one process"
        )


def _check_anchor(method: Method) -> None:
    assert method.anchor is not None
    if method.anchor.base is None:
        raise ValueError(
            "anchor without a base: give Anchor(lam, every, base), the weights that the run begins with by name, such as a state dict that lies in a file"
        )
    if method.blocks is not None:
        raise ValueError("anchor with blocks: a step would pull its own block alone; leave one out")
    if method.projection is not None:
        raise ValueError("anchor with projection, which scales the way from the start by what it has learned; leave one out")


def _check_scale_free(estimator: estimators.Estimator, rule: rules.Rule) -> None:
    if isinstance(estimator, estimators.OneSided) and estimator.normalize:
        raise ValueError(
            "scale_free with OneSided(normalize=True), as FZOO has it: its g is free of the loss's scale already; leave one out"
        )
    if isinstance(estimator, estimators.Shaped):
        raise ValueError("scale_free with Shaped(): ranks and z-scores are free of the loss's scale already; leave one out")
    if isinstance(rule, rules.Sign):
        raise ValueError(
            "scale_free with rule=Sign(), which takes the sign of g alone: its steps are the same without; leave one out"
        )
    if rule.diagonal:
        raise ValueError(
            "scale_free with rule=HessianDiagonal(): its H grows with the loss's scale, whatever g is divided by; leave one out"
        )
