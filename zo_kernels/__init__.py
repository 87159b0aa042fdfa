"""Fine-tune large language models with forward passes only, with noise regenerated from a seed. The public names, nothing else."""

from zo_kernels._backends import backends
from zo_kernels._replay import replay
from zo_kernels.linear import perturbed_linear
from zo_kernels.ops import RandomMask, normal, pack_mask, perturb_, perturb_sequence_
from zo_kernels.optim import *
from zo_kernels.optim import __all__ as _optim
from zo_kernels.parameters import stream_of

__version__ = "0.1.0"
__all__ = [
    *_optim,
    "RandomMask",
    "backends",
    "normal",
    "pack_mask",
    "perturb_",
    "perturb_sequence_",
    "perturbed_linear",
    "replay",
    "stream_of",
]
