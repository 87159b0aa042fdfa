"""Prompts in a tokenizer's chat template: what the model reads is what the template alone makes of it, each special token once."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import chat, files
from zo_finetune.cli import main
from zo_finetune.errors import UserError
from zo_finetune.incontext import BETWEEN
from zo_finetune.scoring import Encoder
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Candidate, Example

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>:\n{% endif %}"
TASK = get_task("sst2")


@pytest.fixture(scope="session")
def chatty(causal_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(causal_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def chat_model(model_folder: Callable[[str], Path], chatty: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path_factory.mktemp("chat") / "model"))
    chatty.save_pretrained(folder)
    return folder


def example(sentence: str = "the cast is warm") -> Example:
    return TASK.example({"sentence": sentence, "label": 1}, "causal")


def of_template(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False))


def test_tokens_are_the_templates_and_none_is_there_twice(chatty: Any) -> None:
    assert next(iter(chatty("a").input_ids)) == chatty.bos_token_id  # what a second one would come from
    encoded = Encoder(chatty, "causal", 64, chat=True).encode(example())
    prompt = of_template(chatty, "the cast is warm It was")
    answers = [chatty(word, add_special_tokens=False).input_ids for word in ("terrible", "great")]
    for span, answer in zip(encoded.spans, answers, strict=True):
        tokens = [*encoded.inputs[span.row][: span.positions[0] + 1], *span.targets]
        assert tokens == [*prompt, *answer]
        assert tokens.count(chatty.bos_token_id) == 1 and tokens.count(chatty.eos_token_id) == 1


def test_scores_are_those_of_the_template(chat_model: Path) -> None:
    from zo_finetune import model as models
    from zo_finetune.scoring import Scorer

    lm = models.load(str(chat_model), device="cpu")
    encoder = Encoder(lm.tokenizer, "causal", lm.max_length, lm.vocabulary, chat=True)
    with Scorer(lm.model, "causal", lm.pad_id) as scorer, torch.no_grad():
        scores = scorer.scores(scorer.collate([encoder.encode(example())]))[0]
    for score, word in zip(scores, ("terrible", "great"), strict=True):
        prompt, answer = (
            of_template(lm.tokenizer, "the cast is warm It was"),
            lm.tokenizer(word, add_special_tokens=False).input_ids,
        )
        with torch.no_grad():
            logits = lm.model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        wanted = sum(logits[len(prompt) - 1 + k, token] for k, token in enumerate(answer)) / len(answer)
        assert torch.isclose(score, wanted, atol=1e-5)


def test_a_long_prompt_loses_its_own_beginning(chatty: Any) -> None:
    """Not the template's, whose turns stay whole; the longest that fits is as the template has it."""
    full = of_template(chatty, "so " * 60 + "fine It was")
    head, tail = (len(chatty(text, add_special_tokens=False).input_ids) for text in ("<s><user>", "</s><assistant>:\n"))
    encoder = Encoder(chatty, "causal", 40, chat=True)
    (span, *_), inputs = (e := encoder.encode(example("so " * 60 + "fine"))).spans, e.inputs
    prompt = list(inputs[span.row][: span.positions[0] + 1])
    assert prompt == full[:head] + full[len(full) - (len(prompt) - head) :]
    assert len(prompt) + len(span.targets) - 1 == 40 and encoder.cut == 1
    short = Encoder(chatty, "causal", head + tail + 1, chat=True)
    with pytest.raises(UserError, match=r"--max-length \d+ leaves no room for a prompt"):
        short.encode(Example((Candidate("It was", " great great"),), 0))


def test_free_answers_have_the_template_too(chatty: Any) -> None:
    free = Example((Candidate("Question: who?\nAnswer:", " the cast\n"),), 0, references=(("the cast",),))
    encoded = Encoder(chatty, "causal", 200, chat=True).encode(free)
    assert list(encoded.prompt) == of_template(chatty, "Question: who?\nAnswer:")


def test_templates_that_are_none(causal_tokenizer: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"--chat: the model's tokenizer has no chat template: leave it out"):
        Encoder(causal_tokenizer, "causal", 64, chat=True)
    with pytest.raises(UserError, match=r"--chat: a masked language model takes no turns"):
        Encoder(tokenizer, "masked", 64, chat=True)
    for template, message in (
        ("{{ raise_exception('no\nuser') }}", "failed"),
        ("{% if", "failed"),
        ("hello", "shows the user's text 0 times"),
        ("{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}", "shows the user's text 2 times"),
    ):
        one = copy.deepcopy(causal_tokenizer)
        one.chat_template = template
        with pytest.raises(UserError, match=message) as caught:
            chat.turns_of(one)
        assert str(caught.value).isprintable()


def test_what_a_template_asks_for(causal_tokenizer: Any) -> None:
    """A date stands still, for a run that goes on another day; no thinking is begun before the answer."""
    one = copy.deepcopy(causal_tokenizer)
    thinks = "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    for form, day in (("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26")):
        one.chat_template = f"{{{{ strftime_now('{form}') }}}}{{{{ messages[0].content }}}}{thinks}"
        assert chat.turns_of(one) == chat.Turns(day, "<think></think>")


def test_runs_and_baselines(chat_model: Path, train_command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Demonstrations and neutral words are in the user's turn, too."""
    seen: list[str] = []
    context = chat.Turns.context

    def noted(self: chat.Turns, text: str) -> str:
        seen.append(text)
        return context(self, text)

    def before(name: str, *more: str) -> dict[str, Any]:
        assert main(train_command(tmp_path / name, "--no-save", *more, model=str(chat_model), steps=1)) == 0
        return files.read_json(tmp_path / name / "result.json")

    assert before("chat", "--chat")["before"] != before("plain")["before"]
    common = {"model": str(chat_model), "steps": None, "batch_size": 8, "dev_examples": None, "eval_examples": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat.Turns, "context", noted)
        assert main(train_command(tmp_path / "shots", "--chat", "--shots", "1", command="evaluate", **common)) == 0
        assert any(BETWEEN in text for text in seen)
        seen.clear()
        assert main(train_command(tmp_path / "calibrated", "--chat", "--calibrated", command="evaluate", **common)) == 0
        assert TASK.neutral.lstrip(" ") in seen
