"""The description of an option, what is made of it, and how tasks, metrics and ways to decode are found."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import config as configuration
from zo_finetune import options, tasks, values
from zo_finetune.cli import build_parser
from zo_finetune.config import COMMANDS, Config
from zo_finetune.decoding import DECODINGS
from zo_finetune.errors import UserError
from zo_finetune.metrics import METRICS
from zo_finetune.objectives import OBJECTIVES
from zo_finetune.options import again, option
from zo_finetune.registry import discovered
from zo_finetune.tasks import TASKS
from zo_finetune.tasks.base import Task

import zo_kernels as zk
from zo_kernels import checks

ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Small:
    name: str = option("run", "what", path=True)
    count: int = option("run", "how many", 3, positive=True)
    share: float | None = option("method", "of it", None, least=True, fp32=True, usual="all", movable=True)
    kind: str = option("method", "which", "a", choices=("a", "b"))
    words: dict[str, str] = option("method", "more", {}, flag="--word", read=values.pair)
    loud: bool = option("run", "or not", False, negatable=True)


@dataclass(kw_only=True)
class Other:
    count: int = again(Small, "count", 5)


def parsed(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    options.add_options(parser, options.options_of(Small))
    return options.given(Small, parser.parse_args([*words]))


def test_one_description_makes_parser_checks_and_json() -> None:
    assert parsed("--name", "x") == {"name": "x"}  # what was not given has the set's own default
    given = parsed("--name", "x", "--count", "4", "--word", "a=1", "--word", "b=2", "--no-loud", "--share", "0.5")
    assert given == {"name": "x", "count": 4, "words": {"a": "1", "b": "2"}, "loud": False, "share": 0.5}
    small = Small(**given)
    options.check(small)
    assert options.of_json(Small, asdict(small), "here") == small
    assert Other().count == 5 and options.options_of(Other)[0].positive


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 0}, "--count 0 must be greater than 0"),
        ({"count": 1 << 31}, "--count 2147483648 must be below 2^31"),
        ({"share": -1.0}, "--share -1.0 must be at least 0"),
        ({"share": 1e-50}, "--share 1e-50 must be 1.18e-38 to"),
        ({"share": float("nan")}, "--share nan must be finite"),
        ({"kind": "c"}, "--kind 'c' must be one of a, b"),
        ({"name": ""}, "--name '' is no path"),
        ({"words": {"a": "\udce9"}}, "words {'a': '\\udce9'} is not valid UTF-8"),
    ],
)
def test_values_out_of_bounds_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        options.check(Small(**{"name": "x", **changes}))
    assert said in str(error.value)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="--word a is given twice"):
        parsed("--name", "x", "--word", "a=1", "--word", "a=2")


def test_the_first_difference_is_named() -> None:
    small, recorded = Small(name="x", share=0.5, kind="b"), asdict(Small(name="x"))
    assert options.difference(small, recorded, but=lambda o: o.movable) == "kind"
    assert options.difference(small, recorded, but=lambda o: False) == "share"
    assert options.difference(small, {}, but=lambda o: o.path) == "share"  # of the method before that of the run


def test_help_has_every_default_and_choice() -> None:
    words = {o.name: o.words() for o in options.options_of(Small)}
    assert words == {
        "name": "what", "count": "how many (default: 3)", "share": "of it (default: all)", "kind": "which (default: a)",
        "words": "more; repeatable", "loud": "or not (default: no)",
    }  # fmt: skip


def test_every_option_of_a_set_is_its_commands() -> None:
    """And a comparison has those that its runs share, and its own."""
    required = {
        "train": ["--model", "m", "--task", "t", "--data", "d", "--output", "o"],
        "compare": ["--model", "m", "--task", "t", "--data", "d", "--output", "o", "--methods", "mezo", "--forwards", "2"],
        "evaluate": ["--model", "m", "--task", "t", "--data", "d", "--output", "o"],
        "probe": ["--model", "m", "--task", "t", "--data", "d", "--output", "o"],
        "resume": ["o"],
        "replay": ["o", "--model", "m", "--output", "p"],
        "profile": ["--shape", "s", "--output", "o"],
        "suite": ["--suite", "mezo", "--model", "m", "--data", "d", "--output", "o"],
        "demo": [],
        "tasks": [],
    }
    for name, kind in COMMANDS.items():
        found = set(vars(build_parser().parse_args([name, *required[name]]))) - {"command"}
        assert found == {f.name for f in fields(kind)} | {o.name for o in configuration.shared(kind)}
    with pytest.raises(UserError, match="--form 'nonsense' must be one of auto, causal, masked"):
        Config(model="m", task="sst2", data="d", output="o", form="nonsense").check()


def test_choices_are_the_librarys() -> None:
    """Said again, since --help does not wait for torch."""
    choices = {o.name: o.choices for o in options.options_of(Config)}
    assert set(choices["backend"] or ()) == set(zk.backends())
    assert choices["rounding"] == ("auto", *checks.ROUNDINGS)
    assert all(hasattr(torch, name) for name in configuration.DTYPES)


def test_the_page_of_options_is_current() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == configuration.page(), "python -m zo_finetune.config > docs/options.md"


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys; from zo_finetune import cli; cli.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


NEW = """
from zo_finetune.tasks.base import ClassificationTask

class Mood(ClassificationTask):
    name, summary, fields, labels, words = "mood", "", ("text", "label"), ("low", "high"), (" low", " high")

    def prompt(self, row):
        return f"{row['text']} It is"
"""


def test_a_task_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sst2" in TASKS
    assert all(t.decoding in DECODINGS and t.objective in OBJECTIVES and set(t.metrics) <= set(METRICS) for t in TASKS.values())
    (tmp_path / "mood.py").write_text(NEW)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    found = discovered(tasks.__name__, tasks.__path__, Task)
    assert set(found) == {"mood", *TASKS}
    example = found["mood"].example({"text": "so", "label": 1}, "causal")
    assert [c.answer for c in example.candidates] == [" low", " high"] and example.label == 1
    (tmp_path / "again.py").write_text(NEW)
    with pytest.raises(ValueError, match=r"has another task called 'mood': rename one"):
        discovered(tasks.__name__, tasks.__path__, Task)
