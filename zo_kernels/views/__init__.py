"""How a model sees theta + c z: in place, through a scratch buffer, or as dual numbers.

Belongs here: the names that the optimizer and a replay may use. Does not belong here: which c and z (optim/), the arithmetic (ops.py).

**In place** (inplace.py) writes theta + c z over the weights, so that any black-box closure works. Each pass rounds, and in 16 bits the
rounding does not come back. **Scratch** (scratch.py) leaves the weights alone: functions are given perturbed values instead of them.
**Tangents** (tangents.py) are a scratch view whose weights carry z as their tangent.
"""

from zo_kernels.views.base import (
    Coefficient,
    Shift,
    Tag,
    Update,
    View,
    attention_as_in_training,
    changed,
)
from zo_kernels.views.inplace import InPlace
from zo_kernels.views.memory import overlap, written
from zo_kernels.views.scratch import Scratch
from zo_kernels.views.shadow import compiled
from zo_kernels.views.tangents import Tangents

__all__ = [
    "Coefficient",
    "InPlace",
    "Scratch",
    "Shift",
    "Tag",
    "Tangents",
    "Update",
    "View",
    "attention_as_in_training",
    "changed",
    "compiled",
    "overlap",
    "written",
]
