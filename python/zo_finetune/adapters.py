"""Adapters of peft: of which kind and size, where a new one begins, and one that goes on from a folder.

Belongs here: what is trained beside a model that stays as it is. Does not belong here: the model (model.py), a folder's files (folders.py), which options
go together (config.py).
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo_finetune.blocks import inside_blocks
from zo_finetune.errors import UserError, did_you_mean, one_line, shortened
from zo_finetune.folders import check_adapter_config
from zo_finetune.tasks.base import Form

RANK, ALPHA = 8, 16.0  # MeZO's
VIRTUAL_TOKENS = 5  # MeZO's prefix length
SOFT_PROMPT_TEXT = "Here is a text. Read it and answer."  # real activations or embeddings to start from, as MeZO does
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Adapter:
    """What `add` makes; None: the default of that kind.

    kind: one of `methods.PEFTS`.
    targets: modules that LoRA or LN adapts, by the end of their names; ["all-linear"]: every linear layer but the head.
    rank, alpha, init: of LoRA. `init`: "default" (peft's) or "gaussian", of the first matrix; the second is 0, so the start is the base model's. peft's
        others (PiSSA, OLoRA, ...) change the base's weights, of which an adapter's folder says nothing. What needs the training rows is set later (inputs.py).
    length: virtual tokens of a prefix or prompt.
    """

    kind: str = "none"
    targets: list[str] | None = None
    rank: int | None = None
    alpha: float | None = None
    init: str | None = None
    length: int | None = None

    @property
    def virtual_tokens(self) -> int:
        if self.kind not in ("prefix", "prompt"):
            return 0
        return VIRTUAL_TOKENS if self.length is None else self.length


def norm_modules(model: torch.nn.Module, targets: list[str] | None) -> list[str]:
    """Names of the modules that normalise and have weights, found by type: lists of names miss `norm` or `ln_f`.

    `targets` keeps those whose name is, or ends in, one of them.
    """
    norms = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)) or "Norm" in type(module).__name__)
        and next(module.parameters(recurse=False), None) is not None
    ]
    if not norms:
        raise UserError(f"--peft ln: {type(model).__name__} has no normalisation module with weights: choose another --peft")
    if targets is None:
        return norms
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in norms):
            raise UserError(
                f"--peft-target {target!r} is no normalisation module of {type(model).__name__}: it has {', '.join(norms)}"
            )
    return [name for name in norms if any(f".{name}".endswith(f".{target}") for target in targets)]


def task_type_of(form: Form) -> Any:
    """peft has no task type for masked models; FEATURE_EXTRACTION is the one that leaves inputs and outputs alone."""
    from peft import TaskType

    return TaskType.CAUSAL_LM if form == "causal" else TaskType.FEATURE_EXTRACTION


def lora_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The linear layers that LoRA adapts, by name."""
    return [(name, m) for name, m in model.named_modules() if "default" in getattr(m, "lora_A", {}) and hasattr(m, "base_layer")]


def freeze_first(model: torch.nn.Module) -> None:
    """Of LoRA's two matrices leave the second one alone trainable."""
    for _, layer in lora_layers(model):
        layer.lora_A["default"].weight.requires_grad_(False)


def lora_config(adapter: Adapter, form: Form) -> Any:
    from peft import LoraConfig

    # r, alpha and the targets (query and value, which are peft's default where it knows the model) are MeZO's; no dropout, see train.py
    rank = RANK if adapter.rank is None else adapter.rank
    alpha: Any = ALPHA if adapter.alpha is None else adapter.alpha  # peft divides by it, and calls it an int
    return LoraConfig(
        task_type=task_type_of(form),
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=0.0,
        target_modules=ALL_LINEAR if adapter.targets == [ALL_LINEAR] else adapter.targets,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
    )


def soft_text(tokenizer: Any, length: int, **more: Any) -> str:
    """The text that a soft prompt begins with, as often as it takes for so many tokens."""
    text = SOFT_PROMPT_TEXT
    while len(tokenizer(text, **more).input_ids) < length:
        text += f" {SOFT_PROMPT_TEXT}"
    return text


def add(model: Any, tokenizer: Any, form: Form, adapter: Adapter, train_blocks: str | None = None) -> Any:
    """`model` inside a peft model, whose new adapter alone is trainable; a function of torch's random state. `train_blocks`: lora and ln adapt modules of
    these blocks alone."""
    from peft import (
        LNTuningConfig,
        PeftConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        get_peft_model,
        initialize_kv_prefix_from_text,
    )

    peft, targets, length = adapter.kind, adapter.targets, adapter.virtual_tokens
    config: PeftConfig
    inside = None if train_blocks is None else inside_blocks(model, train_blocks)
    if peft == "lora":
        lora = lora_config(adapter, form)
        lora.exclude_modules = None if inside is None else f"(?!{inside}).*"
        config = lora
    elif peft == "ln":
        norms = [name for name in norm_modules(model, targets) if inside is None or re.match(inside, name)]
        if not norms:
            raise UserError(
                f"--train-blocks {train_blocks}: no normalisation module that --peft ln adapts lies there: choose others"
            )
        config = LNTuningConfig(task_type=task_type_of(form), target_modules=norms)
    elif peft == "prefix":
        refuse_masked_prefix(form)
        config = PrefixTuningConfig(task_type=task_type_of(form), num_virtual_tokens=length)
    else:
        config = PromptTuningConfig(task_type=task_type_of(form), num_virtual_tokens=length)
    adapted: Any
    try:
        with quiet():
            # peft would hold 16-bit norms in fp32, and their outputs would no longer fit the 16-bit layers that follow
            adapted = get_peft_model(model, config, autocast_adapter_dtype=peft != "ln")
    except ValueError as error:
        hint = "; name its modules with --peft-target" if peft == "lora" else ""
        raise UserError(f"--peft {peft} does not fit {type(model).__name__}: {one_line(error)}{hint}") from error
    if peft == "lora" and targets is not None and targets != [ALL_LINEAR]:
        found = adapted.base_model.targeted_module_names
        for target in targets:  # peft is content if one of them is there
            if not any(f".{name}".endswith(f".{target}") for name in found):
                raise UserError(
                    f"--peft-target {target!r:.80} is no module of {type(model).__name__} that --peft lora adapts: it adapts {shortened(found)}"
                    f"{did_you_mean(target, {name.rpartition('.')[2] for name, _ in model.named_modules()})}"
                )
    if peft == "prefix":
        # random keys and values destroy the model at the start; MeZO begins with real activations
        initialize_kv_prefix_from_text(adapted, tokenizer, text=soft_text(tokenizer, length), use_chat_template=False)
    elif peft == "prompt":
        ids = tokenizer(SOFT_PROMPT_TEXT, add_special_tokens=False, return_tensors="pt").input_ids[0]
        ids = ids.repeat(-(-length // len(ids)))[:length].to(model.device)
        with torch.no_grad():
            adapted.prompt_encoder["default"].embedding.weight.copy_(model.get_input_embeddings()(ids))
    return adapted


def go_on(model: Any, form: Form, folder: Path, kind: str) -> tuple[Any, list[str]]:
    """`model` inside a peft model with the adapter of a folder that `folders.check_adapter` has looked at, trainable; and notes for the user.

    Raises:
        UserError: it does not fit the model, tensor by tensor.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    if kind == "prefix":
        refuse_masked_prefix(form)
    where = f"--adapter {folder}"
    try:
        config = PeftConfig.from_pretrained(str(folder))
        made, weights = config.base_model_name_or_path or "", load_file(folder / "adapter_model.safetensors")
        config.task_type, config.inference_mode = task_type_of(form), False
        with quiet():  # not PeftModel.from_pretrained, which trains no soft prompt
            adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=kind != "ln")
        ours = {name: list(t.shape) for name, t in get_peft_model_state_dict(adapted).items()}
        held = {name: list(t.shape) for name, t in weights.items()}
        if ours == held:
            set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # of any kind: a hostile folder makes peft fail at any place
        raise UserError(f"{where} does not fit {type(model).__name__}: {one_line(error)}") from error
    if wrong := sorted(name for name in {*ours, *held} if ours.get(name) != held.get(name)):
        name = wrong[0]
        raise UserError(
            f"{where} does not fit {type(model).__name__}: {len(wrong)} tensors differ, {name} is {held.get(name, 'not there')} in the folder and "
            f"{ours.get(name, 'not there')} in the model: it was made for another base"
        )
    for name, p in adapted.named_parameters():
        if p.requires_grad and not torch.isfinite(p).all():
            raise UserError(f"{where}: {name} holds NaN or an infinity")
    now = str(model.config._name_or_path)
    # a model that is gone from where it was has been moved, if it has its name; one that is there yet is another, as all that runs save are called "model"
    other = made and Path(made).resolve() != Path(now).resolve() and (Path(made).name != Path(now).name or Path(made).exists())
    return adapted, [f"the adapter was made for {made}, and goes on with {now}"] if other else []


def described(model: Any) -> dict[str, Any]:
    """The configuration of a peft model's one adapter, as JSON; empty for a model without, or with several."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or list(configs) != ["default"]:
        return {}
    content: dict[str, Any] = json.loads(
        json.dumps(configs["default"].to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
    return {name: value for name, value in content.items() if value is not None}


def from_described(model: Any, config: dict[str, Any], where: str) -> tuple[Any, str]:
    """`model` inside a peft model with an adapter of the configuration that `described` gave, of random values; and its kind.

    Args:
        where: the configuration comes from, for messages.

    Raises:
        UserError: it is none, or does not fit the model.
    """
    from peft import PeftConfig, get_peft_model

    kind = check_adapter_config(config, where)
    try:
        made = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**config))
        made.inference_mode = False
        with quiet():
            return get_peft_model(model, made, autocast_adapter_dtype=kind != "ln"), kind
    except Exception as error:  # of any kind: what others wrote makes peft fail at any place
        raise UserError(f"{where} does not fit {type(model).__name__}: {one_line(error)}") from error


def refuse_masked_prefix(form: Form) -> None:
    if form == "masked":
        raise UserError("--peft prefix needs a causal model (a masked one keeps no keys and values): choose lora, ln or prompt")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what peft warns of that is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # said of every norm, the layers LN tuning is made for
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # peft's use of a name that transformers has changed
        yield
