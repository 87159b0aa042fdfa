"""The bits of whole runs are those that were pinned, and a run that is copied, loaded, resumed or replayed has them too.

Belongs here: the comparison. Does not belong here: the runs and what of them is hashed (net.py), why a method's bits are right (test_methods.py).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import zo_kernels as zk
from tests.optim import net
from zo_kernels.optim.method import PARTS

PINNED = net.pinned()


@pytest.mark.parametrize("name", net.CASES)
def test_net(tmp_path: Path, name: str) -> None:
    with net.graphs(net.CASES[name]):
        warnings.simplefilter("ignore", zk.ZOWarning)
        found = net.run(name, tmp_path)
    assert not found.differs
    assert net.line_of(found.hashes) == PINNED[name]


def test_every_pinned_run_is_a_case() -> None:
    assert set(PINNED) == set(net.CASES)


def test_every_method_and_part_is_in_the_net() -> None:
    made = [case.optimizer(case.model()) for case in net.CASES.values()]
    assert set(zk.optim.METHODS) <= set(map(type, made))
    for what, parts in PARTS.items():
        assert set(parts) <= {type(getattr(step._run.method, what)) for step in made}
