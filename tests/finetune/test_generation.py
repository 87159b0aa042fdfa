"""Free answers: what is written equals a plain loop's, whatever stands beside it in a batch, in the model's folder or in front of the model; and what
is trained on them or on a metric.

Belongs here: decoding/generate.py, the answer's tokens, objectives that are metrics. Does not belong here: what a text is worth (test_scorers.py), prompts
of tasks (test_tasks.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from zo_finetune import model as models
from zo_finetune.decoding import DECODINGS
from zo_finetune.decoding.generate import NewlineCriterion
from zo_finetune.errors import UserError
from zo_finetune.metrics import METRICS
from zo_finetune.objectives import OBJECTIVES
from zo_finetune.scoring import Encoded, Encoder, Scorer, new_tokens
from zo_finetune.tasks import TASKS
from zo_finetune.tasks.base import Candidate, Example, Form, Row, Task

from tests.finetune.conftest import make_rows

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

    def __init__(self, folder: Path, raised: float = 3.0, peft: str = "none") -> None:
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
    encoded = bench.encode(examples())
    assert len({len(e.prompt) for e in encoded}) > 2  # so that there is padding to get wrong
    wanted = tuple(bench.loop(e.prompt) for e in encoded)
    assert len(set(map(len, wanted))) > 2  # rows end at different places
    assert bench.texts(encoded, 1) == bench.texts(encoded, 8) == bench.texts(encoded, 3) == wanted
    assert bench.texts(encoded[::-1], 3) == wanted[::-1]


@pytest.mark.parametrize("peft", ["lora", "ln", "prefix", "prompt"])
def test_texts_behind_an_adapter(peft: str, model_folder: ModelFolder) -> None:
    for family in ("llama", "gpt2"):
        bench = Bench(model_folder(family), raised=1.5, peft=peft)
        moved = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in (p for p in bench.lm.model.parameters() if p.requires_grad):
                p += torch.randn(p.shape, generator=moved) * 0.3
        encoded = bench.encode(examples())
        wanted = tuple(bench.loop(e.prompt) for e in encoded)
        assert any(wanted)
        assert bench.texts(encoded) == bench.texts(encoded, 3) == wanted


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
