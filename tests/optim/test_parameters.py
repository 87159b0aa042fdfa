"""Names and streams."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zo_kernels as zk
from tests.optim.models import make
from zo_kernels import ops, parameters
from zo_kernels.parameters import Member, Weights
from zo_kernels.plan import Pass


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("module.model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("_orig_mod.module.w", "w"),
        ("model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.lora_A.default.weight"),
        ("weight", "weight"),
        ("submodule.weight", "submodule.weight"),
        ("module", "module"),
    ],
)
def test_canonical_names(name: str, bare: str) -> None:
    assert parameters.canonical_name(name) == bare


def test_the_stream_is_a_stable_hash() -> None:
    """A known answer, sha256(b"weight")[:4], little-endian. It may never change: runs depend on it."""
    assert zk.stream_of("weight") == int.from_bytes(bytes.fromhex("0844df8f"), "little")
    assert zk.stream_of("model.layers.0.q_proj.weight") == zk.stream_of("model.layers.0.q_proj.weight")


def test_collisions_are_resolved_the_same_way_whatever_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = parameters.hash_of
    monkeypatch.setattr(parameters, "hash_of", lambda text: 7 if text in ("a", "b") else real(text))
    table = parameters.streams_of(["b", "c", "a"])
    assert table["a"] == 7
    assert table["b"] == real("b#1")
    assert table["c"] == real("c")


def test_no_two_parameters_of_a_large_model_share_a_stream() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.{k}.weight" for i in range(32) for j in range(64) for k in ("w1", "w2", "w3")]
    table = parameters.streams_of(names)
    assert len(set(table.values())) == len(names) == 6144


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "qwen", "roberta"])
def test_no_decay_finds_every_bias_and_norm_by_class(family: str) -> None:
    """Name lists miss Llama's and Qwen's `norm` and GPT-2's `ln_1`."""
    model = make(family)
    skip = parameters.no_decay(model)
    for name, p in model.named_parameters():
        assert (id(p) in skip) == (p.ndim == 1), name


def test_tied_weights_are_one_parameter() -> None:
    model = make("llama-tied")
    pairs = parameters.trainable(model)
    assert len({id(p) for _, p in pairs}) == len(pairs)
    assert "lm_head.weight" not in dict(pairs)


def test_base_model_and_peft_model_share_noise() -> None:
    """The same base weight has the same name, so the same stream, with an adapter around it."""
    bare = parameters.streams_of(n for n, _ in make("llama").named_parameters())
    lora = make("lora")
    for name, _ in lora.named_parameters():
        if "lora_" not in name:
            assert parameters.stream_of(parameters.canonical_name(name)) == bare[parameters.canonical_name(name)]


def test_groups_need_names_once_added() -> None:
    m = nn.Linear(2, 2)
    step = zk.MeZOStep([("weight", m.weight)], lr=0.1)
    step.add_param_group({"params": [("bias", m.bias)], "lr": 0.5})
    before = m.bias.detach().clone()
    values = iter([1.0, 0.0])
    step.step(lambda: next(values))
    z = zk.normal(2, seed=0, stream=zk.stream_of("bias"), tag=0)
    assert torch.allclose(m.bias, before - 0.5 * 500 * z, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "base_model.model.", "_fsdp_wrapped_module."])
def test_a_stream_is_that_of_the_name_in_any_wrapper(prefix: str) -> None:
    assert zk.stream_of(prefix + "layers.0.weight") == parameters.hash_of("layers.0.weight")


def test_a_canonical_name_with_a_prefix_of_its_own_keeps_its_stream() -> None:
    """Of two prefixes of peft one is the wrapper's; the run's stream takes one off, not two."""
    name = "base_model.model.base_model.model.x"
    assert zk.stream_of(name) == parameters.streams_of([name])[name] == parameters.hash_of("base_model.model.x")


def test_the_recipe_for_z_holds_for_names_of_an_adapter() -> None:
    model = make("lora")
    step = zk.MeZOStep(model, lr=0.5, seed=4, perturbation="inplace")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    values = iter([0.002, 0.0])
    step.step(lambda: next(values))
    assert before
    for n, p in model.named_parameters():
        if n in before:
            z = zk.normal(p.shape, seed=4, stream=zk.stream_of(n), tag=step.tags_of(0)[0])
            assert torch.allclose(p.detach(), before[n] - 0.5 * z, rtol=1e-4, atol=1e-5), n
            assert step.stream_of(n) == zk.stream_of(n) == step.stream_of(parameters.canonical_name(n))


def test_the_optimizer_knows_the_stream_of_a_name_that_collided(monkeypatch: pytest.MonkeyPatch) -> None:
    real = parameters.hash_of
    monkeypatch.setattr(parameters, "hash_of", lambda text: 7 if text in ("a", "b") else real(text))
    a, b = (nn.Parameter(torch.zeros(4)) for _ in "ab")
    step = zk.MeZOStep([("a", a), ("module.b", b)], lr=0.5, perturbation="inplace")
    assert [step.stream_of(n) for n in ("a", "module.b", "b", "module.a")] == [7, real("b#1"), real("b#1"), 7]
    values = iter([0.002, 0.0])
    step.step(lambda: next(values))
    for n, p in (("a", a), ("b", b)):
        z = zk.normal(4, seed=0, stream=step.stream_of(n), tag=0)
        assert torch.allclose(p.detach(), -0.5 * z, rtol=1e-4), n
    with pytest.raises(ValueError, match=r"name='c': this optimizer knows no such parameter; it knows a, module.b"):
        step.stream_of("c")


def test_names_that_come_later_take_no_stream_from_those_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alphabetical order resolves a collision of names that are there together; one that comes later gives way."""
    real = parameters.hash_of
    monkeypatch.setattr(parameters, "hash_of", lambda text: 7 if text in ("a", "b") else real(text))
    step = zk.MeZOStep([("b", nn.Parameter(torch.zeros(4)))], lr=0.5, perturbation="inplace")
    step.add_param_group({"params": [("a", nn.Parameter(torch.zeros(4)))]})
    assert step.stream_of("b") == 7 and step.stream_of("a") == real("a#1")


def parameter(*shape: int, **more: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*(shape or (8,)), **more))


W = parameter()
GROUPS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: {"params": [("w", parameter())]}, ValueError, "the name 'w' is in use"),
    (lambda: {"params": [("q", parameter()), ("q", parameter())]}, ValueError, "'q' occurs twice"),
    (lambda: {"params": [("q", parameter(dtype=torch.float64))]}, TypeError, "'?q'? has dtype torch.float64"),
    (lambda: {"params": [("q", parameter(dtype=torch.complex64))]}, TypeError, "complex64"),
    (lambda: {"params": [("q", torch.zeros(8))]}, ValueError, "q is frozen"),
    (lambda: {"params": [("q", torch.zeros(8, dtype=torch.int64))]}, ValueError, "q is frozen"),
    (lambda: {"params": [("q", torch.zeros(4, 4).to_sparse().requires_grad_())]}, ValueError, "sparse_coo"),
    (lambda: {"params": [("q", parameter(4, 4).t().detach().requires_grad_())]}, ValueError, "q.*contiguous"),
    (lambda: {"params": [("q", parameter(device="meta"))]}, (TypeError, ValueError), "meta"),
    (lambda: {"params": [("q", W)]}, ValueError, "overlap|share"),
    (lambda: {"params": [("q", W.detach()[2:].requires_grad_())]}, ValueError, "overlap|share"),
    (lambda: {"params": [("q", p := parameter()), ("r", p)]}, ValueError, "overlap|share"),
    (lambda: {"params": {("q", parameter())}}, TypeError, "is a set: .* no order"),
    (lambda: {"params": {"q": parameter()}}, TypeError, "is a dict"),
    (lambda: {"params": [parameter()]}, ValueError, "need names"),
    (lambda: {"params": [(5, parameter())]}, TypeError, "neither a tensor nor a pair"),
    (lambda: {"params": [("q", 5)]}, TypeError, "q is a int"),
    (lambda: {"params": [("q", parameter())], "lr": -1.0}, ValueError, "lr=-1.0"),
    (lambda: {"params": [("q", parameter())], "mask": torch.zeros(1)}, (TypeError, ValueError), "mask"),
    (lambda: [("q", parameter())], TypeError, "param_group is a list"),
    (lambda: {"lr": 1.0}, TypeError, "'params'"),
]  # fmt: skip


@pytest.mark.parametrize(("make_group", "error", "match"), GROUPS, ids=range(len(GROUPS)))
def test_a_group_that_no_step_could_take_is_not_added(make_group: Callable[[], Any], error: Any, match: str) -> None:
    step = zk.MeZOStep([("w", W)], lr=0.5, perturbation="inplace")
    before, streams = [dict(g) for g in step.param_groups], dict(step._run.streams)
    with pytest.raises(error, match=match):
        step.add_param_group(make_group())
    assert step.param_groups == before and step._run.streams == streams
    step.step(lambda: 0.0)


@pytest.mark.parametrize("params", [{W}, frozenset([W]), [{"params": {W}}], [{"params": {"w": W}}], {"w": W}, [{"params": "w"}]])
def test_what_has_no_order_is_refused(params: Any) -> None:
    with pytest.raises(TypeError, match=r"set|dict|str"):
        zk.MeZOStep(params, lr=0.5)


def test_generators_tensors_and_empty_groups_are_fine() -> None:
    m = nn.Linear(3, 2)
    step = zk.MeZOStep([{"params": iter(m.named_parameters())}, {"params": []}], lr=0.5, model=m)
    step.add_param_group({"params": []})
    m.extra = parameter()
    step.add_param_group({"params": m.extra})  # by the module's name for it
    step.add_param_group({"params": (pair for pair in [("other", parameter())]), "lr": 0.1})
    assert [g["param_names"] for g in step.param_groups] == [["weight", "bias"], [], [], ["extra"], ["other"]]
    step.step(lambda: m(torch.ones(1, 3)).sum())


@pytest.mark.parametrize("perturbation", ["inplace", "scratch"])
@pytest.mark.parametrize("what", ["scale", "mask"])
def test_a_scale_that_is_trained_is_refused(what: str, perturbation: str) -> None:
    """One that the steps themselves would change: its own parameter or another group's. A frozen parameter may serve."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    a, b = model["a"].weight, model["b"].weight
    for other in (a, b):
        limit = (other.detach(), 1) if what == "scale" else other.detach().view(torch.uint8).view(-1)[:8]
        groups = [{"params": [("a.weight", a)], what: limit}, {"params": [("b.weight", b)]}]
        with pytest.raises(ValueError, match="shares memory with"):
            zk.MeZOStep(groups, lr=0.1, model=model, perturbation=perturbation)
        name = "a.weight" if other is a else "b.weight"
        if other is b:
            with pytest.raises(ValueError, match=rf"the {what} of parameter a\.weight shares memory with parameter {name}"):
                zk.MeZOStep(groups, lr=0.1, model=model, perturbation=perturbation)
    b.requires_grad_(False)
    limit = (b.detach(), 1) if what == "scale" else b.detach().view(torch.uint8).view(-1)[:8]
    zk.MeZOStep([{"params": [("a.weight", a)], what: limit}], lr=0.1, model=model, perturbation=perturbation)


@pytest.mark.parametrize("perturbation", ["scratch", "inplace"])
@pytest.mark.parametrize("how", ["another", "entry", "in place", "none"])
@pytest.mark.parametrize("what", ["mask", "scale"])
def test_a_mask_or_scale_edited_between_steps_counts(what: str, how: str, perturbation: str) -> None:
    """Would catch: steps that go on with the masks and scales of the first one."""

    def values(first: bool) -> torch.Tensor:
        keep = torch.tensor([first, not first] * 6).view(3, 4)
        return keep if what == "mask" else torch.tensor([1.0, 2.0, 3.0] if first else [3.0, 0.0, 1.0])

    def run(edited: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        given: Any = {"weight": values(edited or how == "none")}
        step = zk.MeZOStep(
            [{"params": list(model.named_parameters()), what: given}], 0.1, 0.1, model=model, perturbation=perturbation
        )
        x = torch.ones(2, 4)
        if edited:
            step.step(lambda: model(x).square().sum())
            with torch.no_grad():
                model.load_state_dict(start)
            step._run.tag = 0  # the same direction again
            if how == "another":
                step.param_groups[0][what] = {"weight": values(False)}
            elif how == "entry":
                given["weight"] = values(False)
            elif how == "in place":
                given["weight"].copy_(values(False))
            else:
                step.param_groups[0][what] = None
        elif how == "none":
            step.param_groups[0][what] = None
        start.update({n: t.clone() for n, t in model.state_dict().items()})
        step.step(lambda: model(x).square().sum())
        return model.weight.detach()

    start: dict[str, torch.Tensor] = {}
    expected = run(False)
    torch.manual_seed(0)
    start.update({n: t.clone() for n, t in nn.Linear(4, 3).state_dict().items()})
    assert torch.equal(run(True), expected)


def test_an_edited_mask_is_refused_in_a_recorded_run(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    mask = torch.ones(3, 4, dtype=torch.bool)
    step = zk.MeZOStep([{"params": [("weight", model.weight)], "mask": mask}], 0.1, model=model, journal=tmp_path / "r.zoj")
    step.step(lambda: model(torch.ones(4)).sum())
    mask[0, 0] = False
    with pytest.raises(RuntimeError, match=r"parameter 'weight' has another mask or scale than when .*r\.zoj was opened"):
        step.step(lambda: model(torch.ones(4)).sum())
    mask[0, 0] = True
    step.step(lambda: model(torch.ones(4)).sum())
    assert step.steps == 2


def test_names_of_masks_are_known() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="mask of a parameter group: no parameter is called 'wieght'"):
        zk.MeZOStep(
            [{"params": list(model.named_parameters()), "mask": {"wieght": torch.ones(3, 4, dtype=torch.bool)}}], 0.1, model=model
        )


def test_a_model_beside_a_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="model=Sequential beside a module"):
        zk.MeZOStep(model[0], 0.1, model=model)
    with pytest.raises(TypeError, match="model is a int"):
        zk.MeZOStep(model, 0.1, model=5)
    zk.MeZOStep(model, 0.1, model=model)


@pytest.mark.parametrize("what", ["lr", "eps", "weight_decay"])
def test_truth_is_no_number(what: str) -> None:
    with pytest.raises(ValueError, match=f"{what}=True"):
        zk.MeZOStep(nn.Linear(4, 3), **{"lr": 0.1, what: True})


def test_a_plan_knows_whose_its_entries_are() -> None:
    """Two dtypes in turn, two tensors of one shape, one without elements: plans part them, and every entry is still its parameter's."""
    kinds = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    members = [Member(f"p{k}", torch.ones(0 if k == 2 else 4, dtype=kind), stream=10 + k) for k, kind in enumerate(kinds)]
    weights = Weights(members)
    assert [plan.members for plan in weights.plans] == [(0, 2, 4), (1, 3)]
    for plan in weights.plans:
        assert [e.stream for e in plan.entries] == [members[i].stream for i in plan.members]
    assert [(m.name, e.stream) for m, e in weights.entries()] == [(m.name, m.stream) for m in members]
    part = weights.part(["p4", "p1", "p0"])
    assert [names for _, names in part] == [["p0", "p4"], ["p1"]]
    assert [[e.stream for e in plan.entries] for plan, _ in part] == [[10, 14], [11]]
    assert weights.part(["p0", "p1", "p4"])[0][0] is part[0][0], "the same plans for the same names"


def test_a_member_that_is_a_part_of_a_tensor_has_the_noise_of_its_place() -> None:
    whole = torch.linspace(-1, 1, 48)
    parts = [whole[:16].clone(), whole[16:].clone()]
    scale = torch.linspace(0.5, 2, 6)  # of 8 elements each
    zk.perturb_([whole], [(3, 1e-2)], seed=5, streams=[7], masks=[zk.RandomMask(0.5, 2)], scales=[(scale, 8)])
    weights = Weights(
        [
            Member("first", parts[0], 7, mask=zk.RandomMask(0.5, 2), scale=(scale[:2], 8)),
            Member("second", parts[1], 7, offset=16, mask=zk.RandomMask(0.5, 2), scale=(scale[2:], 8)),
        ]
    )
    ops.run(weights.plans, Pass(5, [3], [1e-2]))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (zk.MeZOStep, {"lr_": 1.0}, "MeZOStep has no argument 'lr_': did you mean lr?"),
        (zk.ZOAdam, {"lr": 1.0, "beta": (0.9, 0.99)}, "ZOAdam has no argument 'beta': did you mean betas?"),
        (zk.ZOStep, {"lr": 1.0, "peturbation": "auto"}, "ZOStep has no argument 'peturbation': did you mean perturbation?"),
        (
            zk.LOZO,
            {"lr": 1.0, "qqq": 2},
            "LOZO has no argument 'qqq': there are model_or_params, lr, eps, rank, every, momentum, seed",
        ),
    ],
    ids=str,
)
def test_arguments_that_there_are_not(cls: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        cls(nn.Linear(2, 2), **options)


def test_what_a_class_of_a_users_takes_is_its_own() -> None:
    class Mine(zk.MeZOStep):
        def __init__(self, model: nn.Module, **options: Any) -> None:
            self.mine = options.pop("mine")
            super().__init__(model, **options)

    assert Mine(nn.Linear(2, 2), lr=1e-3, mine=3).mine == 3
    assert list(inspect.signature(Mine).parameters) == ["model", "options"]
    assert list(inspect.signature(zk.MeZOStep).parameters) == ["model_or_params", "lr", "eps", "queries", "one_sided", "more"]


def test_a_list_is_no_first_order_optimizer() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="first_order is a list: give a torch optimizer"):
        zk.MeZOStep(model, lr=1e-3, first_order=[model.bias])
