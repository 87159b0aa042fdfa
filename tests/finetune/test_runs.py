"""The folder of a run and the end of one: what is neither written, read nor deleted there; full disks, interrupts, numbers that are not finite."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file
from zo_finetune import figures, files, run_folder
from zo_finetune import model as models
from zo_finetune.cli import main
from zo_finetune.objectives.classification import Classification
from zo_finetune.scoring import Scorer
from zo_finetune.tasks import get_task

from tests.finetune.calls import Calls
from zo_kernels import journal

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="session")
def arguments(train_command: Callable[..., list[str]]) -> Arguments:
    def build(output: Path | str, *more: str) -> list[str]:
        return train_command(output, *more, steps=4, dev_examples=4, eval_examples=6, lr="1e-3", eval_every=2)

    return build


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory, arguments: Arguments) -> Path:
    """A run that Ctrl-C ended in its third step."""
    folder, loss, calls = tmp_path_factory.mktemp("begun") / "run", Classification.loss, []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "loss", counted)
        assert main(arguments(folder)) == 130
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside the run's folder, which stays as it is."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def strict(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def last_line(capsys: Any) -> str:
    return capsys.readouterr().err.splitlines()[-1]


# ---- files that are none ----------------------------------------------------------------------------------------------------

NAMES = (*run_folder.FILES, files.JOURNAL, "result.json.part", "log.csv.part")


def put(kind: str, path: Path, victim: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match kind:
        case "link":
            path.symlink_to(victim)
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as it:
                it.bind(str(path))
        case "folder":
            path.mkdir()
        case "file":
            path.touch()


@pytest.mark.parametrize("kind", ["link", "pipe", "socket", "folder"])
def test_what_is_no_plain_file_is_refused(
    kind: str, run: Path, victim: Path, arguments: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(run)  # a socket's name is short
    for name in NAMES:
        kept = run.parent / "kept"
        if (run / name).exists():
            (run / name).rename(kept)
        put(kind, Path(name), victim)
        for command in (["resume", str(run)], arguments(run, "--overwrite")):
            assert main(command) == 2
            assert f"{name} is a {kind}; a run has a plain file there: move it away" in last_line(capsys)
        (run / name).rmdir() if kind == "folder" else (run / name).unlink()
        if kept.exists():
            kept.rename(run / name)


@pytest.mark.parametrize("name", ["model", "adapter", "weights.part"])
def test_folders_of_weights_are_folders(
    name: str, run: Path, tmp_path: Path, victim: Path, arguments: Arguments, capsys: Any
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for kind, other in (("link", tmp_path / "elsewhere"), ("file", victim)):
        put(kind, run / name, other)
        for command in (["resume", str(run)], arguments(run, "--overwrite")):
            assert main(command) == 2
            assert f"{name} is a {kind}; a run has a folder there" in last_line(capsys)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_sizes_are_bounded(run: Path, capsys: Any) -> None:
    for name in ("evaluations.jsonl", "log.csv", "result.json", "config.json"):
        os.truncate(run / name, 1 << 42)
        with pytest.raises(files.UserError, match=r"4,398,046,511,104 bytes, a run's has at most"):
            run_folder.Log.seconds(run / name) if name == "log.csv" else run_folder.Evaluations(
                run / name, get_task("sst2")
            ).recover(3)
    assert main(["resume", str(run)]) == 2
    assert "config.json has 4,398,046,511,104 bytes, a run's has at most" in last_line(capsys)


def test_a_journal_with_a_second_name_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    os.link(run / files.JOURNAL, tmp_path / "other.zoj")
    before = (tmp_path / "other.zoj").read_bytes()
    assert main(["resume", str(run)]) == 2
    assert "has a second name elsewhere" in last_line(capsys)
    assert (tmp_path / "other.zoj").read_bytes() == before


def test_what_is_written_is_new(drawn: None, run: Path, victim: Path, tmp_path: Path, capsys: Any) -> None:
    """Second names of a run's files, links inside its folder of weights: what they lead to stays, and so does a stranger's file."""
    for name in (*run_folder.FILES[1:3], "evaluations.jsonl", "result.json"):
        os.link(run / name, tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path) if (tmp_path / name).is_file()}
    (run / "model" / "config.json").unlink()
    (run / "model" / "config.json").symlink_to(victim)
    (run / "model" / "mine.txt").write_text("mine")
    assert main(["resume", str(run)]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not (run / "model" / "config.json").is_symlink()
    assert (run / "model" / "mine.txt").read_text() == "mine"
    result = strict(run / "result.json")
    assert result["saved"] == str(run / "model")
    assert {*result["saved_files"], "mine.txt"} == {*os.listdir(run / "model")}
    assert not [name for name in os.listdir(run) if name.endswith(files.PART)]


@pytest.mark.parametrize("where", ["in a folder", "by itself"])
def test_replay_waits_for_nothing(where: str, tmp_path: Path, model_folder: Callable[[str], Path], capsys: Any) -> None:
    source = tmp_path / "source"
    source.mkdir()
    os.mkfifo(source / files.JOURNAL)
    spec = source if where == "in a folder" else source / files.JOURNAL
    assert main(["replay", str(spec), "--model", str(model_folder("llama")), "--output", str(tmp_path / "out")]) == 2
    assert "is a pipe" in (said := last_line(capsys)) or "a regular file, this is none" in said
    assert main(["replay", "/dev/zero", "--model", str(model_folder("llama")), "--output", str(tmp_path / "out")]) == 2
    assert "a regular file, this is none" in last_line(capsys)
    assert not (tmp_path / "out").exists()


# ---- --overwrite ------------------------------------------------------------------------------------------------------------


def test_overwrite_deletes_only_runs(run: Path, tmp_path: Path, arguments: Arguments, capsys: Any) -> None:
    def refused(output: Path, *more: str) -> str:
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        assert main(arguments(output, "--overwrite", *more)) == 2
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
        return last_line(capsys)

    model, mine = tmp_path / "m", tmp_path / "mine"
    shutil.copytree(arguments(tmp_path)[2], model)
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "mine.txt").touch()
    for output in (model, mine):
        assert "never held a run of zo-finetune, and nothing in it is deleted" in refused(output)
    assert "--model " in (said := refused(run, "--model", str(run / "model"))) and "lies in what would be deleted" in said
    (tmp_path / "link").symlink_to(run / "model")
    assert "lies in what would be deleted" in refused(run, "--model", str(tmp_path / "link"))
    assert "--data " in (said := refused(run, "--data", str(run / "log.csv"))) and "lies in what would be deleted" in said
    (run / "config.json").write_text("{}")  # as a model's: not a run's
    assert "never held a run" in refused(run)
    (run / "config.json").unlink()
    assert run_folder.holds_run(run)  # its journal tells


# ---- full disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the journal", "the log", "the evaluations", "result.json"])
def test_a_full_disk_ends_with_what_to_do(
    what: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, full, left = tmp_path / "a run", OSError(errno.ENOSPC, "No space left on device"), [3]
    write, append = files.write_all, journal.Writer.append

    def refuse(call: Callable[..., None], *args: Any, **more: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise full
        call(*args, **more)

    def written(file: Any, content: bytes) -> None:
        wanted = {"the log": b",", "the evaluations": b'{"dev"', "result.json": b'{\n  "task"'}.get(what, b"nothing")
        if content.startswith(wanted) or (what == "the log" and content[:1].isdigit()):
            left[0] = min(left[0], 1)
            return refuse(write, file, content)
        return write(file, content)

    monkeypatch.setattr(files, "write_all", written)
    if what == "the journal":
        monkeypatch.setattr(journal.Writer, "append", lambda *args, **more: refuse(append, *args, **more))
    assert main(arguments(out)) == 2
    said = last_line(capsys)
    assert said.startswith("zo-finetune: error: ") and "No space left on device" in said
    assert said.endswith(f"free space there, then go on with: zo-finetune resume '{out}'")
    monkeypatch.setattr(files, "write_all", write)
    monkeypatch.setattr(journal.Writer, "append", append)
    assert main(["resume", str(out)]) == 0
    assert strict(out / "result.json")["steps"] == 4


def test_weights_that_could_not_be_saved(arguments: Arguments, tmp_path: Path, begun: Path, capsys: Any) -> None:
    """A limit of file sizes under which all fits but the weights: result.json is there and says so, and resume saves them."""
    out, most = tmp_path / "run", 80_000
    assert (begun / "model" / "model.safetensors").stat().st_size > most > (begun / files.JOURNAL).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        assert main(arguments(out)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = last_line(capsys)
    assert "the weights could not be saved in" in said and said.endswith(f"go on with: zo-finetune resume {out}")
    result = strict(out / "result.json")
    assert not result["interrupted"] and result["after"] and result["saved"] is None
    assert not (out / "model").exists() and not (out / run_folder.SAVING).exists()
    assert main(["resume", str(out)]) == 0
    again = strict(out / "result.json")
    assert again["saved"] and again["after"] == result["after"]
    assert load_file(out / "model" / "model.safetensors")


# ---- interrupts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "number", "said"),
    [
        ("scores", 1, "zo-finetune: interrupted; give the same command again (nothing was recorded yet)"),  # the evaluation before
        ("load", 1, "zo-finetune: interrupted; give the same command again (nothing was recorded yet)"),
        ("scores", 2, "interrupted after 0 of 4 steps; go on with: zo-finetune resume {out}"),  # of the dev examples
        ("scores", 5, "interrupted after 4 of 4 steps; go on with: zo-finetune resume {out}"),  # the one after
        ("save", 1, "zo-finetune: interrupted; go on with: zo-finetune resume {out}"),
        ("draw", 1, "zo-finetune: interrupted; go on with: zo-finetune resume {out}"),
    ],
)
def test_an_interrupt_says_how_to_go_on(
    place: str, number: int, said: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "run"
    places: dict[str, tuple[Any, str]] = {
        "scores": (Scorer, "scores"),
        "load": (models, "load"),
        "save": (models.LanguageModel, "save"),
        "draw": (figures, "draw_curve"),
    }
    owner, name = places[place]
    with monkeypatch.context() as patch:
        if place == "scores":  # an evaluation is one batch here, whose scores are counted; a step's are not
            scores = Scorer.scores

            def loss(self: Any, scorer: Scorer, batch: Any) -> torch.Tensor:
                return torch.nn.functional.cross_entropy(scores(scorer, batch), batch.labels)

            patch.setattr(Classification, "loss", loss)
        patch.setattr(owner, name, Calls(number).of(getattr(owner, name)))
        assert main(arguments(out)) == 130
    assert last_line(capsys) == said.format(out=out)
    if "resume" in said:
        assert main(["resume", str(out)]) == 0
        result = strict(out / "result.json")
        assert result["steps"] == 4 and result["after"] and not result["interrupted"]
        assert (out / "curve.png").is_file() and (out / "model").is_dir()
    else:
        assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_as_ctrl_c_does(
    number: signal.Signals, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = [signal.getsignal(n) for n in (number, signal.SIGINT)]
    monkeypatch.setattr(Classification, "loss", Calls(3, lambda: signal.raise_signal(number)).of(Classification.loss))
    assert main(arguments(tmp_path / "run", "--no-save")) == 128 + number
    assert last_line(capsys) == f"interrupted after 1 of 4 steps; go on with: zo-finetune resume {tmp_path / 'run'}"
    assert [signal.getsignal(n) for n in (number, signal.SIGINT)] == before


def test_a_run_without_a_journal_cannot_go_on(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Classification, "loss", Calls(4).of(Classification.loss))
    assert main(arguments(tmp_path / "run", "--no-save", "--method", "hybrid")) == 130
    assert last_line(capsys).endswith(
        "give the same command again with --overwrite (a run of --method hybrid has no journal to go on from)"
    )


def test_too_little_memory_is_said(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def exhausted() -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Classification, "loss", Calls(4, exhausted).of(Classification.loss))
    assert main(arguments(tmp_path / "run", "--no-save")) == 2
    said = last_line(capsys)
    assert f"go on with: zo-finetune resume {tmp_path / 'run'}; or begin anew with a smaller --batch-size" in said


# ---- numbers ----------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_not_finite_says_so(arguments: Arguments, tmp_path: Path, capsys: Any) -> None:
    """Weights that overflow: the steps after are skipped and told, and what has no score is no good answer. resume takes the nulls."""
    out = tmp_path / "run"
    assert main(arguments(out, "--lr", "1e4", "--dtype", "float16", "--no-save")) == 0
    said = capsys.readouterr().err
    assert "step 2 is the first that is skipped: a loss is not finite" in said
    assert "3 of 4 steps were skipped, since a loss was not finite: try a smaller --lr" in said
    assert "loss not finite" in said and "6 examples have no score" in said
    result = strict(out / "result.json")
    assert result["skipped_steps"] == 3
    after = result["after"]
    assert (after["loss"], after["auc"], after["accuracy"], after["without_score"]) == (None, None, 0.0, 6)
    assert sum(after["predicted"].values()) == 0
    (out / "result.json").unlink()
    assert main(["resume", str(out)]) == 0
    assert strict(out / "result.json")["history"] == result["history"]


def test_a_gradient_of_zero_is_told(arguments: Arguments, tmp_path: Path, capsys: Any) -> None:
    assert main(arguments(tmp_path / "run", "--eps", "1e-30", "--no-save", "--eval-every", "0")) == 0
    assert "the projected gradient was 0 in 4 of 4 steps: both losses of a step were the same to the bit" in capsys.readouterr().err
    assert strict(tmp_path / "run" / "result.json")["zero_gradient_steps"] == 4


# ---- paths ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", ["absolute", "as an earlier version did"])
def test_a_run_is_resumed_from_anywhere(
    recorded: str, begun: Path, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    command = arguments("out", "--no-save")
    for name, at in (("m", 2), ("d", 6)):
        shutil.copytree(command[at], home / name)
        command[at] = name
    monkeypatch.chdir(home)
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", Calls(6).of(Classification.loss))
        assert main(command) == 130
    config = json.loads((home / "out" / "config.json").read_text())
    assert [config["config"][name] for name in ("model", "data", "output")] == [str(home / name) for name in ("m", "d", "out")]
    if recorded != "absolute":
        config["config"] |= {"model": "m", "data": "./d", "output": "out"}
        files.write_json(home / "out" / "config.json", config)
    monkeypatch.chdir(other)
    assert main(["resume", str(home / "out")]) == 0
    (home / "m").rename(home / "moved")
    (home / "out" / "result.json").unlink()
    capsys.readouterr()
    assert main(["resume", str(home / "out")]) == 2
    said = last_line(capsys)
    assert f"the model that the run began with, {home / 'm'}, is gone" in said or "--model m could not be loaded" in said
