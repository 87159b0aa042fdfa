"""Free answers: what is written equals a plain loop's, whatever stands beside it in a batch, in the model's folder or in front of the model; and what
is trained on them or on a metric.

Belongs here: decoding/generate.py, the answer's tokens, objectives that are metrics. Does not belong here: what a text is worth (test_scorers.py), prompts
of tasks (test_tasks.py).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from zo_finetune import cli
from zo_finetune import model as models
from zo_finetune.config import Config
from zo_finetune.decoding import DECODINGS, Answers
from zo_finetune.decoding.generate import NewlineCriterion
from zo_finetune.errors import UserError
from zo_finetune.evaluate import evaluate
from zo_finetune.load import load
from zo_finetune.metrics import METRICS
from zo_finetune.objectives import OBJECTIVES, get_objective
from zo_finetune.scoring import Encoded, Encoder, Scorer, new_tokens
from zo_finetune.tasks import TASKS, get_task
from zo_finetune.tasks.base import Candidate, Example, Form, Row, Task

import zo_kernels as zk
from tests.finetune.conftest import make_rows, write_jsonl

ModelFolder = Callable[[str], Path]
NEWLINE, END = "\n", "</s>"


class Last(Task):
    """The last word of a sentence."""

    name, summary, fields = "last", "the last word of a sentence", ("sentence",)
    objective, decoding = "language-model", "generate"
    metrics: ClassVar = ("f1", "em", "loss")

    def example(self, row: Row, form: Form) -> Example:
        text = self.text(row, "sentence")
        answer = text.split()[-1]
        return Example((Candidate(f"{text}\nIt:", f" {answer}\n"),), 0, references=((answer,),))


@pytest.fixture(autouse=True)
def known_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "last", Last())


def examples(n: int = 8) -> list[Example]:
    return [Last().example(row, "causal") for row in make_rows(n, 5)]


class Bench:
    """A model with something that raises the logits of newline and end token, so that rows end at different places."""

    def __init__(self, folder: Path, raised: float = 2.0, peft: str = "none") -> None:
        self.lm = models.load(str(folder), device="cpu", peft=peft)
        self.tokenizer = self.lm.tokenizer
        self.newline, self.end = self.tokenizer(NEWLINE, add_special_tokens=False).input_ids[-1], self.tokenizer.eos_token_id
        self.max_length = self.lm.max_length
        self.encoder = Encoder(self.tokenizer, "causal", self.max_length)
        self.raised = raised
        self.lm.model.get_output_embeddings().register_forward_hook(self.raise_ends)

    def raise_ends(self, module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., self.newline] += self.raised
        logits[..., self.end] += self.raised
        return logits

    def scorer(self, pad_id: int | None = None) -> Scorer:
        return Scorer(self.lm.model, "causal", self.lm.pad_id if pad_id is None else pad_id, self.tokenizer, self.max_length)

    def encode(self, given: list[Example]) -> list[Encoded]:
        return self.encoder.encode_all(given)

    @torch.no_grad()
    def loop(self, prompt: tuple[int, ...]) -> str:
        """The definition: the most likely token, whole forwards without padding or a cache."""
        written: list[int] = []
        while len(written) < new_tokens(self.max_length):
            logits = self.lm.model(input_ids=torch.tensor([[*prompt, *written]]), use_cache=False).logits[0, -1]
            token = int(logits.argmax())
            if token == self.end:
                break
            written.append(token)
            if "\n" in self.tokenizer.decode(written):
                break
        return str(self.tokenizer.decode(written, skip_special_tokens=True)).split("\n")[0].strip()

    def texts(self, encoded: list[Encoded], batch_size: int = 8, **more: Any) -> tuple[str, ...]:
        with self.scorer(**more) as scorer:
            return DECODINGS["generate"].answers(Last(), scorer, encoded, batch_size).texts


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_texts_are_those_of_a_plain_loop_in_every_batch(family: str, model_folder: ModelFolder) -> None:
    bench = Bench(model_folder(family))
    encoded = bench.encode(examples(6))
    assert len({len(e.prompt) for e in encoded}) > 2  # so that there is padding to get wrong
    wanted = tuple(bench.loop(e.prompt) for e in encoded)
    assert len(set(map(len, wanted))) > 2  # rows end at different places
    assert bench.texts(encoded, 1) == bench.texts(encoded, 8) == wanted and bench.texts(encoded[::-1], 4) == wanted[::-1]


@pytest.mark.parametrize("peft", ["lora", "ln", "prefix", "prompt"])
def test_texts_behind_an_adapter(peft: str, model_folder: ModelFolder) -> None:
    bench = Bench(model_folder("gpt2" if peft == "prompt" else "llama"), raised=2.0, peft=peft)
    moved = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for p in bench.lm.model.parameters() if p.requires_grad):
            p += torch.randn(p.shape, generator=moved) * 0.3
    encoded = bench.encode(examples(5))
    wanted = tuple(bench.loop(e.prompt) for e in encoded)
    assert any(wanted)
    assert bench.texts(encoded) == bench.texts(encoded, 2) == wanted


def test_the_folders_configuration_of_generation_changes_nothing(model_folder: ModelFolder, tmp_path: Path) -> None:
    """It would sample, penalise, forbid and force tokens; it stays in the model, and is saved with it."""
    bench = Bench(model_folder("llama"))
    encoded = bench.encode(examples(4))
    wanted = bench.texts(encoded)
    config = bench.lm.model.generation_config
    config.update(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=9.0, min_new_tokens=9, no_repeat_ngram_size=1)
    config.update(
        suppress_tokens=[bench.newline, bench.end], forced_bos_token_id=5, forced_eos_token_id=7, num_beams=3, max_length=20
    )
    before = config.to_dict()
    assert bench.texts(encoded) == wanted
    assert bench.lm.model.generation_config is config and config.to_dict() == before


def test_the_padding_may_be_the_end_token(model_folder: ModelFolder) -> None:
    """The end token in a prompt is read, and so is the one that ends a text; any token pads as well."""
    bench = Bench(model_folder("llama"))
    given = [Example((Candidate(f"{END} the film{END} {'is ' * k}", " x\n"),), 0, references=(("x",),)) for k in range(5)]
    encoded = bench.encode(given)
    assert all(bench.end in e.prompt for e in encoded)
    wanted = tuple(bench.loop(e.prompt) for e in encoded)
    for pad_id in (bench.end, bench.newline, 7):
        assert bench.texts(encoded, pad_id=pad_id) == wanted


def test_an_end_token_that_only_the_folder_knows(model_folder: ModelFolder) -> None:
    """Chat models end a turn with a token that is not the tokenizer's end token."""
    bench = Bench(model_folder("llama"), raised=0.0)
    encoded = bench.encode(examples(1))
    first = int(bench.lm.model(input_ids=torch.tensor([encoded[0].prompt])).logits[0, -1].argmax())
    assert bench.texts(encoded) != ("",)
    bench.lm.model.generation_config.eos_token_id = [bench.end, first]
    assert bench.texts(encoded) == ("",)


def test_a_newline_of_several_tokens() -> None:
    """Tokens of which two make a newline, and one that is hidden behind half of a character."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<n": 0, "l>": 1, "a": 2, "<0xC3>": 3, "<0x0A>": 4, "?": 5}, unk_token="?"))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("<nl>", "\n")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ends = NewlineCriterion(tokenizer, 1)
    rows = torch.tensor([[9, 0, 2, 2], [9, 0, 1, 2], [9, 1, 0, 1], [9, 2, 3, 4], [9, 2, 4, 2]])
    done = [ends(rows[:, :width], None).tolist() for width in (2, 3, 4)]
    assert done == [[False] * 5, [False, True, False, False, True], [False, True, True, True, True]]
    assert ends.ends == {1: 2, 4: 2, 2: 3, 3: 3}


def test_a_long_prompt_leaves_room_for_the_answer(model_folder: ModelFolder) -> None:
    """It loses its beginning, so that the tokens of a whole answer fit the model's 64 positions; the end token and the newline are as good as never."""
    bench = Bench(model_folder("gpt2"), raised=-100.0)
    long = " ".join(f"word{k}" for k in range(50))
    [encoded] = bench.encode([Example((Candidate(f"{long}\nIt:", " x\n"),), 0, references=(("x",),))])
    assert len(encoded.prompt) == 32 == new_tokens(64) and bench.encoder.cut == 1
    assert encoded.prompt[0] == bench.tokenizer.bos_token_id
    assert bench.tokenizer.decode(encoded.prompt).endswith("word49\nIt:")
    assert len(bench.texts([encoded])[0]) > 20


def test_the_answer_is_trained_on_to_its_newline(model_folder: ModelFolder) -> None:
    bench = Bench(model_folder("llama"))
    [encoded] = bench.encode(examples(1))
    span = encoded.spans[0]
    assert bench.tokenizer.decode(span.targets) == f" {encoded.references[0][0]}\n"
    assert encoded.inputs[0][: len(encoded.prompt)] == encoded.prompt and span.positions[0] == len(encoded.prompt) - 1


def test_an_answer_without_tokens_or_end_is_refused(model_folder: ModelFolder) -> None:
    from tokenizers import normalizers

    bench = Bench(model_folder("llama"))
    with pytest.raises(UserError, match="has no token"):
        bench.encode([Example((Candidate("It:", ""),), 0, references=(("",),))])
    tokenizer = copy.deepcopy(bench.tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip(left=False)
    with pytest.raises(UserError, match=r"drops the newline that ends an answer, ' dull\\n'"):
        Encoder(tokenizer, "causal", 64).encode_all([Example((Candidate("It:", " dull\n"),), 0, references=(("dull",),))])


def test_no_gradient_and_the_loss_of_the_answers(model_folder: ModelFolder) -> None:
    """An evaluation's loss is the objective's over all examples: every token counts the same."""
    bench = Bench(model_folder("llama"))
    given = examples(5)
    given[0] = Example((Candidate(given[0].candidates[0].context, " a longer answer than the others\n"),), 0, references=(("x",),))
    encoded = bench.encode(given)
    with bench.scorer() as scorer:
        answers = DECODINGS["generate"].answers(Last(), scorer, encoded, 2)
        loss = OBJECTIVES["language-model"].loss(scorer, scorer.collate(encoded))
        assert not answers.scores.requires_grad and loss.requires_grad
        assert METRICS["loss"].measure(answers)["loss"] == pytest.approx(loss.item(), rel=1e-5)


def choices(n: int = 5) -> list[Example]:
    """Of an example's candidates several may be right."""
    answers, right = (" great", " terrible", " great great"), (frozenset({0, 1}), frozenset[int]())
    return [
        Example(tuple(Candidate(row["sentence"], w) for w in answers), row["label"], right[k % 2])
        for k, row in enumerate(make_rows(n, 3))
    ]


def test_a_metric_as_objective_is_what_an_evaluation_measures(model_folder: ModelFolder) -> None:
    """1 - the metric over the batch, 0-d and exact; by scores, with several right candidates, and by writing."""
    bench = Bench(model_folder("llama"), raised=1.0)
    sst2, last = get_task("sst2"), Last()
    given = [sst2.example(row, "causal") for row in make_rows(7, 3)]
    with bench.scorer() as scorer:
        for task, examples_of, names in (
            (sst2, given, ("accuracy", "auc")),
            (Several(), choices(), ("accuracy",)),
            (last, None, ("f1", "em")),
        ):
            encoded = bench.encode(examples() if examples_of is None else examples_of)
            evaluation = evaluate(task, scorer, encoded, 4)
            for name in names:
                objective = get_objective(name, task)
                loss = objective.loss(scorer, objective.batch(scorer, encoded))
                assert loss.shape == () and loss.dtype == torch.float64 and not loss.requires_grad
                assert loss.item() == pytest.approx(1 - evaluation[name])
                assert not objective.differentiable and objective.captured == (task is not last)
    alone = Answers(torch.tensor([[0.0, 1.0]] * 2), torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert METRICS["auc"].value(alone) == 0.5  # a batch without one of the labels


class Several(Task):
    name, metrics = "several", ("accuracy",)

    def example(self, row: Row, form: Form) -> Example:
        raise NotImplementedError


def test_writing_sees_the_perturbation(model_folder: ModelFolder) -> None:
    """Scratch mode puts theta + eps z in front of each layer's function: a text is that of weights which hold it."""
    seen: dict[str, list[tuple[str, ...]]] = {}
    for mode in ("scratch", "inplace"):
        bench = Bench(model_folder("llama"), raised=1.0)
        encoded, seen[mode] = bench.encode(examples(2)), []
        before = [p.clone() for p in bench.lm.model.parameters()]
        with bench.scorer() as scorer:
            objective = get_objective("f1", Last())

            def closure(batch: Any, scorer: Scorer = scorer, objective: Any = objective, texts: Any = seen[mode]) -> torch.Tensor:
                answers = objective.decoding.respond(Last(), scorer, batch)
                texts.append(answers.texts)
                return 1 - objective.metric.value(answers)

            optimizer = zk.MeZOStep(bench.lm.model, lr=0.0, eps=0.02, seed=1, perturbation=mode)
            optimizer.step(closure, [objective.batch(scorer, encoded)])
        seen[mode].append(bench.texts(encoded))
        if mode == "scratch":
            assert all(torch.equal(a, b) for a, b in zip(before, bench.lm.model.parameters(), strict=True))
    assert seen["scratch"] == seen["inplace"]
    assert len(set(seen["scratch"])) == 3  # above, below and without


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("sentences") / "all.jsonl", make_rows(40, 1))


def test_runs(train_command: Callable[..., list[str]], sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A free-answer task from the command line: its own loss, and a metric; F1 is what curves and tables show."""
    for objective in ("loss", "f1"):
        output = tmp_path / objective
        assert cli.main(train_command(output, task="last", data=sentences, objective=objective, steps=2, save=None)) == 0
        result = json.loads((output / "result.json").read_text())
        assert {"f1", "f1_stderr", "em", "em_stderr", "loss", "examples"} <= set(result["after"])
        assert result["hyperparameters"]["objective"] == {"loss": "language-model", "f1": "f1"}[objective]
        losses = [float(line.split(",")[1]) for line in (output / "log.csv").read_text().splitlines()[1:]]
        assert all(0 <= x <= 1 for x in losses) if objective == "f1" else all(x > 1 for x in losses)
    assert "after:  F1 " in capsys.readouterr().err


def test_accuracy_as_objective_raises_accuracy(train_command: Callable[..., list[str]], tmp_path: Path) -> None:
    """On rows that were never trained on, from chance; each loss is a share of the batch's 32."""
    options = {
        "objective": "accuracy",
        "batch_size": 32,
        "steps": 75,
        "lr": 6e-3,
        "eps": 3e-2,
        "dev_examples": 4,
        "eval_examples": 30,
    }
    assert cli.main(train_command(tmp_path / "run", "--no-save", **options)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    losses = [float(line.split(",")[1]) for line in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]]
    assert all(64 * x == int(64 * x) for x in losses)  # the mean of two
    assert result["before"]["accuracy"] < 0.55 and result["after"]["accuracy"] > result["before"]["accuracy"] + 0.1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"objective": "accuracy", "method": "forward-grad"}, "--objective accuracy has no derivative, and --method forward-grad differentiates the loss"),
        ({"objective": "accuracy", "method": "hybrid"}, "--objective accuracy has no derivative"),
        ({"objective": "accuracy", "method": "adam"}, "--objective accuracy has no derivative"),
        ({"objective": "accuracy", "method": "dizo", "options": "learn=backpropagation"}, "--objective accuracy has no derivative"),
        ({"objective": "f1"}, "--objective 'f1': task sst2: give loss, classification, language-model, pairs, accuracy, auc"),
        ({"objective": "acuracy"}, "did you mean 'accuracy'?"),
        ({"objective": "f1", "task": "last", "cuda_graph": True}, "writes answers, as many tokens as it takes"),
        ({"objective": "classification", "task": "last"}, "task last has one candidate for an answer: give loss, language-model, f1, em"),
    ],
)  # fmt: skip
def test_what_no_objective_can_be(more: dict[str, Any], said: str, data_folder: Path) -> None:
    options = dict(p.split("=") for p in more.pop("options", "").split(",") if p)
    config = Config(model="nowhere", output="", **{"task": "sst2", "data": str(data_folder), "options": options, **more})
    with pytest.raises(UserError, match=re.escape(said)):
        load(config)
