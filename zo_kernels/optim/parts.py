"""The parts that a `ZOStep` can be put together from, and which of them make sense together.

Belongs here: their registry, by the names that a journal has, and refusals of combinations. Does not belong here: what a part computes
(estimators.py, rules.py, directions.py, blocks.py, projection.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zo_kernels import journal
from zo_kernels.optim import blocks, directions, estimators, record, rules
from zo_kernels.optim import projection as projections

PARTS: Mapping[str, Sequence[type[Any]]] = {
    "estimator": (estimators.TwoSided, estimators.OneSided, estimators.ThreePoint, estimators.ForwardGradient),
    "rule": rules.RULES,
    "direction": directions.DIRECTIONS,
    "blocks": (blocks.Blocks,),
    "projection": (projections.Projection,),
    "clip": (rules.QuantileClip,),
}


def of_header(header: journal.Header) -> dict[str, Any]:
    """The parts of a recorded run's optimizer.

    Raises:
        ValueError: there is one that this version does not know, or would replay to other weights, or whose values are out of range.
    """
    method = header.method or {}
    projection = method.get("projection")
    if isinstance(projection, dict) and projection.get("name") == projections.Projection.name and "learn" not in projection:
        raise ValueError(
            "the journal's run projected (DiZO) before every `every`-th step, on that step's batch; this version projects at the end of a step, as the "
            f"paper has it, and its weights would be other ones: take the version that wrote it ({header.versions!r:.160}, before `learn`)"
        )
    if unknown := sorted(set(method) - set(PARTS)):
        raise ValueError(f"the journal's method has the parts {unknown!r:.160}, which this version of zo_kernels does not know")
    if counted(header):
        rule = {key: value for key, value in method["rule"].items() if key != "counts"}
        method = {**method, "rule": rule}
    return {what: record.part_of(what, content, PARTS[what]) for what, content in method.items()}


COUNTS = (
    "parameter"  # what a journal's rule counts, where there are blocks: earlier versions counted the run's steps, and wrote nothing
)


def counted(header: journal.Header) -> bool:
    """Whether the run's rule counted a parameter's own updates."""
    rule = (header.method or {}).get("rule")
    return isinstance(rule, dict) and rule.get("counts") == COUNTS


def plain(rule: Any, direction: Any, blocks: Any, projection: Any, clip: Any) -> bool:
    """Whether every step is the same list of terms, with coefficients of its own losses alone."""
    steady = type(direction) is directions.Dense and blocks is None and projection is None
    return steady and isinstance(rule, (rules.SGD, rules.Sign)) and not isinstance(clip, rules.QuantileClip)


def check(
    estimator: Any, rule: Any, direction: Any, blocks: Any, projection: Any, first_order: Any, clip: Any, kind: str, lazy: bool,
    cuda_graph: bool, scratch: bool | None,
) -> None:  # fmt: skip
    """Parts that make sense together.

    Raises:
        TypeError, ValueError: says which do not, and why.
    """
    for what, part in (("estimator", estimator), ("rule", rule), ("direction", direction)):
        known = tuple(PARTS[what])
        if not isinstance(part, known):
            raise TypeError(f"{what}={part!r} must be one of {', '.join(k.__name__ for k in known)}")
    rule.check(estimator.directions, direction.name)
    simple = plain(rule, direction, blocks, projection, clip) and first_order is None
    if lazy and not (simple and estimator == estimators.TwoSided()):
        raise ValueError(
            "lazy=True merges a step's update with the next step's first perturbation: two-sided with one query, SGD or Sign, dense directions only"
        )
    if cuda_graph and not (simple and not isinstance(estimator, estimators.ForwardGradient)):
        raise ValueError(
            "cuda_graph=True with a method whose steps differ or keep a state: a graph repeats one step; take SGD or Sign with dense directions"
        )
    three, inverse = isinstance(estimator, estimators.ThreePoint), isinstance(direction, directions.InverseRoot)
    if isinstance(rule, rules.HessianDiagonal) != inverse or (inverse and not three):
        raise ValueError("HessianDiagonal, InverseRoot and ThreePoint are the parts of one method, HiZOO: give all three")
    if inverse and kind != "gaussian":
        raise ValueError(
            f"kind={kind!r} with HessianDiagonal: z^2 = 1 everywhere tells nothing about single weights; take 'gaussian'"
        )
    if isinstance(direction, directions.LowRank) and (estimator.directions != 1 or kind != "gaussian"):
        raise ValueError("direction=LowRank() has one pair of Gaussian factors a step: give queries=1 and kind='gaussian'")
    if isinstance(direction, directions.LayerScale) and blocks is not None:
        raise ValueError(
            "direction=LayerScale() with blocks: scales are relative to all parameters, of which a block is a part; leave one out"
        )
    if isinstance(rule, rules.Conservative) and direction.update_differs:
        raise ValueError(
            f"rule=Conservative() with direction={type(direction).__name__}(): it tries the update by perturbing, and the two have other scales here"
        )
    if isinstance(estimator, estimators.ForwardGradient):
        if scratch is None:
            raise ValueError(
                "estimator=ForwardGradient() differentiates the model: give a plain (not compiled) module, and perturbation='auto' or 'scratch'"
            )
        if isinstance(rule, rules.Conservative):
            raise ValueError("rule=Conservative() with ForwardGradient(): its trials perturb weights; take TwoSided()")
    if projection is not None and first_order is not None:
        raise ValueError(
            "projection with first_order: a projection that fails takes its step back, which a first-order optimizer cannot; leave one out"
        )
    if projection is not None and (blocks is not None or isinstance(rule, rules.Conservative)):
        raise ValueError(
            "projection with blocks or Conservative: a projection moves layers as a whole between plain steps; leave one out"
        )
