"""A language model from a path or the hub, with its tokenizer and, if asked for, a peft adapter.

Belongs here: loading, saving. Does not belong here: an adapter (adapters.py), what is done with the model (scoring.py, train.py).
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zo_finetune import adapters, away, blocks, folders
from zo_finetune.adapters import Adapter
from zo_finetune.dominant import Dominant, dominant
from zo_finetune.errors import UserError, one_line, printable, shortened
from zo_finetune.quantize import arguments as quantized_arguments
from zo_finetune.quantize import arguments_of_packed, packed_as
from zo_finetune.tasks.base import Form
from zo_finetune.values import DOMINANT
from zo_kernels import Offloaded, quantized_scales
from zo_kernels.quantized import elements, keep_what_runs, library, trained_weights

REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys")  # by transformers, of a model that it loads


@dataclass
class LanguageModel:
    """What a run needs: `model` (a transformers or peft model, in eval mode), `tokenizer`, `form`, and facts for the record."""

    model: Any
    tokenizer: Any
    form: Form
    peft: str
    device: torch.device
    notes: list[str] = field(default_factory=list)  # lines for the user
    virtual_tokens: int = 0  # that a soft prompt takes
    dominant: Dominant | None = None  # the block that --train-blocks dominant found
    offloaded: Offloaded | None = None  # its weights come and go
    packed: str | None = None  # how its weights are packed

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has a row for. A tokenizer may know more, added without resizing the model."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def pad_id(self) -> int:
        """Padding is never attended to by what is scored, so where a tokenizer has none that the model knows, any token serves."""
        t = self.tokenizer
        return next((i for i in (t.pad_token_id, t.eos_token_id) if i is not None and 0 <= i < self.vocabulary), 0)

    @property
    def max_length(self) -> int:
        """The model's context in tokens, less what a soft prompt takes; where its configuration does not say, the tokenizer's
        (unless that is one of the huge numbers which stand for none), or 2048 (MeZO's)."""
        config = self.model.config
        said = config.get_text_config() if hasattr(config, "get_text_config") else config
        limit = getattr(said, "max_position_embeddings", None) or getattr(said, "n_positions", None)
        if limit is None:
            limit = self.tokenizer.model_max_length
            limit = int(limit) if 1 <= limit <= folders.MAX_SIZE else 2048
        if config.model_type in ("roberta", "xlm-roberta", "camembert"):
            limit -= 2  # their position numbers start after the padding index
        return limit - self.virtual_tokens

    def counts(self) -> tuple[int, int]:
        """(trainable, all) weights; tied ones count once."""
        return sum(p.numel() for p in trained_weights(self.model).values()), sum(map(elements, self.model.parameters()))

    def trained_bytes(self) -> int:
        """Of the trainable weights; a gradient of them takes as much."""
        return sum(p.nbytes for p in trained_weights(self.model).values())

    def save(self, folder: Path) -> Path:
        """Write model or adapter, with the tokenizer, in transformers' or peft's own format; returns the folder's path."""
        target = folder / ("model" if self.peft == "none" else "adapter")
        with warnings.catch_warnings():
            # peft looks for a config.json beside the base model, which a GGUF file does without; the vocabulary is never changed here
            warnings.filterwarnings("ignore", "Could not find a config file")
            if self.offloaded is not None and self.peft == "none":
                away.save(self.model, self.offloaded, target)
            else:
                # What was loaded packed is written as it lies: transformers cannot undo torchao's packing.
                self.model.save_pretrained(target, save_original_format=self.packed is None)
        self.tokenizer.save_pretrained(target)
        return target


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"--device {name!r} is not a device: give auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name!r}: torch {torch.__version__} sees no GPU; give cpu, or install a CUDA build of torch")
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise UserError(f"--device {name!r}: there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    return device


@dataclass(frozen=True)
class Found:
    """A model before it is loaded: transformers' arguments, the form, the device, the bytes of its weights (0: not known)."""

    where: dict[str, Any]
    form: Form
    place: torch.device
    bytes: int = 0
    odd: dict[str, str] = field(default_factory=dict)  # see `folders.Folder`


@contextlib.contextmanager
def reported(spec: str) -> Iterator[None]:
    """What transformers, tokenizers or safetensors raise over a model, as one line.

    Of any kind, since a damaged or hostile folder makes them fail at any place; a panic of their Rust parts is no `Exception`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"--model {spec} could not be loaded: {one_line(error)}") from error


def find(spec: str, *, device: str = "auto", form: str = "auto", gguf_file: str | None = None) -> Found:
    """What `load` would load, checked as far as can be without loading; a local folder needs no import of transformers.

    Raises:
        UserError: no such device or model, or see `folders.check_folder`.
    """
    place = pick_device(device)
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        path, gguf_file = path.parent, path.name
    # trust_remote_code: False also keeps transformers from asking on the terminal
    where: dict[str, Any] = {"trust_remote_code": False, **({"gguf_file": gguf_file} if gguf_file else {})}
    if path.is_dir():
        folder = folders.check_folder(path, gguf_file)
        where |= {"pretrained_model_name_or_path": str(path), "local_files_only": True}
        return Found(where, form_of(form, folder.config.get("architectures")), place, folder.bytes, folder.odd)
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1 or path.exists():
        raise UserError(f"--model {spec} is not a model folder, nor a .gguf file: give one of them, or a hub id")
    where["pretrained_model_name_or_path"] = spec
    from transformers import AutoConfig

    with reported(spec):
        return Found(where, form_of(form, getattr(AutoConfig.from_pretrained(**where), "architectures", None)), place)


def form_of(form: str, architectures: Any) -> Form:
    if form == "auto":
        names = architectures if isinstance(architectures, list) else ()
        form = "masked" if any("MaskedLM" in str(name) for name in names) else "causal"
    return "masked" if form == "masked" else "causal"


def check_size(spec: str, shape: torch.nn.Module, size: int) -> None:
    """Refuse a configuration that describes more than its files can hold: what is not in them would be allocated and made up."""
    weights = sum(p.numel() for p in shape.parameters())
    buffers = sum(b.numel() * b.element_size() for b in shape.buffers())
    if size and (weights > folders.WEIGHTS_A_BYTE * size or buffers > max(folders.WEIGHTS_A_BYTE * size, 1 << 30)):
        raise UserError(
            f"--model {spec}: its config.json describes {weights:,} weights and {buffers:,} bytes of buffers, its files hold {size:,} bytes: "
            "one of them is another model's"
        )


def check_dtypes(spec: str, shape: torch.nn.Module, odd: dict[str, str]) -> None:
    """Refuse weights that are no floating-point numbers: transformers would take the integers of a quantised file for the weights, and the real
    parts of complex ones. Buffers and masks may be such."""
    base = getattr(shape, "base_model_prefix", "")
    known = {n for name, p in shape.named_parameters() if p.is_floating_point() for n in (name, name.removeprefix(f"{base}."))}
    if wrong := sorted(name for name in odd if name in known):
        raise UserError(
            f"--model {spec}: {len(wrong)} of its weights are no floating-point numbers, {wrong[0]} is {odd[wrong[0]]}: "
            "give the model that it was quantised or converted from"
        )


def check_tokenizer(spec: str, tokenizer: Any) -> None:
    """Refuse a tokenizer without a vocabulary, which transformers makes where files are missing."""
    ids = tokenizer("a film was great", add_special_tokens=False).input_ids
    if not ids or all(i == tokenizer.unk_token_id for i in ids):
        raise UserError(
            f"--model {spec}: its tokenizer ({type(tokenizer).__name__}, {len(tokenizer):,} tokens) knows no English word: "
            "restore tokenizer.json, or copy the tokenizer of the model that it was made from"
        )


def same_every_time(tokenizer: Any) -> list[str]:
    """Turn off BPE dropout, by which a tokenizer that was saved in the middle of a training cuts a text anew each time; returns notes."""
    pieces = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if pieces is None or not getattr(pieces, "dropout", None):
        return []
    pieces.dropout = None
    return ["the tokenizer's dropout was turned off: it would cut a text into other tokens each time"]


def check_loaded(spec: str, model: Any, report: dict[str, Any]) -> list[str]:
    """Refuse a model of which a part was made up or left out, or whose weights are not finite; returns notes for the user.

    Tensors of the files that have no place in the model are left out by transformers. A pooler or another head may be; not a layer beyond
    the configured number, nor a bias of a module that the model has without.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"--model {spec} is an adapter of peft: give its base model, and the adapter as --adapter")
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if odd := sorted(report["mismatched_keys"]):
        name, held, wanted = odd[0]
        raise UserError(
            f"--model {spec}: {len(odd)} tensors have other shapes than its config.json says, {name} {list(held)} and not {list(wanted)}: "
            "one of them is another model's"
        )
    if missing:
        instead = f"; it has {shortened(unexpected, 3, 80)} instead" if unexpected else ""
        raise UserError(
            f"--model {spec} lacks {len(missing)} tensors of {type(model).__name__}: {shortened(missing, 3, 80)}{instead}; "
            "they would be random numbers: choose a complete checkpoint of a language model"
        )
    names = {re.sub(r"\d+", "N", name) for name, _ in model.named_parameters()}
    owners = {name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    lost = [n for n in unexpected if re.sub(r"\d+", "N", n) in names or n.rpartition(".")[0] in owners]
    if lost:
        raise UserError(
            f"--model {spec} has {len(lost)} tensors that its config.json leaves no place for: {shortened(lost, 3, 80)}: "
            "one of them is another model's"
        )
    for name, p in model.named_parameters():
        if library(p) or not p.is_floating_point() or not p.numel():
            continue
        if not all(torch.isfinite(edge) for edge in torch.aminmax(p.detach())):
            raise UserError(
                f"--model {spec}: {name} holds NaN or an infinity in {p.dtype}: choose another --dtype, or fetch the model again"
            )
    return [printable(f"not loaded, being no part of {type(model).__name__}: {shortened(unexpected, 3, 80)}")] if unexpected else []


@torch.no_grad()
def check_forward(spec: str, model: Any, form: Form) -> None:
    """One forward pass of a few tokens: it must go through, give finite numbers, and in a causal model not look ahead.

    A masked model that is called causal (--form, or a checkpoint without a kind) sees the padding and the answer; its scores look like any."""
    ids = torch.arange(8).reshape(2, 4) % model.get_input_embeddings().weight.shape[0]
    ids[1, :3] = ids[0, :3]
    with reported(spec):
        logits = model(input_ids=ids.to(model.device)).logits.float()
    if not torch.isfinite(logits).all():
        raise UserError(f"--model {spec}: its logits are not finite in {model.dtype}: choose another --dtype")
    # Equal up to the rounding of kernels that work on other shapes; what looks ahead differs by a share of the logits' own spread.
    near = 0.02 if model.dtype == torch.float32 else 0.1
    if form == "causal" and (logits[0, :3] - logits[1, :3]).abs().max() > near * logits.std():
        raise UserError(
            f"--model {spec}: {type(model).__name__} looks ahead, so it is no causal model: give --form masked, or another model"
        )


def load(
    spec: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    scales: bool = False,
    offload: str = "none",
    write_back: int = 0,
    room: Path | None = None,
    peft: str = "none",
    form: str = "auto",
    gguf_file: str | None = None,
    targets: list[str] | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_init: str | None = None,
    lora_freeze_a: bool = False,
    prefix_length: int | None = None,
    adapter: str | None = None,
    train_blocks: str | None = None,
    train_only: Sequence[str] | None = None,
) -> LanguageModel:
    """Load a model, in eval mode.

    Args:
        spec: a folder in transformers' format, a `.gguf` file, or a hub id.
        dtype: "float32", "float16", "bfloat16", or "auto": the dtype that the weights were saved in on a GPU, float32 on a CPU.
        device: "auto", or a torch device.
        quantize: "nf4", "int8", "int4", or None, see quantize.py; of a model that was saved packed, how it is, or None. scales: those of the packed
            weights are what is trained.
        offload: "cpu", "disk", or "none". write_back: as `zk.offload` has it. room: a folder, to be or there, on whose disk there is room for it.
        peft: one of `methods.PEFTS`.
        form: "causal", "masked", or "auto": what the model's configuration says.
        gguf_file: name of a GGUF file inside `spec`; its weights are dequantised.
        targets, lora_rank, lora_alpha, lora_init, prefix_length: of a new adapter, see `adapters.Adapter`.
        lora_freeze_a: of LoRA's two matrices the second one alone is trained.
        adapter: an adapter's folder, of the kind `peft`, to go on from.
        train_blocks, train_only: which part of the model, or of an adapter, is trained, see `blocks.train_part`; "dominant": see dominant.py.

    Raises:
        UserError: no such model, or the device, the dtype, the adapter or the part does not fit it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = find(spec, device=device, form=form, gguf_file=gguf_file)
    torch_dtype: Any = getattr(torch, dtype) if dtype != "auto" else (torch.float32 if found.place.type == "cpu" else "auto")
    auto_class = AutoModelForMaskedLM if found.form == "masked" else AutoModelForCausalLM
    packing = quantized_arguments(quantize, found.place, torch_dtype)
    with reported(spec):
        config = AutoConfig.from_pretrained(**found.where)
        if packed := packed_as(config):
            packing = arguments_of_packed(spec, quantize, packed, found.place)
        folders.check_numbers(config.to_dict(), f"--model {spec}")
        with torch.device("meta"):
            shape = auto_class.from_config(config, trust_remote_code=False)
        check_size(spec, shape, found.bytes)
        if not packed:
            check_dtypes(spec, shape, found.odd)
        tokenizer = AutoTokenizer.from_pretrained(**found.where)
        cut_anew = same_every_time(tokenizer)
        check_tokenizer(spec, tokenizer)
        if offload == "disk":
            kind = torch_dtype if isinstance(torch_dtype, torch.dtype) else config.dtype or torch.float32
            loaded: Any = away.empty(auto_class, config, kind), dict.fromkeys(REPORTED, ())
        else:
            loaded = auto_class.from_pretrained(
                **found.where, config=config, dtype=torch_dtype, output_loading_info=True, ignore_mismatched_sizes=True, **packing
            )
    model, report = loaded
    # Whatever stands in for the head of a forward, which is frozen then, stands there for all that run beside it.
    whole = peft == "none" and train_blocks is None and not train_only
    offloaded = None if offload == "none" else away.offload(spec, model, offload, found.place, write_back, room, whole)
    notes = [*check_loaded(spec, model, report), *cut_anew]
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and "gguf_file" in found.where and not quantizer.packed_modules:
        quantizer.remove_quantization_config(model)  # its weights are numbers as any others, and transformers would not save them
    if not packing and offloaded is None:  # which are where they were packed, or visit
        model = model.to(found.place)
    model = model.eval()
    keep_what_runs(model)
    if scales:
        model.requires_grad_(False)
        try:
            quantized_scales(model)  # before the first forward, which may put others into their place
        except ValueError as error:
            raise UserError(f"--quantize {quantize}: {one_line(error)}") from error
    check_forward(spec, model, found.form)
    named = None
    if train_blocks == DOMINANT:
        named = dominant(model, tokenizer)
        train_blocks = str(named.block)
        notes.append(str(named))
    adapted = adapt(
        LanguageModel(
            model, tokenizer, found.form, "none", found.place, notes, dominant=named, offloaded=offloaded, packed=packed or quantize
        ),
        Adapter(peft, targets, lora_rank, lora_alpha, lora_init, prefix_length),
        adapter,
        train_blocks,
    )
    if lora_freeze_a:
        adapters.freeze_first(adapted.model)
    blocks.train_part(adapted.model, train_blocks, train_only)
    return adapted


def adapt(base: LanguageModel, adapter: Adapter, folder: str | None = None, train_blocks: str | None = None) -> LanguageModel:
    """`base` with a new adapter, in some of its blocks alone if `train_blocks` says so, or that of a folder; the model in it is changed.

    Raises:
        UserError: it does not fit; or there is none, and something is said of one.
    """
    if adapter.kind == "none":
        if folder is not None or adapter != Adapter():
            said = f"--adapter {folder}" if folder is not None else "a size or a target"
            raise UserError(f"{said} is of an adapter, and --peft is none: say which kind, or leave it out")
        return base
    if folder is not None:
        held = folders.check_adapter(Path(folder).expanduser())
        if held.kind != adapter.kind:
            raise UserError(f"--adapter {folder} is of --peft {held.kind}, and --peft is {adapter.kind}: leave --peft out")
        adapter = replace(adapter, length=held.virtual_tokens)
    if (taken := adapter.virtual_tokens) >= base.max_length:
        raise UserError(f"--prefix-length {taken} leaves no room in a context of {base.max_length} tokens: give less")
    notes: list[str] = []
    if folder is None:
        model = adapters.add(base.model, base.tokenizer, base.form, adapter, train_blocks)
    else:
        model, notes = adapters.go_on(base.model, base.form, Path(folder).expanduser(), adapter.kind)
    return replace(base, model=model.eval(), peft=adapter.kind, virtual_tokens=taken, notes=[*base.notes, *notes])
