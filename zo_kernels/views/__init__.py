"""How a model sees theta + c z: in place, through a scratch buffer, or as dual numbers.

Belongs here: the names that the optimizer and a replay may use. Does not belong here: which c and z (optim/), the arithmetic (ops.py).

**In place** (inplace.py) writes theta + c z over the weights, so that any black-box closure works. Each pass rounds, and in 16 bits the
rounding does not come back. **Scratch** (scratch.py) leaves the weights alone: functions are given perturbed values instead of them.
Of sharded ones FSDP2's copies are perturbed (gathered.py).
**Tangents** (tangents.py) are a scratch view whose weights carry z as their tangent. **Visiting** (visiting.py) is one whose weights come and go (away.py).
"""

from zo_kernels.views.away import Away, Block, away_of, place_of, there
from zo_kernels.views.base import View, as_in_training, changed, gone
from zo_kernels.views.gathered import GatheredCopies
from zo_kernels.views.inplace import InPlace
from zo_kernels.views.memory import Owners, written
from zo_kernels.views.queued import Queued
from zo_kernels.views.scratch import Scratch, can_serve
from zo_kernels.views.tangents import Tangents
from zo_kernels.views.visiting import Visiting
from zo_kernels.views.work import Coefficient, Pull, RuleWork, Shift, Tag, Terms, Work

__all__ = [
    "Away",
    "Block",
    "Coefficient",
    "GatheredCopies",
    "InPlace",
    "Owners",
    "Pull",
    "Queued",
    "RuleWork",
    "Scratch",
    "Shift",
    "Tag",
    "Tangents",
    "Terms",
    "View",
    "Visiting",
    "Work",
    "as_in_training",
    "away_of",
    "can_serve",
    "changed",
    "gone",
    "place_of",
    "there",
    "written",
]
