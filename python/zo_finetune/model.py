"""A language model from a path or the hub, with its tokenizer and, if asked for, a peft adapter.

Belongs here: loading, adapters, saving. Does not belong here: what is done with the model (scoring.py, train.py).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo_finetune.errors import UserError, one_line
from zo_finetune.tasks.base import Form

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VIRTUAL_TOKENS = 5  # MeZO's prefix length
SOFT_PROMPT_TEXT = "Here is a text. Read it and answer."  # real activations or embeddings to start from, as MeZO does


@dataclass
class LanguageModel:
    """What train.py needs: `model` (a transformers or peft model, in eval mode), `tokenizer`, `form`, and facts for the record."""

    model: Any
    tokenizer: Any
    form: Form
    peft: str
    device: torch.device

    @property
    def pad_id(self) -> int:
        """Padding is never attended to by what is scored, so where a tokenizer has none, any token serves."""
        t = self.tokenizer
        return next((i for i in (t.pad_token_id, t.eos_token_id) if i is not None), 0)

    @property
    def max_length(self) -> int:
        """The model's context in tokens, less what a soft prompt takes; 2048 (MeZO's) if the configuration does not say."""
        config = self.model.config
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
        if config.model_type in ("roberta", "xlm-roberta", "camembert"):
            limit -= 2  # their position numbers start after the padding index
        return limit - (VIRTUAL_TOKENS if self.peft in ("prefix", "prompt") else 0)

    def counts(self) -> tuple[int, int]:
        """(trainable, all) weights; tied ones count once."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)

    def save(self, folder: Path) -> Path:
        """Write model or adapter, with the tokenizer, in transformers' or peft's own format; returns the folder's path."""
        target = folder / ("model" if self.peft == "none" else "adapter")
        with warnings.catch_warnings():
            # peft looks for a config.json beside the base model, which a GGUF file does without; the vocabulary is never changed here
            warnings.filterwarnings("ignore", "Could not find a config file")
            self.model.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        return target


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name!r}: torch {torch.__version__} sees no GPU; give cpu, or install a CUDA build of torch")
    return device


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


def add_adapter(model: Any, tokenizer: Any, peft: str, form: Form, targets: list[str] | None) -> Any:
    """`model` inside a peft model of the kind `peft`, whose adapter alone is trainable."""
    from peft import (
        LNTuningConfig,
        LoraConfig,
        PeftConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        TaskType,
        get_peft_model,
        initialize_kv_prefix_from_text,
    )

    # peft has no task type for masked models; FEATURE_EXTRACTION is the one that leaves inputs and outputs alone.
    task_type = TaskType.CAUSAL_LM if form == "causal" else TaskType.FEATURE_EXTRACTION
    config: PeftConfig
    if peft == "lora":
        # r, alpha and the targets (query and value, which are peft's default where it knows the model) are MeZO's; no dropout,
        # see train.py
        config = LoraConfig(task_type=task_type, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets)
    elif peft == "ln":
        config = LNTuningConfig(task_type=task_type, target_modules=norm_modules(model, targets))
    elif peft == "prefix":
        if form == "masked":
            raise UserError("--peft prefix needs a causal model (a masked one keeps no keys and values): choose lora, ln or prompt")
        config = PrefixTuningConfig(task_type=task_type, num_virtual_tokens=VIRTUAL_TOKENS)
    else:
        config = PromptTuningConfig(task_type=task_type, num_virtual_tokens=VIRTUAL_TOKENS)
    adapted: Any
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # said of every norm, the layers LN tuning is made for
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # peft's use of a name that transformers has changed
            # peft would hold 16-bit norms in fp32, and their outputs would no longer fit the 16-bit layers that follow
            adapted = get_peft_model(model, config, autocast_adapter_dtype=peft != "ln")
    except ValueError as error:
        hint = "; name its modules with --peft-target" if peft == "lora" else ""
        raise UserError(f"--peft {peft} does not fit {type(model).__name__}: {one_line(error)}{hint}") from error
    if peft == "prefix":
        # random keys and values destroy the model at the start; MeZO begins with real activations
        initialize_kv_prefix_from_text(adapted, tokenizer, text=SOFT_PROMPT_TEXT, use_chat_template=False)
    elif peft == "prompt":
        ids = tokenizer(SOFT_PROMPT_TEXT, add_special_tokens=False, return_tensors="pt").input_ids[0]
        ids = ids.repeat(-(-VIRTUAL_TOKENS // len(ids)))[:VIRTUAL_TOKENS].to(model.device)
        with torch.no_grad():
            adapted.prompt_encoder["default"].embedding.weight.copy_(model.get_input_embeddings()(ids))
    return adapted


def load(
    spec: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    peft: str = "none",
    form: str = "auto",
    gguf_file: str | None = None,
    targets: list[str] | None = None,
) -> LanguageModel:
    """Load a model, in eval mode.

    Args:
        spec: a folder in transformers' format, a `.gguf` file, or a hub id.
        dtype: "float32", "float16", "bfloat16", or "auto": the dtype that the weights were saved in on a GPU, float32 on a CPU.
        device: "auto", or a torch device.
        peft: one of `methods.PEFTS`.
        form: "causal", "masked", or "auto": what the model's configuration says.
        gguf_file: name of a GGUF file inside `spec`; its weights are dequantised.
        targets: the modules that `peft` "lora" or "ln" adapts, by the end of their names; default query and value, or every norm.

    Raises:
        UserError: no such model, or the device, the dtype or the adapter does not fit it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = pick_device(device)
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        path, gguf_file = path.parent, path.name
    local = path.is_dir()
    if not local and (path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1 or path.exists()):
        raise UserError(f"--model {spec} is not a model folder, nor a .gguf file: give one of them, or a hub id")
    if gguf_file and local and not (path / gguf_file).is_file():
        raise UserError(f"--gguf-file {gguf_file!r} is not in {path}: it holds {', '.join(sorted(os.listdir(path))) or 'nothing'}")
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path) if local else spec}
    if gguf_file:
        where["gguf_file"] = gguf_file
    if local:
        where["local_files_only"] = True
    torch_dtype: Any = DTYPES[dtype] if dtype != "auto" else (torch.float32 if place.type == "cpu" else "auto")
    try:
        config = AutoConfig.from_pretrained(**where)
        if form == "auto":
            form = "masked" if any("MaskedLM" in name for name in getattr(config, "architectures", None) or ()) else "causal"
        auto_class = AutoModelForMaskedLM if form == "masked" else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model: Any = auto_class.from_pretrained(**where, dtype=torch_dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:  # how transformers reports a missing or an unsupported model
        raise UserError(f"--model {spec} could not be loaded: {one_line(error)}") from error
    model = model.to(place)
    kind: Form = "masked" if form == "masked" else "causal"
    if peft != "none":
        model = add_adapter(model, tokenizer, peft, kind, targets)
    return LanguageModel(model.eval(), tokenizer, kind, peft, place)
