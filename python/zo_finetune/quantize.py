"""How a base model's weights are packed as they are loaded: --quantize.

Belongs here: what transformers is told, and which library it needs. Does not belong here: what of a packed weight stands for it in a journal (zo_kernels).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from zo_finetune.errors import UserError

LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "int4": "torchao"}
TORCHAOS = {"Int8WeightOnlyConfig": "int8", "IntxWeightOnlyConfig": "int4", "Int4WeightOnlyConfig": "int4"}  # its names of the same
GROUP = 32  # weights that share a scale in 4 bits of torchao


def arguments(quantize: str | None, place: torch.device, dtype: torch.dtype | str) -> dict[str, Any]:
    """Of `from_pretrained`, beside its others; empty for None.

    nf4: bitsandbytes' 4 bits, two weights a byte. int8, int4: torchao's, of weights alone, so that a loss is as smooth as the unpacked model's in its
    activations (bitsandbytes' 8 bits round these too). int4 lies in a byte a weight on a CPU, and in half of one on a GPU, for which it needs bfloat16.

    Raises:
        UserError: the library is not installed.
    """
    if quantize is None:
        return {}
    check_installed(quantize)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantize == "nf4":
        compute = torch.bfloat16 if isinstance(dtype, str) else dtype
        how: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    else:
        how = TorchAoConfig(_of_torchao(quantize, place))
    return {"quantization_config": how, "device_map": {"": str(place)}}


def packed_as(config: Any) -> str | None:
    """How a model was saved, by its configuration: a name of --quantize where it is one of these, else the library's words; None: in numbers."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    said = said if isinstance(said, dict) else said.to_dict()
    if said.get("load_in_4bit"):
        return str(said.get("bnb_4bit_quant_type", "fp4"))
    of_torchao, library = said.get("quant_type"), said.get("quant_method")
    kind = str(of_torchao.get("default", {}).get("_type", "")) if isinstance(of_torchao, dict) else ""
    return TORCHAOS.get(kind, f"{getattr(library, 'value', library)} {kind}".strip())


def arguments_of_packed(spec: str, quantize: str | None, packed: str, place: torch.device) -> dict[str, Any]:
    """Of `from_pretrained`, for a model that was saved packed: its own configuration says how.

    Raises:
        UserError: it is to be packed in another way, or its library is not installed.
    """
    if quantize not in (None, packed):
        raise UserError(
            f"--quantize {quantize}: --model {spec} is packed already, as {packed}: leave it out, or give --quantize {packed}"
            if packed in LIBRARIES
            else f"--quantize {quantize}: --model {spec} is packed already, by {packed}: leave it out"
        )
    if packed in LIBRARIES:
        check_installed(packed)
    return {"device_map": {"": str(place)}}


def check_installed(quantize: str) -> None:
    """Raises UserError: the library that packs so is not there."""
    if importlib.util.find_spec(library := LIBRARIES[quantize]) is None:
        raise UserError(f"--quantize {quantize} needs {library}: pip install 'zo_kernels[quantized]'")


def _of_torchao(quantize: str, place: torch.device) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if quantize == "int8":
        return Int8WeightOnlyConfig(version=2)
    if place.type == "cpu":
        types: Any = torch  # whose stubs lack the narrow ones
        return IntxWeightOnlyConfig(weight_dtype=types.int4, granularity=PerGroup(GROUP))
    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
