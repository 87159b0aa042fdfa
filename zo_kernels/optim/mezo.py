"""MeZO: two forwards at theta ± eps z, one scalar, one update along the same z.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023 (arXiv 2305.17333), algorithm 1; the estimator is
two-sided SPSA (Spall 1992).

Belongs here: the step rule and its life as a `torch.optim.Optimizer`. Does not belong here: how a model sees theta ± eps z
(perturb.py), the pass over the weights (ops.py).
"""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_kernels import _backends as backends
from zo_kernels import ops, parameters, perturb
from zo_kernels.optim import graph

Loss = Tensor | float


class _RNG:
    """The generators of the CPU and of the weights' CUDA devices."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})

    def get(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(k) for k in self.cuda)]

    def set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for k, state in zip(self.cuda, states[1:], strict=True):
            torch.cuda.set_rng_state(state, k)


class Numbers(NamedTuple):
    """One parameter group's numbers in one step: floats, or 0-d float64 tensors where a graph reads them from device memory."""

    lr: float | Tensor
    eps: float | Tensor
    decay: float | Tensor  # 1 - lr weight_decay


class MeZOStep(torch.optim.Optimizer):
    """Zeroth-order SGD. ``step(closure)`` is a whole training step: two forwards and one pass over the weights.

        g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)              the projected gradient, a scalar
        theta <- (1 - lr wd) theta - lr g z

    z is regenerated from (seed, parameter name, step): nothing of the size of the weights is ever stored.

    Args:
        model_or_params: a module, `model.named_parameters()`, a list of tensors, or parameter groups of either (own ``lr``,
            ``eps``, ``weight_decay``, and ``mask`` and ``scale``: one value for the group or a dict by parameter name, as in
            `perturb_`). Frozen parameters of a module are left alone.
        lr: learning rate, >= 0; any torch LR scheduler may drive it.
        eps: perturbation scale, > 0. With groups of different eps, g is (L+ - L-) / (2 eps) with the group's own eps.
        seed: 0 .. 2^64 - 1; the run's noise is a function of it.
        weight_decay: decoupled; a module's biases and normalization layers (by class) get their own group without it.
        perturbation: "scratch": the forwards see theta ± eps z through a buffer and the weights change in the update alone, exactly;
            needs a module. "inplace": the weights really change and come back, three passes, each of which rounds. "auto": scratch
            if there is a module (one that is not torch.compile'd), otherwise in place.
        lazy: in place only: restore, update and the next step's perturbation are one pass, two passes a step. **Between steps the
            weights then stand at theta + eps z.** `flush()` makes them clean, and is called by itself before a forward outside of
            a step, before the module's or the optimizer's state is saved or loaded, when the optimizer goes away and when the
            interpreter exits. What reads or assigns the parameters in another way must call it.
        scratch_bytes: size of the scratch buffer. A matrix larger than it is multiplied in parts, whose last bits may differ from those
            of one product; what is smaller gives the same bits as in place. Adapters or a small model that fit whole cost no Python
            in the forwards. Default: 32 MiB on a GPU, 4 MiB on a CPU.
        cuda_graph: launch whole steps as CUDA graphs, where the host's launches take longer than their kernels. Needs
            ``step(closure, batches)`` with one closure object that reads the batch from its argument, and forwards that draw no
            random numbers and never wait for the device. What cannot be captured runs as without, with one warning that says why.
            A new shape of batch costs a rehearsal (two or four more forwards; in place: a step without a graph).
        rounding: of the update to 16-bit weights: "nearest", "stochastic" (unbiased: updates below half a unit in the last place count
            in expectation), "auto": stochastic in scratch mode, nearest in place.
        kind: "gaussian" (the paper) or "rademacher" directions.
        clip: |g| is clipped to this value; None: not.
        maximize: ascend, for rewards.
        model: the module, where the first argument is not one: enables scratch mode for parameter groups.
        backend: see `perturb_`.

    Attributes:
        projected_gradient: g of the last step and first group, before clipping: 0-d float64 tensor on the losses' device.
        skipped: number of steps whose g was not finite; such a step leaves the weights as they were.

    Raises:
        TypeError, ValueError: an argument is wrong; names it, its value and the remedy.
    """

    def __init__(
        self,
        model_or_params: Any,
        lr: float,
        eps: float = 1e-3,
        *,
        seed: int = 0,
        weight_decay: float = 0.0,
        perturbation: str = "auto",
        lazy: bool = False,
        scratch_bytes: int | None = None,
        cuda_graph: bool = False,
        rounding: str = "auto",
        kind: str = "gaussian",
        clip: float | None = None,
        maximize: bool = False,
        model: nn.Module | None = None,
        backend: str | None = None,
    ) -> None:
        ops.check_choice("perturbation", perturbation, ("auto", "inplace", "scratch"))
        ops.check_choice("rounding", rounding, ("auto", *ops.ROUNDINGS))
        ops.check_choice("kind", kind, ops.KINDS)
        ops.check_word("seed", seed, 64)
        if clip is not None and not ops.check_fp32("clip", clip) > 0:
            raise ValueError(f"clip={clip!r} must be positive, or None for no clipping")
        named = parameters.read_params(model_or_params, model, weight_decay)
        if perturbation == "scratch" and named.model is None:
            raise ValueError(
                "perturbation='scratch' needs the module whose forwards it serves: give the module as the first argument, or model=...; "
                "or take perturbation='inplace'"
            )
        compiled = named.model is not None and perturb.compiled(named.model)
        if perturbation == "scratch" and compiled:
            raise ValueError(
                "perturbation='scratch' cannot serve a torch.compile'd module: give the plain module, or take 'inplace'"
            )
        scratch = named.model is not None and perturbation != "inplace" and not compiled
        if lazy and perturbation != "inplace":
            raise ValueError(
                f"lazy=True with perturbation={perturbation!r}: only passes in place can be merged with the next step's; give 'inplace'"
            )
        if lazy and cuda_graph:
            raise ValueError("lazy=True and cuda_graph=True: a lazy step depends on the one before it; choose one")
        if scratch_bytes is not None and (not isinstance(scratch_bytes, int) or scratch_bytes < 1):
            raise ValueError(f"scratch_bytes={scratch_bytes!r} must be a positive number of bytes, or None for the default")
        for number, group in enumerate(named.groups):
            _check_group(
                f"params[{number}]: " if len(named.groups) > 1 else "",
                {"lr": lr, "eps": eps, "weight_decay": weight_decay, **group},
            )
        for _, p in (pair for g in named.groups for pair in g["params"]):
            if not p.is_meta:
                backends.pick(p.device, backend)
        self._model, self._backend, self._kind, self._seed = named.model, backend, kind, int(seed)
        self._scratch, self._clip, self._maximize = scratch, clip, maximize
        self._lazy, self._scratch_bytes = lazy, scratch_bytes
        self._graphs: graph.Graphs | None = None
        self._graph_wanted = cuda_graph
        self._flush_at_exit: weakref.finalize[..., Any] | None = None
        self._inside = False  # a step is under way
        self._rounding = rounding if rounding != "auto" else ("stochastic" if scratch else "nearest")
        self._tag = 0  # of the next direction: one a step
        self._skipped: Tensor | int = 0
        self.projected_gradient: Tensor | None = None
        self._streams = parameters.streams_of(named.all_names)
        self._view: perturb.View | None = None
        self._owned: set[str] = set()  # the parameters that the module had
        super().__init__(named.groups, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self._refresh()
        if lazy and named.model is not None:
            self._guard(named.model)
        if not scratch and perturbation == "auto" and any(p.dtype != torch.float32 for g in self.param_groups for p in g["params"]):
            warnings.warn(
                "16-bit weights without a (plain, not compiled) module are perturbed in place, which rounds them anew at every step: the weights drift "
                "(docs/numerics.md). Give the module, or model=..., for the exact scratch mode; perturbation='inplace' silences this.",
                stacklevel=2,
            )

    # -- the step --

    @torch.inference_mode(False)
    def _refresh(self) -> perturb.View:
        """The view of the weights, made anew if a parameter was frozen, unfrozen, added, replaced, moved or converted."""
        view = self._view
        if (
            view is None
            or len(view.groups) != len(self.param_groups)
            or not all(w.current(g) for w, g in zip(view.groups, self.param_groups, strict=True))
            or view.moved()
        ):
            self.flush()  # of the weights as they were
            groups = [parameters.Weights.of_group(g, self._streams) for g in self.param_groups]
            ops.check_overlap(
                [(f"parameter {n}", p) for w in groups for n, p in zip(w.names, w.params, strict=True)],
                "a step updates each weight once",
            )
            options: dict[str, Any] = {"seed": self._seed, "kind": self._kind, "backend": self._backend}
            if self._scratch and self._model is not None:
                view = perturb.Scratch(groups, self._model, self._scratch_bytes, **options)
            else:
                view = perturb.InPlace(groups, self._model, **options)
                if self._flush_at_exit is not None:
                    self._flush_at_exit.detach()
                if self._lazy:
                    self._flush_at_exit = weakref.finalize(self, _restore, view, os.getpid())
            there = {view.names[id(p)] for _, _, p in view.places}
            if lost := sorted(self._owned & set(view.names.values()) - there):
                raise RuntimeError(
                    f"{len(lost)} parameters are no longer in the model ({', '.join(lost[:3])}): they were replaced (untied, "
                    "load_state_dict(assign=True), a conversion), and the optimizer would train what no forward reads. Make a new MeZOStep "
                    "of the model; load_state_dict(old.state_dict()) goes on with the run"
                )
            self._owned |= there
            self._view, self._graphs = view, None
        return view

    # -- weights that stand ahead of their values --

    def flush(self) -> None:
        """Bring weights that a lazy step left at theta + eps z back to theta. The next step then begins with a pass of its own."""
        if isinstance(self._view, perturb.InPlace) and not self._inside:
            self._view.restore()

    def _guard(self, model: nn.Module) -> None:
        """Flush before anybody else reads the weights through the module."""
        flush = _Flush(self)
        handles = [model.register_forward_pre_hook(flush)]
        for module in model.modules():
            handles += [module.register_state_dict_pre_hook(flush), module.register_load_state_dict_pre_hook(flush)]
        weakref.finalize(self, _remove, handles)

    @torch.inference_mode(False)  # what a step makes is used by the next one, in whatever mode that is
    @torch.no_grad()
    def step(self, closure: Callable[..., Loss] | None = None, batches: Sequence[Any] | None = None) -> Tensor:  # type: ignore[override]
        """One step.

        Args:
            closure: evaluates the model and returns the loss: a tensor with one element, or anything float() takes (accuracy, F1, a
                reward): it is never differentiated. Called twice, both times from the same random state (dropout masks agree);
                after the step the random state is as after one call. Keep the loss in float32: in 16 bits it is quantised more
                coarsely than the difference that the step needs.
            batches: gradient accumulation: the closure is called with each of these micro-batches, and the losses are averaged.

        Returns:
            The mean of the losses at theta + eps z and theta - eps z, a 0-d float32 tensor on the loss's device.

        Raises:
            Whatever the closure raises: the weights, the random state and the module are then as before the step (in place: to
            within the rounding of the passes). TypeError if the closure returns no loss. RuntimeError if it changes the weights, or steps
            this optimizer, or if the module lost a parameter since it was given; docs/faults.md has every case.
        """
        self._refuse_inside("step()")
        if not callable(closure):
            raise TypeError(f"closure={closure!r}: step needs a function that evaluates the model and returns the loss")
        if batches is not None and not len(batches):
            raise ValueError("batches is empty: give at least one micro-batch, or None to call closure() without an argument")
        if self._tag >= 1 << 32:
            raise RuntimeError("the run's 2^32 directions are used up: start a new run with another seed")
        for number, group in enumerate(self.param_groups):
            _check_group(f"param_groups[{number}]: ", group)
        view = self._refresh()
        self._inside = True
        try:
            loss = self._graphed(view, closure, batches) if self._graph_wanted else None
            if loss is None:
                loss = self._eager(view, closure, batches)
        finally:
            self._inside = False
        self._tag += 1
        if isinstance(view, perturb.Scratch) and (note := view.news()):
            warnings.warn(note, stacklevel=2)
        return loss.float()

    def _numbers(self) -> list[Numbers]:
        return [Numbers(float(g["lr"]), float(g["eps"]), 1 - float(g["lr"]) * float(g["weight_decay"])) for g in self.param_groups]

    def _eager(
        self, view: perturb.View, closure: Callable[..., Loss], batches: Sequence[Any] | None, rehearsal: bool = False
    ) -> Tensor:
        """The step, operation by operation. A rehearsal has lr = 0 and leaves the random state, too, as it was."""
        rng = _RNG(plan.device for w in view.groups for plan in w.plans)
        before = rng.get()
        after: list[Tensor] = []

        def between() -> None:
            after[:] = rng.get()
            rng.set(before)

        numbers = [n._replace(lr=0.0, decay=1.0) if rehearsal else n for n in self._numbers()]
        try:
            loss = self._evaluate_and_update(view, closure, batches, self._tag, numbers, between)
        except BaseException:
            rng.set(before)
            raise
        rng.set(before if rehearsal else after)
        if self._graph_wanted and any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            self._refuse_graph("the forwards draw random numbers (dropout? call model.eval())")
        return loss

    def _rehearse(self, view: perturb.Scratch, closure: Callable[..., Loss], batches: Sequence[Any]) -> None:
        """What must have run once before it can be captured, without a trace in the weights: the same kernels may not give the same
        bits in a graph and outside (models choose others), so that every step of a run is a graph's."""
        skipped = self._skipped.clone() if isinstance(self._skipped, Tensor) else self._skipped
        for _ in range(1 if view.watched_mode is not None else 2):  # the first step of all finds out how the forwards go
            self._eager(view, closure, batches, rehearsal=True)
        if isinstance(self._skipped, Tensor) and isinstance(skipped, Tensor):
            self._skipped.copy_(skipped)  # graphs count here
        else:
            self._skipped = skipped

    def _graphed(self, view: perturb.View, closure: Callable[..., Loss], batches: Sequence[Any] | None) -> Tensor | None:
        """The step as a graph, captured if need be; None if it has to run eagerly."""
        try:
            if batches is None:
                raise graph.Refused("it needs step(closure, batches): a graph must know which memory holds the batch")
            if self._graphs is None:
                devices = {plan.device for w in view.groups for plan in w.plans}
                if len(devices) != 1:
                    raise graph.Refused(f"the weights lie on {len(devices)} devices")
                self._graphs = graph.Graphs(devices.pop(), len(self.param_groups), len(Numbers._fields))
            graphs = self._graphs
            training = self._model.training if self._model is not None else None
            decays = tuple(g["weight_decay"] != 0 for g in self.param_groups)
            key = graph.key_of(closure, batches, training, decays, len(self.param_groups))
            if not graphs.known(key):
                if not isinstance(view, perturb.Scratch):
                    return None  # in place a rehearsal would round the weights
                self._rehearse(view, closure, batches)
                if not self._graph_wanted:
                    return None
            if key.value not in graphs.captured:
                inputs = graphs.inputs
                numbers = [
                    Numbers(row[0], row[1], row[2] if decay else 1.0) for row, decay in zip(inputs.numbers, decays, strict=True)
                ]
                self._skipped = torch.as_tensor(self._skipped, device=inputs.tag.device)

                def whole(static: list[Any]) -> tuple[Tensor, ...]:
                    loss = self._evaluate_and_update(view, closure, static, inputs.tag, numbers)
                    assert self.projected_gradient is not None
                    return loss, self.projected_gradient

                graphs.capture(key, batches, whole, view.memory)
            graphs.inputs.set(self._tag, self._numbers())
            loss, self.projected_gradient = graphs.replay(key, batches)
            ops.written([plan for w in view.groups for plan in w.plans])
            return loss
        except graph.Refused as refused:
            self._refuse_graph(str(refused))
            return None

    def _refuse_graph(self, reason: str) -> None:
        self._graph_wanted, self._graphs = False, None
        warnings.warn(f"cuda_graph=True: {reason}; the steps run without graphs", stacklevel=5)

    def _evaluate_and_update(
        self,
        view: perturb.View,
        closure: Callable[..., Loss],
        batches: Sequence[Any] | None,
        tag: perturb.Tag,
        numbers: Sequence[Numbers],
        between: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Two forwards and the update; the mean loss, 0-d float64. `between` is called between the forwards."""
        with view.step(recorded=isinstance(tag, Tensor)):
            view.see([[(tag, n.eps)] for n in numbers])
            plus = _evaluate(closure, batches)
            view.check()
            between()
            view.see([[(tag, -n.eps)] for n in numbers])
            minus = _evaluate(closure, batches)
            view.check()
            updates = self._updates(tag, numbers, plus, minus)
            if self._lazy and isinstance(view, perturb.InPlace) and isinstance(tag, int) and tag + 1 < 1 << 32:
                view.update(updates, [[(tag + 1, n.eps)] for n in numbers])
            else:
                view.update(updates)
        return (plus + minus) / 2

    def _updates(self, tag: perturb.Tag, numbers: Sequence[Numbers], plus: Tensor, minus: Tensor) -> list[perturb.Update]:
        """The step's terms for each group, from two float64 losses. On the CPU they are numbers; elsewhere they stay tensors, so
        that the host does not wait for the device."""
        difference = plus - minus
        if isinstance(tag, Tensor) and difference.device != tag.device:
            raise graph.Refused(f"the closure returns a loss on {difference.device}: return the tensor that the device computed")
        self.projected_gradient = difference / (2 * numbers[0].eps)
        on_host = difference.device.type == "cpu" and isinstance(tag, int)
        finite = difference.isfinite()
        d: Tensor | float
        if on_host:
            if not finite:
                self._skipped = self._skipped + 1
                return [perturb.Update(())] * len(numbers)
            d = float(difference)
        else:
            if isinstance(self._skipped, Tensor):
                self._skipped += ~finite  # in place: a graph counts here too
            else:
                self._skipped = self._skipped + (~finite).long()
            d = torch.where(finite, difference, 0.0)
        updates = []
        for n in numbers:
            g = d / (2 * n.eps)
            if self._clip is not None:
                g = g.clamp(-self._clip, self._clip) if isinstance(g, Tensor) else min(max(g, -self._clip), self._clip)
            decay: perturb.Coefficient = n.decay
            if not on_host and not (isinstance(decay, float) and decay == 1.0):
                decay = torch.where(finite, torch.as_tensor(decay, dtype=torch.float64, device=difference.device), 1.0)
            updates.append(perturb.Update([(tag, (n.lr if self._maximize else -n.lr) * g)], decay, self._rounding))
        return updates

    @property
    def skipped(self) -> int:
        return int(self._skipped)

    # -- a run that goes on --

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on besides the weights: torch's groups, the seed, the next tag and the streams."""
        self.flush()
        state = super().state_dict()
        state["zo"] = {
            "seed": self._seed,
            "tag": self._tag,
            "skipped": self.skipped,
            "kind": self._kind,
            "streams": dict(self._streams),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume exactly: the next step's noise is that of the run that was saved.

        Raises:
            ValueError: not a state of this class, or of a model with other parameters.
        """
        self._refuse_inside("load_state_dict()")
        self.flush()
        if "zo" not in state_dict:
            raise ValueError("state_dict has no entry 'zo': it was not saved by zo_kernels; give the state_dict of a MeZOStep")
        zo = state_dict["zo"]
        if zo["kind"] != self._kind:
            raise ValueError(
                f"state_dict was saved with kind={zo['kind']!r}, this optimizer has kind={self._kind!r}: make it with the same"
            )
        mine = [name for g in self.param_groups for name in g["param_names"]]
        absent = [name for name in mine if name not in zo["streams"]]
        if absent:
            raise ValueError(
                f"state_dict has no stream for parameter {absent[0]!r} ({len(absent)} in all): it belongs to another model"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        self._seed, self._tag, self._skipped, self._streams = zo["seed"], zo["tag"], zo["skipped"], dict(zo["streams"])
        self._view = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group's parameters need names (``(name, tensor)`` pairs) that the model had at the start or new ones."""
        if self.__dict__.get("_view") is not None:
            self._refuse_inside("add_param_group()")
            self.flush()
        super().add_param_group(param_group)
        names = self.param_groups[-1].get("param_names")
        if names is None:
            raise ValueError("param_group: its parameters need names for their noise: give (name, tensor) pairs")
        missing = [n for n in names if n not in self._streams]
        if missing:
            self._streams = parameters.streams_of([*self._streams, *missing])

    # -- copies --

    def _refuse_inside(self, what: str) -> None:
        if self._inside:
            raise RuntimeError(
                f"{what} of an optimizer whose step is under way, by its closure or in another thread: call it between two steps"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: everything, the module too, but hooks and what the next step makes anew. A lazy optimizer is not
        flushed: a module copied beside it stands where the original stands."""
        self._refuse_inside("a copy")
        state = {k: v for k, v in self.__dict__.items() if k not in _MADE_ANEW and not k.startswith("_optimizer_")}
        state["_at"] = self._view.at if isinstance(self._view, perturb.InPlace) else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # torch calls it from load_state_dict too, with a part of the state
        if "_at" not in state:
            return
        at = self.__dict__.pop("_at")
        self._view = self._graphs = self._flush_at_exit = None
        self._inside = False
        view = self._refresh()
        if isinstance(view, perturb.InPlace) and at is not None and len(at) == len(view.at):
            view.at = at
        if self._lazy and self._model is not None:
            self._guard(self._model)

    def __copy__(self) -> MeZOStep:
        raise TypeError(
            "a shallow copy would step the same weights with the same noise: copy.deepcopy((model, optimizer)) copies both"
        )


_MADE_ANEW = {"_view", "_graphs", "_flush_at_exit", "_inside", "step", "_zero_grad_profile_name"}


class _Flush:
    """A module's hook that makes a lazy optimizer's weights clean. A copy of it, in a copied or pickled module, does nothing."""

    def __init__(self, optimizer: MeZOStep | None = None) -> None:
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else None

    def __call__(self, *_: Any, **__: Any) -> None:
        optimizer = self.optimizer() if self.optimizer is not None else None
        if optimizer is not None:
            optimizer.flush()

    def __reduce__(self) -> Any:
        return _Flush, ()


def _restore(view: perturb.InPlace, process: int) -> None:
    """A fork's child leaves the weights alone: in shared memory they are its parent's."""
    if os.getpid() == process:
        view.restore()


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def _check_group(where: str, group: dict[str, Any]) -> None:
    for key in ("lr", "eps", "weight_decay"):
        if key not in group:
            raise ValueError(f"{where}the group has no {key!r}: put it back")
        if isinstance(group[key], Tensor) and group[key].numel() != 1:
            raise ValueError(f"{where}{key} is a tensor of shape {tuple(group[key].shape)}: give one number")
    lr, eps, decay = (group[k].item() if isinstance(group[k], Tensor) else group[k] for k in ("lr", "eps", "weight_decay"))
    if not (isinstance(lr, (int, float)) and 0 <= lr < math.inf):
        raise ValueError(f"{where}lr={lr!r} must be a finite number >= 0 (to ascend, use maximize=True)")
    if not (isinstance(eps, (int, float)) and 0 < eps < math.inf):
        raise ValueError(f"{where}eps={eps!r} must be a finite number > 0")
    if not (isinstance(decay, (int, float)) and 0 <= decay < math.inf):
        raise ValueError(f"{where}weight_decay={decay!r} must be a finite number >= 0")


def _as_loss(value: Any) -> Tensor:
    """A closure's result as a 0-d float64 tensor on its own device."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"closure returned a tensor of shape {tuple(value.shape)}: return one number, for example its mean()")
        if value.is_complex() or value.is_meta:
            raise TypeError(f"closure returned a {value.dtype} tensor on {value.device}: return a real number that has a value")
        return value.detach().reshape(()).double()
    if value is None:
        raise TypeError("closure returned None: return the loss (a missing `return`?)")
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"closure returned {type(value).__name__}: return a tensor with one element or a number") from None


def _evaluate(closure: Callable[..., Loss], batches: Sequence[Any] | None) -> Tensor:
    if batches is None:
        return _as_loss(closure())
    return torch.stack([_as_loss(closure(batch)) for batch in batches]).mean()
