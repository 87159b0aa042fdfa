"""Directions along given factors: that an adapter's training is the same, the file beside the journal, and what is refused by name.

Belongs here: what is this direction's own. Does not belong here: a step against float64 (test_methods.py), bits (test_net.py).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.methods import CASES, EPS, GIVEN, SEED, Tiny, given_of
from tests.optim.test_method_journal import check_run, go_on, same
from zo_kernels import journal, lowrank

FACTORS = GIVEN[(7, 5, 4)]
OTHER = zk.InputFactors({"layers.0.weight": torch.ones(7, 2)})


def optimizer(model: nn.Module, factors: zk.InputFactors = FACTORS, others: str = "dense", **more: Any) -> zk.ZOStep:
    return zk.MeZOStep(model, 2e-3, EPS, seed=SEED, direction=zk.InputSubspace(factors, others), **more)


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_is_held_still_neither_moves_nor_decays(mode: str, queries: int) -> None:
    model = Tiny()
    before = copy.deepcopy(model)
    step = optimizer(model, others="still", queries=queries, perturbation=mode, weight_decay=0.5)
    go_on(model, step, 3)
    for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert same_bits(p, q) == (n not in FACTORS.matrices), n


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
def test_a_step_moves_a_matrix_in_the_span_of_its_factor(mode: str) -> None:
    """The right one: rows in the span of its columns; the left one: columns."""
    model = Tiny()
    before = copy.deepcopy(model)
    go_on(model, optimizer(model, queries=2, perturbation=mode), 4)
    for n, (side, v) in FACTORS.matrices.items():
        moved = (model.get_parameter(n) - before.get_parameter(n)).detach().double()
        moved = moved if side == "right" else moved.T
        rest = moved - moved @ torch.linalg.pinv(v.double().T) @ v.double().T
        assert float(moved.abs().max()) > 1e-3 and float(rest.abs().max()) < 1e-5, n


@pytest.mark.parametrize("coefs", [[0.75, -1.5e-3, 2e-5], [0.0, 0.0], [3e-12, -1e-12], [2.0**-140, 0.0]], ids=str)
@pytest.mark.parametrize("there", [False, True], ids=["numbers", "tensors"])
def test_a_sum_of_factors_is_that_of_the_noise_rounded_once(coefs: list[float], there: bool) -> None:
    """Against the bits of normal(): every matrix at the given places, the others untouched; a power of two outside."""
    made = lowrank.Factors([(5, 3), (4, 6), (2, 2)], [1, 2, 3], seed=9, rank=2)
    made.fill(70, 71)
    kept = [(u.clone(), v.clone()) for u, v in made.pairs]
    given: Any = [torch.tensor(c, dtype=torch.float64) for c in coefs] if there else coefs
    tags = list(range(5, 5 + len(coefs)))
    outside = float(made.combine(tags, given, [0, 2]))
    most = max(map(abs, coefs))
    assert outside == 0 if not most else most < outside <= 2 * most
    for k, (rows, stream) in enumerate([(5, 1), (4, 2), (2, 3)]):
        u, v = made.pairs[k]
        assert same_bits(v, kept[k][1])
        if k == 1:
            assert same_bits(u, kept[k][0])
            continue
        total = torch.zeros(rows, 2)
        terms = [(t, c / outside) for t, c in zip(tags, coefs, strict=True)] if outside else []
        zk.perturb_([total], terms, seed=9, streams=[stream], backend="reference")
        assert same_bits(u, lowrank.round_to_12_bits_(total))


def test_the_factors_lie_beside_the_journal_and_a_replay_takes_them_from_there(tmp_path: Path) -> None:
    path, base, live = tmp_path / "run.zoj", Tiny(), Tiny()
    step = optimizer(live, queries=2, journal=path)
    go_on(live, step, 5)
    step.close_journal()
    beside = journal.factors_path(path)
    assert zk.InputFactors.load(beside) == FACTORS and journal.read(path).header.method is not None
    for given in (None, FACTORS, beside, str(beside)):
        again = copy.deepcopy(base)
        zk.replay(again, path, factors=given)
        assert same(again, live)
    past = journal.read(path)
    for source, factors, match in (
        (past, None, r"went along given factors.*give factors="),
        (path, OTHER, "the factors have the SHA-256"),
        (past, tmp_path / "gone", "not at .*gone"),
        (path, path, "holds no factors"),
    ):
        again = copy.deepcopy(base)
        with pytest.raises(ValueError, match=match):
            zk.replay(again, source, factors=factors)  # type: ignore[arg-type]
        assert same(again, base)
    beside.unlink()
    with pytest.raises(ValueError, match=r"the run's factors are not at .*give factors="):
        zk.replay(copy.deepcopy(base), path)


def test_a_journal_is_resumed_with_its_own_factors_alone(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zoj", Tiny()
    step = optimizer(model, journal=path)
    go_on(model, step, 3)
    step.close_journal()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="the journal belongs to another run: its method is"):
        optimizer(Tiny(), OTHER, journal=path, resume=True)
    assert path.read_bytes() == before and zk.InputFactors.load(journal.factors_path(path)) == FACTORS
    journal.factors_path(path).unlink()
    resumed = optimizer(Tiny(), journal=path, resume=True)
    resumed.close_journal()
    assert zk.InputFactors.load(journal.factors_path(path)) == FACTORS
    with pytest.raises(FileExistsError):
        optimizer(Tiny(), OTHER, journal=path)
    assert zk.InputFactors.load(journal.factors_path(path)) == FACTORS


def test_a_journal_that_replaces_one_with_factors_takes_them_away(tmp_path: Path) -> None:
    path = tmp_path / "run.zoj"
    optimizer(Tiny(), journal=path).close_journal()
    step = zk.MeZOStep(Tiny(), 1e-3)
    step.open_journal(path, replace=True)
    step.close_journal()
    assert not journal.factors_path(path).exists()


def test_a_state_of_other_factors_is_refused() -> None:
    model = Tiny()
    step = optimizer(model)
    with pytest.raises(ValueError, match="belongs to another method: its direction is"):
        optimizer(Tiny(), OTHER).load_state_dict(step.state_dict())


@pytest.mark.parametrize("mode", ["scratch", "inplace"])
@pytest.mark.parametrize(
    "more",
    [
        {"rule": zk.Sign()},
        {"rule": zk.Conservative(), "queries": 1},
        {"clip": zk.QuantileClip(0.6, 4, 2)},
        {"kind": "rademacher"},
        {"projection": zk.Projection(3, 2, layers=["weight"])},
        {"blocks": zk.Blocks(order="random")},
    ],
    ids=str,
)
def test_with_other_parts_it_replays_and_resumes(tmp_path: Path, more: dict[str, Any], mode: str) -> None:
    def make(model: nn.Module, **options: Any) -> zk.ZOStep:
        return optimizer(model, **{"queries": 2, **more, **options})

    check_run(make, torch.bfloat16, tmp_path / "run.zoj", perturbation=mode)


def test_names_of_wrappers_do_not_count() -> None:
    wrapped = nn.ModuleDict({"module": Tiny()})
    factors = zk.InputFactors({f"module.{n}": v for n, (side, v) in FACTORS.matrices.items() if side == "right"})
    assert list(factors.matrices) == ["layers.0.weight"]
    step = zk.MeZOStep(wrapped, 2e-3, EPS, seed=SEED, direction=zk.InputSubspace(factors))
    alone = Tiny()
    step.step(wrapped["module"])
    optimizer(alone, factors).step(alone)
    assert same(wrapped["module"], alone)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    """By the safetensors library too."""
    path = tmp_path / "f"
    path.write_bytes(FACTORS.encode())
    assert zk.InputFactors.load(path) == FACTORS
    load = pytest.importorskip("safetensors.torch").load_file
    held = dict(load(path))
    assert held.keys() == {"right/layers.0.weight", "left/layers.1.weight"}
    for side in ("right", "left"):
        name = "layers.0.weight" if side == "right" else "layers.1.weight"
        assert same_bits(held[f"{side}/{name}"], FACTORS.matrices[name][1])


def test_numbers_are_rounded_to_12_bits_and_tiny_ones_to_0() -> None:
    values = torch.tensor([[1 + 2.0**-11, 1 + 2.0**-12], [2.0**-61, -(2.0**-60)]])
    (found,) = (v for _, v in zk.InputFactors({"a": values}).matrices.values())
    assert found.tolist() == [[1 + 2.0**-11, 1.0], [0.0, -(2.0**-60)]]
    assert values[0, 1] == 1 + 2.0**-12


ONES = torch.ones(7, 2)
REFUSED: list[tuple[Any, Any, str]] = [
    (lambda: zk.InputFactors(), ValueError, "give one or more matrices"),
    (lambda: zk.InputFactors({"a": ONES}, {"a": ONES}), ValueError, "'a' occurs twice"),
    (lambda: zk.InputFactors({"a": ONES, "b": ONES[:, :1]}), ValueError, r"the ranks are \[1, 2\]"),
    (lambda: zk.InputFactors({"a": torch.ones(3)}), TypeError, "the right factor of 'a' is torch.float32"),
    (lambda: zk.InputFactors({"a": torch.ones(3, 65)}), ValueError, "the rank 1 .. 64"),
    (lambda: zk.InputFactors(left={"a": ONES * torch.nan}), ValueError, "left factor of 'a' has a number that is not finite"),
    (lambda: zk.InputSubspace("abc"), ValueError, "factors='abc' must be a SHA-256"),
    (lambda: zk.InputSubspace(FACTORS, "zero"), ValueError, "others='zero'"),
    (lambda: zk.InputSubspace({}), TypeError, "factors is a dict: give InputFactors"),  # type: ignore[arg-type]
    (lambda: optimizer(Tiny(), zk.InputFactors({"x": ONES})), ValueError, "none of the trained parameters has factors"),
    (lambda: optimizer(Tiny(), zk.InputFactors({"layers.1.weight": ONES})), ValueError, "'layers.1.weight'.*of another model"),
    (lambda: optimizer(Tiny(), zk.InputFactors({"norm.bias": ONES})), ValueError, "'norm.bias' has the shape"),
    (lambda: optimizer(Tiny(), others="still", blocks=zk.Blocks()), ValueError, "a block may have none that moves"),
    (lambda: optimizer(Tiny(), rule=zk.Momentum()), ValueError, r"Momentum\(\) with direction=InputSubspace.*take SGD"),
    (lambda: optimizer(Tiny(), rule=zk.Adam()), ValueError, r"Adam\(\) with direction=InputSubspace.*take SGD"),
    (lambda: optimizer(Tiny(), rule=zk.LowRankMomentum()), ValueError, r"a factor of LowRank\(\); take SGD"),
    (lambda: zk.LOZO(Tiny(), 1e-3, momentum=0.9, estimator=zk.TwoSided(2)), ValueError, "one U lies beside N; give queries=1"),
    (lambda: zk.ZOStep(Tiny(), 1e-3, direction=zk.InputSubspace(FACTORS.sha256)), ValueError, "the digest .* alone is here"),
    (lambda: lowrank.Factors([(3, 4)], [1], seed=1, rank=2, given=[("right", ONES)]), ValueError, r"given\[0\]: the right factor"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "match"), REFUSED, ids=range(len(REFUSED)))
def test_what_makes_no_sense_is_refused_with_the_reason(make: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_the_next_u_is_drawn_after_the_weights_came_back() -> None:
    """In place: with lr = 0 a step of several queries returns to the weights to within the roundings of its passes."""
    model = Tiny()
    before = [p.detach().clone() for p in model.parameters()]
    step = CASES["input-subspace-still-3"].make(model, lr=0.0, perturbation="inplace")
    seen: list[Tensor] = []
    for _ in range(3):
        step.step(lambda: (seen.append(model.layers[0].weight.detach().clone()), model())[1])
    for p, q in zip(model.parameters(), before, strict=True):
        assert float((p.detach() - q).abs().max()) < 3 * 9 * 2**-24
    assert len({tuple(t.flatten().tolist()) for t in seen}) == 18
    assert given_of(model) is FACTORS
