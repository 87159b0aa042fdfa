"""`transformers.Trainer` with zeroth-order training steps: from the micro-batches that its loop hands over to one `zo_kernels.ZOStep`.

Belongs here: the arguments, what of a Trainer's loop is meant for backpropagation and is done otherwise, and the journal beside the checkpoints. Does not
belong here: how a step perturbs and updates (zo_kernels), methods and their presets (methods.py), the command line's own loop (train.py).

A Trainer calls `training_step` for each micro-batch and `optimizer.step()` at the last one. A zeroth-order step needs all micro-batches at once: it is made
in the loss of the last `training_step`, and neither the backward pass nor `optimizer.step()` finds anything left to do.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME

import zo_kernels as zk
from zo_finetune import adapters, methods, values
from zo_finetune.errors import UserError
from zo_finetune.methods import Recipe
from zo_finetune.pace import Pace
from zo_finetune.train import view_options
from zo_kernels import journal, quantized

PERTURBATIONS = ("auto", "scratch", "inplace", "lazy")
OF_A_STEP = ("backend", "clip", "rounding", "scratch_bytes")  # zo_options that every method takes
PEFTS = {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "LN_TUNING": "ln"}  # names of peft: of our presets
COUNTS = ("_metrics", "_total_train_tokens")  # of TRL's trainers
HALF = (torch.float16, torch.bfloat16)
LOSSES = frozenset(
    getattr(nn.functional, name)
    for name in (
        "binary_cross_entropy", "binary_cross_entropy_with_logits", "cosine_embedding_loss", "cross_entropy", "ctc_loss", "gaussian_nll_loss",
        "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss", "log_softmax", "margin_ranking_loss", "mse_loss", "multi_margin_loss",
        "multilabel_margin_loss", "multilabel_soft_margin_loss", "nll_loss", "poisson_nll_loss", "smooth_l1_loss", "soft_margin_loss",
        "triplet_margin_loss",
    )
)  # fmt: skip


# ---- arguments ----------------------------------------------------------------------------------------------------------


@dataclass
class ZOArguments:
    """What zeroth-order steps add to the arguments of a Trainer: mixed into `transformers.TrainingArguments`, or into a class made of it.

    Args:
        learning_rate: None: the method's preset for the model, or for its kind of adapter (`zo-finetune --list-methods` prints them).
        zo_method: a name of `zo-finetune --list-methods`, but for those that backpropagate.
        zo_options: the method's own options, and `clip`, `rounding`, `backend`, `scratch_bytes` of `zo_kernels.ZOStep`; as a dict or its JSON.
        zo_eps: perturbation scale; None: the method's preset.
        zo_seed: of the run's noise; None: `seed`.
        zo_perturbation: "auto", "scratch", "inplace" or "lazy" (`zo_kernels.ZOStep`).
        zo_journal: path of a journal of the run (docs/journal.md), from `output_dir`; None: none.

    Raises:
        ValueError: an argument is wrong, or one of a Trainer's that zeroth-order steps have no use for and that changes what a user gets; names it and
            the remedy. What is harmless is switched off with a warning.
    """

    learning_rate: float | None = None
    zo_method: str = "mezo"
    zo_options: dict[str, Any] | str | None = None
    zo_eps: float | None = None
    zo_seed: int | None = None
    zo_perturbation: str = "auto"
    zo_journal: str | None = None
    # Replaced by what a step computes; a NaN of a skipped step is to be seen.
    logging_nan_inf_filter: bool = field(default=False)

    def __post_init__(self) -> None:
        for name, why in _REFUSED.items():
            if getattr(self, name, None):
                raise ValueError(f"{name}={getattr(self, name)!r} with zeroth-order steps: {why}")
        if isinstance(self.zo_options, str):
            try:
                self.zo_options = json.loads(self.zo_options)
            except ValueError as error:
                raise ValueError(f"zo_options={self.zo_options!r}: give a dict, or its JSON: {error}") from None
        if self.zo_options is not None and not isinstance(self.zo_options, dict):
            raise ValueError(f"zo_options={self.zo_options!r}: give a dict of options, for example {{'queries': 4}}")
        if self.zo_perturbation not in PERTURBATIONS:
            raise ValueError(f"zo_perturbation={self.zo_perturbation!r} must be one of {', '.join(PERTURBATIONS)}")
        if self.zo_seed is not None and not (isinstance(self.zo_seed, int) and 0 <= self.zo_seed < 1 << 64):
            raise ValueError(f"zo_seed={self.zo_seed!r} must be an integer of 0 .. 2^64 - 1, or None for seed")
        self.learning_rate, self.zo_eps = _number("learning_rate", self.learning_rate), _number("zo_eps", self.zo_eps)
        if self.zo_eps == 0:
            raise ValueError("zo_eps=0 must be > 0, or None for the method's preset")
        self.recipe("none")
        super().__post_init__()  # type: ignore[misc]
        args: Any = self
        defaults: Any = type(self)
        for name in _OF_ADAM:
            if (value := getattr(args, name)) != getattr(defaults, name):
                raise ValueError(
                    f"{name}={value!r}: training steps are those of zo_method; give zo_options, such as {{'beta1': {value}}} of zo-adam"
                )
        if args.max_grad_norm not in (None, 0, defaults.max_grad_norm):
            warnings.warn(
                f"max_grad_norm={args.max_grad_norm!r} is not used: there is no gradient whose norm could be clipped; zo_options={{'clip': ...}} clips |g|",
                zk.ZOWarning,
                stacklevel=3,
            )
        if args.torch_compile and self.zo_perturbation != "inplace":
            raise ValueError(
                f"torch_compile=True with zo_perturbation={self.zo_perturbation!r}: a compiled graph reads the weights themselves; give 'inplace'"
            )
        if args.optim != TrainingArguments.optim and args.optim != defaults.optim:
            raise ValueError(f"optim={str(args.optim)!r}: training steps are those of zo_method; leave optim out")
        if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
            if not defaults.gradient_checkpointing:  # TRL's arguments have it on
                warnings.warn(
                    "gradient_checkpointing is switched off: zeroth-order steps keep no activations", zk.ZOWarning, stacklevel=3
                )
            args.gradient_checkpointing = args.activation_checkpointing = False

    def of_zo_method(self) -> list[str]:
        """Those given that make an optimizer of `zo_method`, and say nothing to another one."""
        names = ("learning_rate", "weight_decay", "zo_method", "zo_options", "zo_eps", "zo_seed", "zo_perturbation")
        return [f"{name}={value!r}" for name in names if (value := getattr(self, name)) != getattr(type(self), name)]

    def recipe(self, peft: str) -> tuple[Recipe, dict[str, Any]]:
        """The method with all its numbers for a kind of tuning, and the options that every step takes.

        Raises:
            ValueError: no such method or option, or a method that a Trainer cannot run.
        """
        given = dict(self.zo_options) if isinstance(self.zo_options, dict) else {}
        common = {name: given.pop(name) for name in OF_A_STEP if name in given}
        try:
            method = methods.get(self.zo_method)
            if method.no_journal:  # backpropagation
                raise ValueError(
                    f"zo_method={self.zo_method!r} backpropagates, with an optimizer that no checkpoint of this Trainer holds; take transformers.Trainer, or "
                    "another zo_method"
                )
            if method.looks:
                raise ValueError(
                    f"zo_method={self.zo_method!r} looks at the inputs of the matrices over the training rows before its first step, which a Trainer does "
                    "not; take zo-finetune train, or optimizers=(a ZOStep with zk.InputSubspace, None)"
                )
            if method.packed:
                raise ValueError(
                    f"zo_method={self.zo_method!r} trains the scales of packed weights, and a Trainer refuses to train these without an adapter; take "
                    "zo_kernels.quantized_scales in a loop of your own, or zo-finetune train"
                )
            words = {name: value if isinstance(value, str) else values.written(value) for name, value in given.items()}
            return method.recipe(peft, words, self.learning_rate, self.zo_eps), common
        except UserError as error:
            raise ValueError(f"zo_method={self.zo_method!r}, zo_options={self.zo_options!r}: {error}") from None


def _number(name: str, given: Any) -> float | None:
    """As a float: what a YAML file has as 1e-6 is text.

    Raises:
        ValueError: it is no number, not finite, or negative; names it.
    """
    if given is None:
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={given!r} must be a finite number >= 0, or None for the method's preset")
    return value


_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_REFUSED: Mapping[str, str] = {
    "fp16": "its gradient scaler has no gradients to scale; load the model with dtype=torch.float16, or give bf16=True",
    "deepspeed": "it shards optimizer states and gradients, of which there are none; leave it out",
    "fsdp": "sharded weights are not supported; leave it out",
    "parallelism_config": "it is not supported; leave it out",
    "auto_find_batch_size": "steps that were done would be done again; give per_device_train_batch_size",
    "neftune_noise_alpha": "embeddings get no noise where dropout is off; leave it out",
    "optim_args": "training steps are those of zo_method; give zo_options",
    "optim_target_modules": "training steps are those of zo_method; leave it out",
}


ARGUMENTS = (ZOArguments.__doc__ or "").split("\n", 2)[2].strip()  # what the classes that have them say of them


@dataclass
class ZOTrainingArguments(ZOArguments, TrainingArguments):  # type: ignore[misc]
    __doc__ = f"""`transformers.TrainingArguments` with those of a zeroth-order step.

    {ARGUMENTS}
    """


# ---- losses in fp32 -----------------------------------------------------------------------------------------------------


class _WideLosses(TorchFunctionMode):
    """Loss functions take 16-bit tensors as fp32: in 16 bits a loss has larger grains than the difference of two that a step is made of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in LOSSES:
            return func(*args, **(kwargs or {}))

        def wide(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value

        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@contextlib.contextmanager
def dropout_off(model: nn.Module, *outermost: nn.Module) -> Iterator[None]:
    """Every module within a model is in eval mode. The outermost ones stay in training mode: trainers (TRL's) tell by them whether a loss is for training."""
    keep = {id(m) for m in (model, *outermost)}
    quiet = [m for m in model.modules() if m.training and id(m) not in keep]
    for module in quiet:
        module.training = False
    try:
        yield
    finally:
        for module in quiet:
            module.training = True


@contextlib.contextmanager
def _as_they_were(trainer: Any) -> Iterator[None]:
    """What trainers of TRL count in their losses is counted at the first point of a step alone."""
    before = {name: copy.deepcopy(getattr(trainer, name)) for name in COUNTS if hasattr(trainer, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


@contextlib.contextmanager
def _whole_loss(args: Any) -> Iterator[None]:
    """A Trainer multiplies each process's loss by their number, for an average over them that steps do not take."""
    before, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        yield
    finally:
        args.average_tokens_across_devices = before


# ---- the trainer --------------------------------------------------------------------------------------------------------


class _Driven(AcceleratedOptimizer):
    """A `ZOStep` as a Trainer's loop holds it: when the loop says `step()`, `training_step` has made the step."""

    def __init__(self, optimizer: zk.ZOStep) -> None:
        super().__init__(optimizer, device_placement=False)
        self._is_accelerate_prepared = True  # accelerate's own mark: it wraps nothing twice

    def step(self, closure: Any = None) -> None:
        return


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ZOTrainerMixin(_Base):
    """Zeroth-order steps for `transformers.Trainer` or a trainer made of it: ``class Mine(ZOTrainerMixin, TheirTrainer)``. Its arguments are a
    dataclass that `ZOArguments` is mixed into.

    A step takes the micro-batches of an accumulation together: the loss at each point is their mean, or with `num_items_in_batch` their sum over all
    items, as in the Trainer's own accumulation, in float64. Dropout is off in steps: every module but the outermost is in eval mode. `grad_norm` is
    logged as |g|, the projected gradient of the step.

    Several processes (torchrun) share each step by its micro-batches: it takes those of all of them, in the order in which one process would have had them with
    as many times their accumulation, and ends in the same bits. Their dataloaders have what torch's data parallel training would give each; the batches
    themselves, and losses, are all that travels, and no module is wrapped.

    Raises:
        TypeError: other arguments, or another optimizer than a `zo_kernels.ZOStep`.
        ValueError: more than one GPU in a process, or an argument that cannot be kept.
    """

    args: Any
    model: Any
    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._zo_batches: list[Any] = []  # those of this accumulation so far
        self._zo_pace: Pace | None = None
        self._zo_resumes = False
        super().__init__(*args, **kwargs)
        given, processes, gpus = self.args, self.args.world_size, self.args.n_gpu
        if not isinstance(given, ZOArguments):
            raise TypeError(
                f"args is a {type(given).__name__}: give ZOTrainingArguments, or a class that ZOArguments is mixed into"
            )
        if self.optimizer is not None and not isinstance(self.optimizer, zk.ZOStep):
            raise TypeError(
                f"optimizers=({type(self.optimizer).__name__}, ...): a step without gradients needs a zo_kernels.ZOStep, or None"
            )
        if self.optimizer is not None and (idle := given.of_zo_method()):
            raise ValueError(
                f"{', '.join(idle)} with optimizers=({type(self.optimizer).__name__}, ...): a step of your own has numbers of its own; leave one of the two out"
            )
        if self.optimizer_cls_and_kwargs is not None:
            raise TypeError(
                "optimizer_cls_and_kwargs: training steps are those of zo_method; leave it out, or give optimizers=(a ZOStep, None)"
            )
        for name, found in {  # by what started the script
            "fp16": self.accelerator.mixed_precision == "fp16", "deepspeed": self.is_deepspeed_enabled, "fsdp": self.is_fsdp_enabled,
        }.items():  # fmt: skip
            if found:
                raise ValueError(
                    f"{name}, from the environment (accelerate's configuration), with zeroth-order steps: {_REFUSED[name]}"
                )
        if processes > 1 and not self.args.average_tokens_across_devices:
            raise ValueError(
                f"average_tokens_across_devices=False with {processes} processes, which share each step: its loss is a sum over the items of all; leave it out"
            )
        if processes > 1 and self.optimizer is not None and self.optimizer.workers is None:
            raise TypeError(
                f"optimizers=({type(self.optimizer).__name__}, ...) without process_group, with {processes} processes: each would step with losses of its own; "
                "make it with process_group=torch.distributed.group.WORLD, parallel='data'"
            )
        quantized.keep_what_runs(self.model)
        if gpus > 1:
            raise ValueError(f"{gpus} GPUs are DataParallel's, which copies the weights; set CUDA_VISIBLE_DEVICES to one of them")

    @property
    def zo_step(self) -> zk.ZOStep:
        """The optimizer itself, from the beginning of `train()` on."""
        found = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(found, zk.ZOStep)
        return found

    def create_accelerator_and_postprocess(self) -> None:
        """With several processes, a model that accelerate does not wrap: there are no gradients to average."""
        super().create_accelerator_and_postprocess()
        if self.args.world_size > 1:
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)  # type: ignore[method-assign]

    # -- the optimizer --

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: nn.Module = self.model if model is None else model
            recipe, common = self.args.recipe(_peft(trained))
            if self.is_in_train:
                self.args.learning_rate = recipe.lr  # for loggers
            seed = self.args.seed if self.args.zo_seed is None else self.args.zo_seed
            if self.args.world_size > 1:
                common |= {"process_group": torch.distributed.group.WORLD, "parallel": "data", "timeout": self.args.ddp_timeout}
            self.optimizer = recipe.make(
                trained, seed=seed, weight_decay=self.args.weight_decay, **view_options(self.args.zo_perturbation), **common
            )
        if isinstance(self.optimizer, zk.ZOStep):
            self.optimizer = _Driven(self.optimizer)
        if self.args.zo_journal and self.is_in_train and not self._zo_resumes:
            self._zo_open_journal(resume=False)
        return self.optimizer

    # -- the journal --

    @property
    def _zo_journal_path(self) -> str:
        return os.path.join(self.args.output_dir, self.args.zo_journal)

    def _zo_open_journal(self, resume: bool) -> None:
        begun = None if resume or self.args.process_index else self._zo_recorded()
        if begun:
            raise FileExistsError(
                errno.EEXIST,
                f"zo_journal={self.args.zo_journal!r}: a journal of {begun} steps is there. To go on with its run, train(resume_from_checkpoint=...), where it "
                "has saved a checkpoint; to begin anew, give another output_dir or zo_journal, or remove the file",
                self._zo_journal_path,
            )
        # One without a step is of a run that ended before its first.
        self.zo_step.open_journal(self._zo_journal_path, resume=resume, replace=begun == 0, hyperparameters=_described(self.model))
        if not resume and self.args.process_index == 0 and (new := _new_weights(self.model)):
            journal.write_start(self._zo_journal_path, new)

    def _zo_recorded(self) -> int | None:
        """The steps in the journal that is there; None: there is none."""
        try:
            return len(journal.read(self._zo_journal_path, strict=False).steps)
        except FileNotFoundError:
            return None
        except journal.UnbegunError:
            return 0

    @torch.no_grad()
    def _zo_begin_again(self, header: journal.Header) -> None:
        """The model's new weights as the run's began, from beside the journal, where it has them.

        Raises:
            ValueError: the rest is not what the run began with; nothing was changed.
        """
        mine = quantized.named_weights(self.model)
        found = journal.with_start(mine, journal.start_of(header, None, self._zo_journal_path))
        found.update((name, p) for name, p in mine.items() if found[name].dtype != p.dtype)  # another adapter than the run's
        journal.verify_base(header, found.items(), self.model.named_buffers(remove_duplicate=False))
        for name, p in mine.items():
            if found[name] is not p:
                p.copy_(found[name])

    def _zo_replay(self, steps: int) -> None:
        """Take base weights to so many steps of the journal, which goes on from there: what was recorded behind them, the run will do again.

        Raises:
            ValueError: it has fewer, or the weights are not those that its run began with; neither was changed.
        """
        workers = self.zo_step.workers
        with workers.together("cutting the journal to the checkpoint") if workers is not None else contextlib.nullcontext():
            if workers is None or workers.rank == 0:
                self._zo_cut(steps)
            elif os.path.isfile(self._zo_journal_path):
                self._zo_begin_again(journal.read(self._zo_journal_path, strict=False).header)
        self._zo_open_journal(resume=True)

    def _zo_cut(self, steps: int) -> None:
        if not os.path.isfile(self._zo_journal_path):
            raise ValueError(
                f"zo_journal={self.args.zo_journal!r}: {self._zo_journal_path} is not there. To go on with a run, give its own journal (by its whole path "
                "where output_dir is another), and for a run without one zo_journal=None"
            )
        past = journal.read(self._zo_journal_path, strict=False)
        if len(past.steps) < steps:
            raise ValueError(
                f"{self._zo_journal_path} has {len(past.steps)} steps, and the checkpoint is of step {steps}: it is not the journal of its run"
            )
        self._zo_begin_again(past.header)
        if len(past.steps) > steps:
            counted = [k for k, failed in enumerate(past.flag("failed_plus") | past.flag("failed_minus")) if not failed]
            journal.recover(self._zo_journal_path, keep=counted[steps])

    def _zo_digests(self) -> dict[str, str]:
        self.zo_step.flush()
        return {n: journal.digest(p) for n, p in self.model.named_parameters() if p.requires_grad}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._zo_resumes = False
        self._zo_pace = None
        given = self.args.learning_rate  # None is another number for another model or method
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.learning_rate = given
            if self.optimizer is not None:
                self.zo_step.flush()
                self.zo_step.close_journal()

    # -- a step --

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._zo_batches = []
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Theirs, with a loss that gathers its batches, and in the last one is a whole step: nothing is left for its backward pass."""
        own = vars(self).get("compute_loss")  # a user may have put one in the place of the class's
        evaluate = self.compute_loss

        def collect(model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            self._zo_batches.append(inputs)
            loss = torch.zeros((), device=self.args.device)
            if self.accelerator.sync_gradients:
                loss = self._zo_make(evaluate, model, num_items_in_batch).to(self.args.device)
            return loss.requires_grad_()

        self.compute_loss = collect  # type: ignore[method-assign]
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            del self.compute_loss
            if own is not None:
                self.compute_loss = own  # type: ignore[method-assign]

    def _zo_new_pace(self) -> Pace:
        """Of the steps that this run has yet to make; schedules that are no functions of the step are taken as constant."""
        group, steps = self.zo_step.param_groups[0], range(self.state.global_step, self.state.max_steps)
        factors = getattr(self.lr_scheduler, "lr_lambdas", None)
        rates = [group["initial_lr"] * factors[0](k) for k in steps] if factors else [float(group["lr"])] * len(steps)
        own = _peft(self.model) in ("none", "ln")  # those of an adapter are not the model's, and some begin at 0
        return Pace((p for p in self.model.parameters() if p.requires_grad) if own else (), rates, "learning_rate")

    def _zo_make(self, evaluate: Any, model: nn.Module, items: Any) -> Tensor:
        """A step on the batches that are there. Returns its loss as `compute_loss` would: what its caller divides, where that is not done yet."""
        batches, self._zo_batches = self._zo_batches, []
        if (scaled := getattr(self, "loss_is_scaled_for_ga", None)) is None:
            scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        half = self.accelerator.mixed_precision == "bf16" or any(p.dtype in HALF for p in self.model.parameters())
        calls, own = itertools.count(), len(batches)
        if (workers := self.zo_step.workers) is not None:  # in turn, as one process would have had them
            theirs = workers.tell(send_to_device(batches, "cpu"))
            batches = [send_to_device(batch, self.args.device) for turn in zip(*theirs, strict=True) for batch in turn]

        def closure(batch: Any) -> Tensor:
            once = _as_they_were(self) if next(calls) >= own else contextlib.nullcontext()
            with once, _whole_loss(self.args), _WideLosses() if half else contextlib.nullcontext():
                # Losses take labels out of what they are given.
                loss: Any = evaluate(model, copy.copy(batch), num_items_in_batch=items)
            return loss.double() * len(batches) if scaled else loss

        if self._zo_pace is None:  # of the weights before the first step
            self._zo_pace = self._zo_new_pace()
        with dropout_off(model, self.model):
            loss = self.zo_step.step(closure, batches).detach()
        if said := self._zo_pace.saw(self.zo_step.movement(), float(self.zo_step.param_groups[0]["lr"])):
            warnings.warn(said, zk.ZOWarning, stacklevel=2)
        return loss if scaled else loss * self.current_gradient_accumulation_steps

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        g = self.zo_step.projected_gradient
        return None if g is None else g.abs()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of forwards alone: theirs counts a forward and a backward, which is three."""
        return super().floating_point_ops(inputs) // 3 * self.zo_step.forwards()

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Theirs takes a logged sum off itself, which leaves NaN of one that was not finite, and all later losses of the log NaN with it."""
        logged = self._globalstep_last_logged
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if self._globalstep_last_logged != logged:
            tr_loss.zero_()

    # -- checkpoints --

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.zo_step.flush()
        super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """With a journal the weights stay those that its run began with, until it is replayed."""
        self._zo_resumes = bool(self.args.zo_journal)
        if not self._zo_resumes:
            self._zo_load_weights(resume_from_checkpoint, model)

    def _zo_load_weights(self, checkpoint: str, model: Any = None) -> None:
        with self._zo_same_parameters():
            super()._load_from_checkpoint(checkpoint, model)

    def _load_best_model(self) -> None:
        with self._zo_same_parameters():
            super()._load_best_model()

    @contextlib.contextmanager
    def _zo_same_parameters(self) -> Iterator[None]:
        """What is loaded meanwhile goes into the parameters that are there, in their types: peft puts others in the place of an adapter of 16 bits, such as
        TRL's on a packed base, and makes them fp32."""
        before = [(name, p, p.dtype) for name, p in self.model.named_parameters() if p.requires_grad]
        yield
        for name, p, dtype in before:
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            now = getattr(module, attribute)
            p.data = now.detach().to(dtype)
            if now is not p:
                setattr(module, attribute, p)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not os.path.isfile(os.path.join(checkpoint, OPTIMIZER_NAME)):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} has no {OPTIMIZER_NAME}: it was saved with save_only_model=True, or by another trainer, and the run's "
                "noise would begin again. Give the checkpoint's folder as the model, and begin a new run"
            )
        if checkpoint is not None:
            self._zo_take_numbers(os.path.join(checkpoint, OPTIMIZER_NAME))
        if checkpoint is not None and self._zo_resumes:
            self._zo_replay(self.state.global_step)
        super()._load_optimizer_and_scheduler(
            checkpoint
        )  # with a journal: refused where the state is not of the journal's last step
        if checkpoint is not None and self._zo_resumes:
            replayed = self._zo_digests()
            self._zo_load_weights(checkpoint)  # what is in no record: buffers
            if different := [name for name, digest in self._zo_digests().items() if digest != replayed[name]]:
                raise ValueError(
                    f"{self._zo_journal_path} is not the journal of {checkpoint}: after {self.state.global_step} steps {len(different)} weights differ "
                    f"({', '.join(different[:3])})"
                )

    def _zo_take_numbers(self, path: str) -> None:
        """The numbers of a checkpoint's run in the place of those of the arguments, as any Trainer goes on; and a word where they are others."""
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
        others: dict[str, str] = {}
        seeds = [groups[0].get("zo", {}).get("seed") for groups in (saved, self.zo_step.state_dict()["param_groups"])]
        if seeds[0] != seeds[1]:
            others["seed"] = f"seed {seeds[0]}, not {seeds[1]}"
        for mine, past in zip(
            self.zo_step.param_groups, saved, strict=False
        ):  # as many as there are: what loads them says where they are not
            for name in ("initial_lr", "eps", "weight_decay"):
                if name in past and name in mine and past[name] != mine[name]:
                    others.setdefault(name, f"{name.removeprefix('initial_')} {past[name]:g}, not {mine[name]:g}")
            mine.update({name: past[name] for name in ("lr", "initial_lr", "eps", "weight_decay") if name in past})
        if others:
            warnings.warn(
                f"the run goes on with the numbers of its checkpoint: {', '.join(others.values())}. For others begin a new run, with the checkpoint's folder "
                "as the model",
                zk.ZOWarning,
                stacklevel=2,
            )


class ZOTrainer(ZOTrainerMixin, Trainer):
    """`transformers.Trainer` whose training steps are zeroth-order: forward passes only. See `ZOTrainerMixin`, and docs/trainer.md.

    Args:
        args: `ZOTrainingArguments`. optimizers: a `zo_kernels.ZOStep` of your own instead of `zo_method`, and a scheduler; or None. Everything else is
            the Trainer's.
    """


def _described(model: nn.Module) -> dict[str, Any]:
    """What a journal's header says of a model, for people and for `zo-finetune replay`: its base, with dtype and packing, and its adapter's configuration."""
    config = getattr(model, "config", None)
    found = {"model": getattr(config, "_name_or_path", ""), "dtype": str(getattr(model, "dtype", "")).removeprefix("torch.")}
    packing: Any = getattr(config, "quantization_config", None)
    if getattr(packing, "load_in_4bit", False) and not packing.bnb_4bit_use_double_quant:
        found["quantize"] = packing.bnb_4bit_quant_type
    found["peft"] = adapters.described(model)
    return {name: value for name, value in found.items() if value}


def _new_weights(model: nn.Module) -> dict[str, Tensor]:
    """What is trained and no base model has, by name: all that peft trains; of a model that was read from another class's files, what lies outside of the body
    that both have, a new head."""
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if getattr(model, "peft_config", None):
        return trained
    made_of = getattr(getattr(model, "config", None), "architectures", None)
    body = getattr(model, "base_model_prefix", "")
    if not made_of or type(model).__name__ in made_of or not body:
        return {}
    return {name: p for name, p in trained.items() if not name.startswith(f"{body}.")}


def _peft(model: nn.Module) -> str:
    """The kind of tuning, for presets. Adapters of other kinds are taken for LoRA's: small matrices that begin at nothing."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return "none"
    return PEFTS.get(str(next(iter(configs.values())).peft_type.value), "lora")
