"""The compiled module zo_kernels._C, and whether it is the one that this Python code was written for.

Belongs here: its import, and what both sides must agree on. Does not belong here: calls of it (cpu.py, cuda.py).

A module of another version (an old build beside a new checkout) would read the tables at wrong places. So what Python relies on is compared
before the first call: the words of the structs, the codes, and the functions with the names of their arguments.
"""

from __future__ import annotations

import functools
import importlib
import re
from types import ModuleType
from typing import Any

from zo_kernels import checks, update
from zo_kernels.plan import WORDS

ISA_NAMES = ("best", "portable", "avx2", "avx512")
_PASS = "seed dtype kind rounding"
_TERMS = "tags coefs n_terms"
_SEQUENCE = f"seed dtype kind {_TERMS} first decays roundings n_passes"
_RULE = f"{_PASS} rule state_dtype {_TERMS} numbers squares"
_CUDA = "table map tiles tile"
FUNCTIONS = {
    "first_change": "objects attributes before",
    "first_replaced": "owners table names values",
    "cpu_best_isa": "",
    "cpu_perturb": f"table n {_PASS} {_TERMS} decay threads isa",
    "cpu_sequence": f"table n {_SEQUENCE} threads isa",
    "cpu_update": f"table states n {_RULE} threads isa",
    "cpu_magnitude_mask": "table limits n dtype threads isa",
}
CUDA_FUNCTIONS = {
    "cuda_perturb": f"{_CUDA} form {_PASS} {_TERMS} decay stream",
    "cuda_sequence": f"{_CUDA} form {_SEQUENCE} scratch stream",
    "cuda_update": f"{_CUDA} states {_RULE} stream",
    "cuda_magnitude_mask": f"{_CUDA} limits dtype stream",
    "cuda_status": "",
}


def expected() -> dict[str, Any]:
    """Attributes of the module, as this code uses them."""
    return {
        "TENSOR_WORDS": WORDS,
        "STATE_WORDS": update.STATE_WORDS,
        "MAX_RANK": checks.MAX_RANK,
        "DTYPES": tuple(str(dtype).removeprefix("torch.") for dtype in checks.DTYPES),
        "KINDS": tuple(checks.KINDS),
        "ROUNDINGS": tuple(checks.ROUNDINGS),
        "RULES": tuple((name, len(rule.numbers), len(rule.states)) for name, rule in update.RULES.items()),
        "ISA_NAMES": ISA_NAMES,
    }


def mismatch(module: Any) -> str | None:
    """The first thing in which the module is not the one that this code calls; None: it is that one."""
    for name, mine in expected().items():
        if (theirs := getattr(module, name, None)) != mine:
            return f"its {name} is {theirs!r}, this version's {mine!r}"
    wanted = FUNCTIONS | (CUDA_FUNCTIONS if getattr(module, "WITH_CUDA", False) else {})
    for name, arguments in wanted.items():
        signature = (getattr(getattr(module, name, None), "__doc__", None) or "").split("\n")[0]
        theirs = " ".join(re.findall(r"(\w+): ", signature))
        if not signature.startswith(name) or theirs != arguments:
            return f"its function {name} is {signature or 'missing'!r}, this version calls {name}({arguments.replace(' ', ', ')})"
    return None if hasattr(module, "INLINE_TERMS") and hasattr(module, "WITH_CUDA") else "it has no INLINE_TERMS or no WITH_CUDA"


@functools.cache
def extension() -> ModuleType | str:
    """zo_kernels._C, or the reason why it cannot be imported.

    Raises:
        ImportError: it can, and is another version's.
    """
    remedy = "build it with `pip install -e .` in the repository, or reinstall zo_kernels"
    try:
        module = importlib.import_module("zo_kernels._C")
    except ImportError as error:
        return f"the extension zo_kernels._C cannot be imported ({error}); {remedy}"
    if found := mismatch(module):
        where = getattr(module, "__file__", "zo_kernels._C")
        raise ImportError(f"the extension {where} is another version's: {found}; {remedy}")
    return module
