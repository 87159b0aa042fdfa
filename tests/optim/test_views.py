"""The two ways to perturb: the same loss bit for bit, exact restoration, and what happens when a forward fails."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zo_kernels as zk
from tests.kernels.cases import same_bits
from tests.optim.interrupts import interrupted
from tests.optim.models import FAMILIES, VOCABULARY, Awkward, Captured, llama, loss_of, make, opt, tokens
from zo_kernels import views
from zo_kernels.parameters import Weights
from zo_kernels.views.memory import default_scratch_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = ("inplace", "scratch")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(same_bits(t, before[name]) for name, t in model.state_dict().items())


def clean(model: nn.Module) -> bool:
    """No shadow is left behind, and no hook was registered."""
    return not any(type(v).__name__ == "PerturbedWeight" for m in model.modules() for v in m.__dict__.values()) and not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )


def losses(model: nn.Module, mode: str, **options: Any) -> list[float]:
    seen: list[float] = []

    def closure() -> Tensor:
        loss = loss_of(model, tokens())
        seen.append(loss.item())
        return loss

    zk.MeZOStep(model, lr=0.0, eps=1e-2, seed=3, perturbation=mode, **options).step(closure)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_perturbation_gives_the_same_loss(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype)
    other, before = copy.deepcopy(model), snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every parameter is reached through its module's attributes
        scratch = losses(model, "scratch")
    in_place = losses(other, "inplace")
    unperturbed = loss_of(model, tokens()).item()
    assert scratch[0] == in_place[0] != unperturbed
    assert scratch[0] != scratch[1] != unperturbed
    assert unchanged(model, before)
    assert clean(model)


def test_eval_after_each_perturbation_matches_a_perturbed_copy() -> None:
    """Scratch against the plain meaning: perturb a copy of the model with `perturb_`, run it."""
    model = make("llama-tied")
    seen = losses(model, "scratch")
    for sign, loss in zip((1, -1), seen, strict=True):
        other = copy.deepcopy(model)
        pairs = list(other.named_parameters())
        zk.perturb_(
            [p for _, p in pairs], [(0, sign * 1e-2)], seed=3, streams=[zk.stream_of(n) for n, _ in pairs], backend="reference"
        )
        assert loss_of(other, tokens()).item() == loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_modules(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Awkward().to(dtype)
    other = copy.deepcopy(model)

    def run(m: nn.Module, mode: str) -> list[float]:
        seen: list[float] = []

        def closure() -> Tensor:
            out = m(tokens()).float()
            seen.append(nn.functional.cross_entropy(out.flatten(0, 1), tokens().flatten()).item())
            return torch.tensor(seen[-1])

        zk.MeZOStep(m, lr=0.0, eps=1e-2, seed=3, perturbation=mode).step(closure)
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(model, "scratch")[0] == run(other, "inplace")[0]


def test_weights_past_the_attributes_are_held_and_said() -> None:
    torch.manual_seed(0)
    model = Captured()
    other, before = copy.deepcopy(model), snapshot(model)

    def run(m: nn.Module, mode: str, steps: int) -> list[float]:
        seen: list[float] = []
        step = zk.MeZOStep(m, lr=0.0, eps=1e-2, seed=3, perturbation=mode)

        def closure() -> Tensor:
            loss = nn.functional.cross_entropy(m(tokens()).flatten(0, 1), tokens().flatten())
            seen.append(loss.item())
            return loss

        for _ in range(steps):
            step.step(closure)
        return seen

    with pytest.warns(UserWarning, match=r"2 parameters .*inner\.bias, inner\.weight.*put back, bit for bit, from a copy"):
        scratch = run(model, "scratch", 2)
    assert scratch[0] == run(other, "inplace", 1)[0]
    assert scratch[2] not in scratch[:2], "the second step's direction must reach the held weights too"
    assert unchanged(model, before)


def test_embedding_perturbs_only_the_rows_it_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    from zo_kernels._backends import reference

    sizes: list[int] = []
    real = reference.perturb

    def counting(plan: Any, p: Any) -> None:
        sizes.extend(e.src.numel() for e in plan.entries)
        real(plan, p)

    monkeypatch.setattr(reference, "perturb", counting)
    model = nn.Sequential(nn.Embedding(10_000, 8), nn.Linear(8, 3))
    ids = torch.tensor([[1, 9_999, 1]])
    zk.MeZOStep(model, lr=0.0, perturbation="scratch", backend="reference").step(lambda: model(ids).square().mean())
    assert max(sizes) == 24  # three rows of 8, three rows of the head; never the table


def test_batches_of_every_length_do_not_pile_up() -> None:
    """An embedding keeps a plan and row numbers for each number of tokens: a bounded number of them."""
    model = nn.Sequential(nn.Embedding(1000, 4), nn.Linear(4, 3))
    step = zk.MeZOStep(model, lr=0.0, perturbation="scratch")
    for n in range(1, 150):
        step.step(lambda n=n: model(torch.arange(n)).square().mean())
        assert len(step._views.now.pieces.gathers) <= 64


def test_a_head_over_the_last_position_is_one_matrix_product() -> None:
    """at::matmul folds a batch of non-contiguous rows into one product only for a weight that is a leaf requiring a gradient; for
    any other it copies the weight once for each row (seen: 13 times the time of the two forwards)."""
    model = nn.Linear(8, 50, bias=False)
    h = torch.randn(4, 6, 8)

    class Products(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    def closure() -> Tensor:
        with Products():
            return model(h[:, -1:]).square().mean()

    step = zk.MeZOStep(model, lr=0.0, perturbation="scratch")
    step.step(closure)
    assert "aten::mm" in Products.names
    assert "aten::bmm" not in Products.names


# The sizes of the buffer in which one weight, several calls, and everything fit, for the models of `FAMILIES`.
SIZES = (1, 9_000, 1 << 23)


def run_of(model: nn.Module, size: int, steps: int = 3, **options: Any) -> tuple[list[float], list[Tensor]]:
    """Every loss, and the weights at the end."""
    seen: list[float] = []

    def closure() -> Tensor:
        seen.append(loss_of(model, tokens()).item())
        return torch.tensor(seen[-1])

    step = zk.MeZOStep(model, lr=1e-3, eps=1e-2, seed=3, perturbation="scratch", scratch_bytes=size, **options)
    for _ in range(steps):
        step.step(closure)
    assert clean(model)
    return seen, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_the_buffer_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    """A launch a weight, a launch for some calls, one launch and no Python in the forward: the same losses and weights."""
    models = [make(family, dtype) for _ in SIZES]
    (first, weights), *others = [run_of(m, size, weight_decay=0.1) for m, size in zip(models, SIZES, strict=True)]
    assert len(set(first)) > 3
    for losses_, weights_ in others:
        assert losses_ == first
        assert all(same_bits(a, b) for a, b in zip(weights, weights_, strict=True))


def test_the_passes_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first forward: a launch for every use of a weight, for every buffer full of them, for the model."""
    from zo_kernels._backends import cpu

    passes: list[int] = []
    real = cpu.perturb
    monkeypatch.setattr(cpu, "perturb", lambda plan, p: (passes.append(len(plan.entries)), real(plan, p)))
    counts = {}
    for size in SIZES:
        model = make("llama")
        step = zk.MeZOStep(model, lr=0.0, perturbation="scratch", scratch_bytes=size)
        for _ in range(2):
            passes.clear()
            step.step(lambda: loss_of(model, tokens()))  # noqa: B023
        counts[size] = len(passes)
    tensors = 2 * 9 + 2  # two layers of seven matrices and two norms; the last norm, the head; and the embedding's rows
    assert counts[1] == 2 * (tensors + 1)
    assert 2 * 5 < counts[9_000] < 2 * tensors * 0.7
    assert counts[1 << 23] == 2 * 2


@pytest.mark.parametrize(
    ("build", "wide", "fills", "without_room"),
    [
        (opt, {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024}, 3, 4),
        (llama, {"hidden_size": 256, "intermediate_size": 1024}, 4, 4),
    ],
)
def test_fills_of_a_layer(
    monkeypatch: pytest.MonkeyPatch, build: Callable[..., nn.Module], wide: dict[str, int], fills: int, without_room: int
) -> None:
    """OPT-1.3B's and Llama-1B's layers in 16 bits, and the buffer of a GPU, all an eighth as wide: a matrix of the feed-forward part fills 32 MiB of it."""
    from zo_kernels._backends import cpu

    passes: list[int] = []
    real = cpu.perturb
    monkeypatch.setattr(cpu, "perturb", lambda plan, p: (passes.append(len(plan.entries)), real(plan, p)))
    whole = default_scratch_bytes([torch.device("cuda")])
    for size, expected in ((whole // 64, fills), ((1 << 25) // 64, without_room)):
        counts = []
        for layers in (2, 4):
            model = build(**wide, num_hidden_layers=layers).to(torch.bfloat16)
            step = zk.MeZOStep(model, lr=0.0, perturbation="scratch", scratch_bytes=size)
            for _ in range(2):
                passes.clear()
                step.step(lambda: loss_of(model, tokens()))  # noqa: B023
            counts.append(len(passes))
        assert counts[1] - counts[0] == 2 * 2 * expected  # of two more layers, at two points


class Orders(nn.Module):
    """Uses its layers in an order that changes from forward to forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.order: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for k in self.order:
            x = torch.tanh(self.layers[k](x))
        return x.square().mean()


@pytest.mark.parametrize("size", [1, 2_500, 4_000, 1 << 20])
def test_forwards_in_another_order_get_their_own_weights(size: int) -> None:
    """What an earlier forward did is a guess, and never trusted: early exits, experts, layers that are skipped or run twice."""
    orders = [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [5, 4, 3, 2, 1, 0],
        [1, 1, 0],
        [0, 2, 4],
        [3],
        [0, 1, 2, 3, 4, 5],
        [2, 2, 5, 0, 0, 1],
    ]
    model, x = Orders(), torch.randn(3, 16)
    step = zk.MeZOStep(model, lr=0.0, eps=0.1, seed=4, perturbation="scratch", scratch_bytes=size)
    for tag, order in enumerate(orders):
        model.order = order
        seen: list[float] = []

        def closure(seen: list[float] = seen) -> Tensor:
            seen.append(model(x).item())
            return torch.tensor(seen[-1])

        step.step(closure)
        for sign, loss in zip((1, -1), seen, strict=True):
            other = copy.deepcopy(model)
            pairs = list(other.named_parameters())
            zk.perturb_([p for _, p in pairs], [(tag, sign * 0.1)], seed=4, streams=[zk.stream_of(n) for n, _ in pairs])
            assert other(x).item() == loss, (tag, order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "mask", "random mask", "scale", "no bias", "frozen bias", "autocast", "grad"])
def test_a_matrix_in_parts_has_the_weights_of_the_whole(option: str, dtype: torch.dtype) -> None:
    """On the identity a product shows each weight: one product of the row is the weight, all others are exact zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 1001, bias=option != "no bias")).to(dtype)
    if option == "frozen bias":
        model[0].bias.requires_grad_(False)
    group: dict[str, Any] = {"params": list(model.named_parameters())}
    group["params"] = [(n, p) for n, p in group["params"] if p.requires_grad]
    if option == "mask":
        group["mask"] = {n: torch.rand(p.shape) < 0.5 for n, p in group["params"]}
    elif option == "random mask":
        group["mask"] = zk.RandomMask(0.3, 5)
    elif option == "scale":
        group["scale"] = {"0.weight": torch.rand(1001), "0.bias": (torch.rand(11), 100)}
    size = 256 * (24 + 1) * dtype.itemsize + 1024
    assert size < model[0].weight.nbytes / 3
    results: dict[str, list[Tensor]] = {"scratch": [], "inplace": []}
    x = torch.eye(24, dtype=dtype).reshape(4, 6, 24)
    for mode, found in results.items():

        def closure(found: list[Tensor] = found) -> float:
            with (
                torch.autocast("cpu", dtype=torch.bfloat16, enabled=option == "autocast"),
                torch.set_grad_enabled(option == "grad"),
            ):
                found.append(model(x).detach().clone())
            return 0.0

        options: dict[str, Any] = {"scratch_bytes": size} if mode == "scratch" else {}
        step = zk.MeZOStep([group], lr=0.0, eps=1e-2, perturbation=mode, model=model, **options)
        step.step(closure)
        if mode == "scratch":
            assert sum(b.numel() for b in step._views.now.buffer.memory.values()) <= size
            assert len(step._views.now.pieces.parts) == 1
    assert results["scratch"][0].shape == (4, 6, 1001)
    assert same_bits(results["scratch"][0], results["inplace"][0])
    assert not torch.equal(results["scratch"][0], results["scratch"][1])


def test_rows_are_gathered_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than the table has rows, with a bit mask over the table: still only rows, and the same bits as the whole table."""
    monkeypatch.setattr("zo_kernels.views.pieces.GATHER_ROWS", 5)
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (4, 3))
    for width in (16, 7):  # a masked row of 7 does not begin at a byte: the whole table
        model = nn.Sequential(nn.Embedding(9, width))
        group = {"params": list(model.named_parameters()), "mask": torch.rand(9, width) < 0.5}
        results: dict[str, list[Tensor]] = {"scratch": [], "inplace": []}
        for mode, found in results.items():

            def closure(found: list[Tensor] = found, model: nn.Module = model) -> float:
                found.append(model(ids).clone())
                return 0.0

            step = zk.MeZOStep([group], lr=0.0, eps=1e-2, perturbation=mode, model=model)
            step.step(closure)
            if mode == "scratch":
                assert len(step._views.now.pieces.gathers) == (2 if width == 16 else 0)
        assert same_bits(results["scratch"][0], results["inplace"][0])


@pytest.mark.parametrize("size", SIZES)
def test_scratch_memory_is_bounded(size: int) -> None:
    model = make("llama")
    step = zk.MeZOStep(model, lr=0.0, perturbation="scratch", scratch_bytes=size)
    for _ in range(2):
        step.step(lambda: loss_of(model, tokens()))
    view = step._views.now
    resident = sum(t.nbytes for t in view.fronts.resident.written) if view.fronts.resident else 0
    largest = max(p.nbytes for p in model.parameters())
    assert bool(resident) == (size == SIZES[-1])
    assert resident + sum(b.numel() for b in view.buffer.memory.values()) <= max(size, largest) + 512
    assert sum(t.numel() for t in view.pieces.memory.values()) <= 33 * (32 * 4 + 8)


def test_scratch_bytes_is_checked() -> None:
    with pytest.raises(ValueError, match="scratch_bytes=0 must be a positive number"):
        zk.MeZOStep(make("llama"), lr=0.0, scratch_bytes=0)


def test_what_may_be_asked_of_any_view() -> None:
    """Callers need not know which view they have."""
    options = {"seed": 0, "kind": "gaussian", "backend": None}
    for mode, make_view in {
        "inplace": lambda groups, model: views.InPlace(groups, model, **options),
        "lazy": lambda groups, model: views.InPlace(groups, model, True, **options),
        "scratch": lambda groups, model: views.Scratch(groups, model, 1 << 10, **options),
        "dual": lambda groups, model: views.Tangents(groups, model, 1 << 10, **options),
    }.items():
        model = nn.Linear(3, 2)
        before = snapshot(model)
        named = list(model.named_parameters())
        group = {"params": [p for _, p in named], "param_names": [n for n, _ in named], "mask": None, "scale": None}
        groups = [Weights.of_group(group, {n: k for k, (n, _) in enumerate(named)})]
        view: Any = make_view(groups, model)
        in_place = mode in ("inplace", "lazy")
        assert view.mode == ("scratch" if mode == "dual" else mode)
        assert view.limit == (1 << 10 if mode == "scratch" else 0)
        assert view.rehearses == (1 if in_place else 2)
        assert view.unrecordable() is None
        assert view.ahead(6, [0.5]) == ([[(7, 0.5)]] if mode == "lazy" else None)
        assert view.news() is None
        assert not view.begin() and view.standing() == [()] and not view.restore()
        with torch.no_grad(), view.step():
            view.see([[(0, 0.5)]])
            model(torch.ones(1, 3))
            view.check()
            assert (view.seen, view.standing()) == ((1, [[(0, 0.5)]]) if in_place else (0, [()]))
            assert view.restore() == in_place
        view.check_weights()
        assert not view.begin() and view.seen == 0
        if in_place:
            view.see([[(0, 0.5)]])
        twin = view.another()
        assert type(twin) is type(view) and twin.standing() == view.standing()
        assert twin.restore() == in_place
        view.stand(twin.standing())
        assert not view.begin() and view.whole
        view.release()
        assert all(torch.allclose(t, before[n]) for n, t in model.state_dict().items())


def test_another_view_draws_the_same_masks() -> None:
    """Masks that change from step to step have the draw of the view that it was asked of, shadows included."""
    model = nn.Linear(64, 8)
    named = list(model.named_parameters())
    group = {"params": [p for _, p in named], "param_names": [n for n, _ in named], "mask": zk.RandomMask(0.5, 3), "scale": None}
    groups = [Weights.of_group(group, {n: k for k, (n, _) in enumerate(named)})]
    view: Any = views.Scratch(groups, model, 1, seed=0, kind="gaussian", backend=None)

    def seen(mine: Any) -> Tensor:
        with torch.no_grad(), mine.step():
            mine.see([[(0, 0.5)]])
            return model(torch.eye(64)).clone()

    before = seen(view)
    view.mask_tag = 4
    view.retag(4)
    after = seen(view)
    assert not torch.equal(before, after)
    assert same_bits(seen(view.another()), after)


class Boom(Exception):
    pass


@pytest.mark.parametrize("failure", [Boom, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(("mode", "size"), [("inplace", None), *(("scratch", size) for size in SIZES)])
def test_a_failing_forward_leaves_everything_as_it_was(mode: str, size: int | None, at: int, failure: type[BaseException]) -> None:
    model = make("llama-tied", torch.bfloat16).train()
    before, calls = snapshot(model), 0

    def closure() -> Tensor:
        nonlocal calls
        torch.rand(3)
        loss = loss_of(model, tokens())
        if calls == at:
            raise failure
        calls += 1
        return loss

    step = zk.MeZOStep(model, lr=1.0, eps=1e-2, perturbation=mode, scratch_bytes=size)
    rng, state = torch.get_rng_state(), step.state_dict()
    with pytest.raises(failure):
        step.step(closure)
    assert torch.equal(torch.get_rng_state(), rng)
    assert step.state_dict() == state
    assert clean(model)
    if mode == "scratch":
        assert unchanged(model, before)
    else:  # one or two passes out, one back: each rounds by at most half a unit in the last place of a bf16 of |theta| + 8.3 eps
        for name, t in model.state_dict().items():
            if t.is_floating_point():
                bound = (2 + at) * 2.0**-8 * (before[name].float().abs() + 8.3e-2) * 1.01
                assert ((t.float() - before[name].float()).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_a_non_finite_loss_skips_the_step(mode: str, at: int, bad: float) -> None:
    model = make("gpt2")
    before, calls = snapshot(model), 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        return bad if calls - 1 == at else loss_of(model, tokens()).item()

    step = zk.MeZOStep(model, lr=1e-2, eps=1e-3, weight_decay=0.5, perturbation=mode)
    loss = step.step(closure)
    assert not loss.isfinite()
    assert step.skipped == 1
    if mode == "scratch":
        assert unchanged(model, before)
    else:
        for name, t in model.state_dict().items():
            assert torch.allclose(t, before[name], atol=1e-6)
    step.step(lambda: loss_of(model, tokens()))
    assert step.skipped == 1
    assert not unchanged(model, before)


def test_interrupt_signals_never_leave_weights_perturbed() -> None:
    """Real SIGINTs at random moments of real steps, from another thread."""
    model = make("llama")
    before = snapshot(model)
    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch")
    for _ in interrupted(lambda: step.step(lambda: loss_of(model, tokens(1, 4)))):
        assert unchanged(model, before)
        assert clean(model)


@pytest.mark.parametrize("size", SIZES)
def test_shadows_survive_metadata_and_saving(size: int, tmp_path: Any) -> None:
    """Inside the closure the model can be asked for shapes, and saved: its state is the clean one."""
    model = make("llama")
    before = snapshot(model)
    checked = False

    def closure() -> Tensor:
        nonlocal checked
        weight = model.model.norm.weight
        assert weight.shape == (32,)
        assert weight.dtype == torch.float32
        assert len(weight) == 32
        assert not torch.equal(weight, before["model.norm.weight"])
        torch.save(model.state_dict(), tmp_path / "m.pt")
        checked = True
        return loss_of(model, tokens())

    step = zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation="scratch", scratch_bytes=size)
    step.step(lambda: loss_of(model, tokens()))
    step.step(closure)
    assert checked
    assert all(torch.equal(t, before[n]) for n, t in torch.load(tmp_path / "m.pt").items())


def test_a_penalty_on_the_parameters_sees_the_perturbation() -> None:
    """A closure that reads `model.parameters()` itself, past all modules: the weights are held."""
    seen: dict[str, float] = {}
    for mode in MODES:
        model = make("llama")

        def closure(model: nn.Module = model, mode: str = mode) -> Tensor:
            loss = loss_of(model, tokens()) + sum(p.double().square().sum() for p in model.parameters())
            seen.setdefault(mode, loss.item())
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zk.MeZOStep(model, lr=0.0, eps=1e-2, perturbation=mode).step(closure)
    assert seen["scratch"] == seen["inplace"]


@pytest.mark.filterwarnings("ignore:scratch mode")
@pytest.mark.parametrize(
    ("kind", "mode"), [("llama", "inplace"), ("llama", "scratch"), ("captured", "inplace"), ("captured", "scratch")]
)
def test_autocast_sees_each_perturbation(kind: str, mode: str) -> None:
    """Autocast keeps 16-bit copies of weights, by tensor: with a stale one a loss is that at the weights before. Each must be that of a model
    which was never evaluated before, also behind a forward of the user's that has filled the cache. Captured weights are held in place in
    scratch mode too."""
    torch.manual_seed(0)
    model, eps = make("llama") if kind == "llama" else Captured(), 5e-2
    clean, seen = copy.deepcopy(model), []

    def fresh(base: nn.Module, *terms: tuple[int, float]) -> nn.Module:
        other = copy.deepcopy(base)
        streams = [zk.stream_of(n) for n, _ in other.named_parameters()]
        zk.perturb_([p.detach() for p in other.parameters()], list(terms), seed=3, streams=streams)
        return other

    def loss(m: nn.Module) -> float:
        return (loss_of(m, tokens()) if kind == "llama" else m(tokens()).float().square().mean()).item()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = loss(model)
        zk.MeZOStep(model, lr=0.0, eps=eps, seed=3, queries=2, perturbation=mode).step(lambda: seen.append(loss(model)) or seen[-1])
    shifts = [(0, eps), (0, -eps), (1, eps), (1, -eps)]
    if mode == "scratch":
        points = [fresh(clean, shift) for shift in shifts]
    else:  # pass by pass, as each rounds
        points = [fresh(clean, (0, eps))]
        points += [fresh(points[-1], (0, -eps - eps))]
        points += [fresh(points[-1], (1, eps), (0, eps))]
        points += [fresh(points[-1], (1, -eps - eps))]
    wanted = []
    for point in points:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted.append(loss(point))
    assert seen == wanted
    assert len({before, *seen}) == 5


@pytest.mark.filterwarnings("ignore:scratch mode")
@pytest.mark.parametrize("mode", MODES)
def test_autocast_sees_clean_weights_behind_perturbed_ones(mode: str) -> None:
    """A conservative step evaluates theta behind theta - eps z; of weights that are held in place a copy of those would be left."""
    torch.manual_seed(0)
    model, seen = Captured(), []

    def loss() -> float:
        seen.append(model(tokens()).float().square().mean().item())
        return seen[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss()
        zk.ZOConservative(model, lr=0.0, eps=5e-2, seed=3, perturbation=mode).step(loss)
    clean, plus, minus, *trials = seen
    assert plus != clean and minus != clean
    if mode == "scratch":
        assert trials == [clean] * 3
    else:  # rounded by the passes
        assert trials == pytest.approx([clean] * 3, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hundreds_of_steps_at_lr_0_leave_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:2] = torch.tensor([0.0, -0.0], dtype=dtype)[:, None]  # signs of zero count as bits
    before = snapshot(model)
    step = zk.MeZOStep(model, lr=0.0, eps=1e-3, perturbation="scratch")
    ids = tokens(1, 4)
    for _ in range(400):
        step.step(lambda: loss_of(model, ids))
    assert unchanged(model, before)
