"""What a model folder is, told before anything of it is loaded: its config.json, its weight files' outsides, its tokenizer's presence.

Belongs here: files and the numbers that say how large a model is. Does not belong here: transformers, tensors (model.py).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo_finetune.errors import UserError, did_you_mean, one_line, shortened
from zo_finetune.files import FOLDERS, JOURNAL

MAX_JSON = 1 << 26  # of an index: some 300,000 tensors; a config.json has a few thousand bytes
MAX_SIZE, MAX_LAYERS = 1 << 24, 4096  # of a width, a vocabulary, a context, in elements; of a model
WEIGHTS_A_BYTE = 8  # the most that any file format packs
SIZES = re.compile(
    r"(_size|_dim|_heads?|_layers?|_positions|_embeddings|_experts|_rank|n_embd|n_ctx|n_inner|d_model|d_ff|d_kv|ffn_dim|depth)$"
)
POSITIVE = {
    "d_model", "hidden_size", "intermediate_size", "max_position_embeddings", "n_embd", "n_head", "n_layer", "n_positions",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size",
}  # fmt: skip
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # in transformers' order
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
KINDS_OF_PEFT = {"LORA": "lora", "LN_TUNING": "ln", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal")  # of peft's init_lora_weights
MAX_RANK = 1 << 16
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Folder:
    """A model folder that may be loaded: `config` is config.json's content, or empty for a GGUF file; `bytes` of weights."""

    path: Path
    bytes: int
    config: dict[str, Any] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)  # tensors of no floating-point dtype -> that, by safetensors' names


def check_file(path: Path, option: str = "--model") -> int:
    """The size of a regular file with content of its own. `option`: that named it, or its folder."""
    if not path.is_file():
        raise UserError(
            f"{option}: {path} is {'no regular file' if path.exists() else 'not there'}: restore it, or fetch the {option.strip('-')} again"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS))
    if start == LFS:
        raise UserError(f"{option}: {path} is a pointer of Git LFS, and not the file itself: fetch it with git lfs pull")
    if size == 0:
        raise UserError(f"{option}: {path} is empty: fetch the {option.strip('-')} again")
    return size


def read_json(path: Path, option: str = "--model") -> dict[str, Any]:
    """An object out of a JSON file of bounded size and depth."""
    size = check_file(path, option)
    try:
        if size > MAX_JSON:
            raise ValueError(f"it has {size:,} bytes, and at most {MAX_JSON:,} are read")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it is {content!r:.40}, and not an object")
    except RecursionError:
        raise UserError(f"{option}: {path} is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{option}: {path} could not be read: {one_line(error)}") from error
    return content


def check_numbers(config: Any, where: str, depth: int = 0) -> None:
    """Refuse sizes that no model has, before anybody makes as many modules or takes as much memory."""
    if depth > 20:
        raise UserError(f"{where} is nested too deeply")
    items = config.items() if isinstance(config, dict) else ((None, item) for item in config) if isinstance(config, list) else ()
    for name, value in items:
        if isinstance(value, (dict, list)):
            check_numbers(value, where, depth + 1)
        elif isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
            most = MAX_LAYERS if re.search(r"layers?$|depth$", name) else MAX_SIZE
            if name in POSITIVE and value < 1:
                raise UserError(f"{where}: {name!r} is {value!r:.40}; it must be at least 1")
            if SIZES.search(name) and not value <= most:
                raise UserError(f"{where}: {name!r} is {value!r:.40}; at most {most:,} is possible")


def check_safetensors(path: Path, option: str = "--model") -> tuple[int, dict[str, str]]:
    """The size of a file whose header can be read and whose tensors end where it does, and the tensors in it that hold no floating-point numbers."""
    from safetensors import SafetensorError, safe_open

    size = check_file(path, option)
    try:
        with safe_open(path, framework="pt") as file:
            dtypes = {name: str(file.get_slice(name).get_dtype()) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{option}: {path} is damaged or was not written to its end ({one_line(error)}): fetch the {option.strip('-')} again"
        ) from error
    return size, {name: dtype for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))}


def weight_files(path: Path) -> list[Path]:
    """The files that transformers would read; those of an index must lie in the folder."""
    first = next((path / name for name in WEIGHTS if os.path.lexists(path / name)), None)
    if first is None:
        raise UserError(f"--model {path} holds no weights ({', '.join(WEIGHTS)}): it has {listing(path)}")
    if first.suffix != ".json":
        return [first]
    shards = read_json(first).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"--model: {first} must map names of tensors to files under 'weight_map'")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
            raise UserError(f"--model: {first} names {name!r:.80}, which is not in the folder: only files beside it are read")
    return [path / name for name in names]


def listing(path: Path) -> str:
    return shortened(sorted(os.listdir(path))) or "nothing"


def check_kind(path: Path) -> None:
    """Say what a folder is that is no model's."""
    if (path / "adapter_config.json").exists():
        base = "its base model"
        if isinstance(name := read_json(path / "adapter_config.json").get("base_model_name_or_path"), str):
            base += f" ({name[:80]})"
        raise UserError(
            f"--model {path} is an adapter of peft, and not a model: give {base}, and the adapter as --adapter to go on with it, or merge the two with peft"
        )
    if (path / JOURNAL).exists():
        saved = next((path / name for name in FOLDERS if (path / name).is_dir()), None)
        inside = "it saved no weights" if saved is None else f"its weights are in {saved}"
        raise UserError(f"--model {path} is a run of zo-finetune, and not a model: {inside}; `zo-finetune replay` makes them again")
    if not (path / "config.json").exists():
        files = [name for name in sorted(os.listdir(path)) if name.endswith(".gguf")]
        if files:
            raise UserError(f"--model {path} has no config.json, but GGUF files: give one, as {path / files[0]}")
        if (path / "params.json").exists():
            raise UserError(f"--model {path} has its makers' own format (params.json): convert it to that of transformers")
        raise UserError(f"--model {path} has no config.json, so it is no model in transformers' format: it holds {listing(path)}")


def check_folder(path: Path, gguf_file: str | None = None) -> Folder:
    """Look at everything that can be known without loading.

    Raises:
        UserError: the folder is no model's, or a file of it is damaged, missing, outside of it, or describes what cannot be.
    """
    try:
        if gguf_file:
            if Path(gguf_file).name != gguf_file or not (path / gguf_file).exists():
                hint = did_you_mean(gguf_file, os.listdir(path))
                raise UserError(f"--gguf-file {gguf_file!r} is not in {path}: it holds {listing(path)}{hint}")
            return Folder(path, check_file(path / gguf_file))
        check_kind(path)
        config = read_json(path / "config.json")
        check_numbers(config, f"--model: {path / 'config.json'}")
        size = 0
        odd: dict[str, str] = {}
        for file in weight_files(path):
            held, others = check_safetensors(file) if file.suffix == ".safetensors" else (check_file(file), {})
            size, odd = size + held, odd | others
        present = [name for name in os.listdir(path) if name in TOKENIZERS or re.search(r"\.(model|tiktoken)$|vocab", name)]
        if not present:
            raise UserError(
                f"--model {path} lacks a tokenizer ({', '.join(TOKENIZERS[:2])}, ...): copy the files of the model that it was made from; "
                f"it holds {listing(path)}"
            )
        for name in present:
            check_file(path / name)
        return Folder(path, size, config, odd)
    except OSError as error:
        raise UserError(f"--model {path}: {one_line(error)}") from error


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder that may be loaded: `kind` as --peft has it, `virtual_tokens` of a soft prompt."""

    kind: str
    virtual_tokens: int


def check_adapter_config(config: dict[str, Any], where: str) -> str:
    """The kind of adapter that a configuration of peft describes.

    Args:
        where: it comes from, for messages.

    Raises:
        UserError: of a kind that is not trained here, one that changes the base's weights, or with a size that is none.
    """
    kind = KINDS_OF_PEFT.get(str(config.get("peft_type")))
    if kind is None:
        raise UserError(f"{where} is of peft's kind {config.get('peft_type')!r:.40}: {', '.join(KINDS_OF_PEFT)} can go on here")
    if (begun := config.get("init_lora_weights", True)) not in KEEP_THE_BASE:
        raise UserError(
            f"{where}: its init_lora_weights is {begun!r:.40}, by which peft changes the base's weights as it is loaded: convert it with peft's "
            "path_initial_model_for_weight_conversion"
        )
    for name in ("r", "num_virtual_tokens"):
        if (size := config.get(name)) is not None and not (type(size) is int and 0 < size <= MAX_RANK):
            raise UserError(f"{where}: {name} is {size!r:.40}; it must be 1 to {MAX_RANK:,}")
    check_numbers(config, where)
    return kind


def check_adapter(path: Path) -> AdapterFolder:
    """Look at everything that can be known of an adapter's folder without loading.

    Raises:
        UserError: it is none of peft's, of a kind that is not trained here, changes the base's weights, or a file is damaged or missing.
    """
    where = f"--adapter {path}"
    try:
        if not (path / "adapter_config.json").exists():
            inside = f"; it has {path / 'adapter'}" if (path / "adapter").is_dir() else ""
            raise UserError(f"{where} has no adapter_config.json, so it is no adapter's folder of peft{inside}")
        config = read_json(path / "adapter_config.json", "--adapter")
        kind = check_adapter_config(config, where)
        if odd := check_safetensors(path / "adapter_model.safetensors", "--adapter")[1]:
            raise UserError(f"{where}: {min(odd)} holds no floating-point numbers")
        soft = kind in ("prefix", "prompt")
        if soft and "num_virtual_tokens" not in config:
            raise UserError(f"{where}: its adapter_config.json says no num_virtual_tokens")
        return AdapterFolder(kind, config["num_virtual_tokens"] if soft else 0)
    except OSError as error:
        raise UserError(f"{where}: {one_line(error)}") from error
