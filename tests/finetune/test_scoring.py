"""Scores: the one-forward path against the plain one, against the definition, and against the company an example keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast
from zo_finetune import model as models
from zo_finetune.errors import UserError
from zo_finetune.load import notes_on_texts
from zo_finetune.objectives import OBJECTIVES
from zo_finetune.scoring import Encoded, Encoder, Scorer, Span
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Candidate, Example, Form

from tests.finetune.conftest import FAMILIES, make_rows

# fp32 over inputs of different shape: matrix kernels sum in another order. Log-probabilities here are about -6: some 20 ulp.
CLOSE = {"rtol": 0.0, "atol": 1e-5}
ModelFolder = Callable[[str], Path]


@pytest.fixture(params=FAMILIES)
def loaded(request: pytest.FixtureRequest, model_folder: ModelFolder) -> Iterator[tuple[models.LanguageModel, Encoder, Scorer]]:
    lm = models.load(str(model_folder(request.param)), device="cpu")
    with Scorer(lm.model, lm.form, lm.pad_id) as scorer:
        yield lm, Encoder(lm.tokenizer, lm.form, lm.max_length), scorer


def examples(form: Any, n: int = 7) -> list[Example]:
    task = get_task("sst2")
    return [task.example(row, form) for row in make_rows(n, 3)]


def several_tokens(form: Any, n: int = 5) -> list[Example]:
    """Candidates of one, two and three tokens, and one example with fewer candidates."""
    out = []
    for k, e in enumerate(examples(form, n)):
        context, tail = e.candidates[0].context, e.candidates[0].tail
        words = (" great", " great great", " terrible great terrible")[: 3 if k else 2]
        out.append(Example(tuple(Candidate(context, w, tail) for w in words), k % 2))
    return out


@torch.no_grad()
def by_definition(lm: models.LanguageModel, example: Example) -> torch.Tensor:
    """Mean log p of each candidate's tokens, one forward of the whole text for each, every logit computed, no padding."""
    t = lm.tokenizer
    scores = []
    for candidate in example.candidates:
        answer = t(candidate.answer, add_special_tokens=False).input_ids
        if lm.form == "causal":
            ids = t(candidate.context).input_ids + answer
            where = range(len(ids) - len(answer) - 1, len(ids) - 1)
        else:
            masks = t.mask_token * len(answer)
            ids = t(candidate.context + masks + candidate.tail).input_ids
            where = [k for k, i in enumerate(ids) if i == t.mask_token_id]
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0].double()
        log_probs = logits.log_softmax(-1)
        scores.append(torch.stack([log_probs[p, a] for p, a in zip(where, answer, strict=True)]).mean())
    return torch.stack(scores).float()


def test_one_token_answers_share_one_input(loaded: tuple[models.LanguageModel, Encoder, Scorer]) -> None:
    lm, encoder, scorer = loaded
    encoded = [encoder.encode(e) for e in examples(lm.form)]
    assert all(len(e.inputs) == 1 and len(e.spans) == 2 for e in encoded)
    batch = scorer.collate(encoded)
    assert batch.input_ids.shape[0] == batch.point_rows.shape[0] == len(encoded)


@pytest.mark.parametrize("make", [examples, several_tokens])
def test_scores_are_the_definition(
    loaded: tuple[models.LanguageModel, Encoder, Scorer], make: Callable[..., list[Example]]
) -> None:
    lm, encoder, scorer = loaded
    chosen = make(lm.form)
    with torch.no_grad():
        scores = scorer.scores(scorer.collate([encoder.encode(e) for e in chosen]))
    for example, row in zip(chosen, scores, strict=True):
        n = len(example.candidates)
        torch.testing.assert_close(row[:n], by_definition(lm, example), **CLOSE)
        assert torch.isneginf(row[n:]).all()


def test_one_forward_equals_a_forward_per_candidate(loaded: tuple[models.LanguageModel, Encoder, Scorer]) -> None:
    lm, encoder, scorer = loaded
    with torch.no_grad():
        for example in examples(lm.form):
            together = scorer.scores(scorer.collate([encoder.encode(example)]))[0]
            apart = [scorer.scores(scorer.collate([encoder.encode(Example((c,), 0))]))[0, 0] for c in example.candidates]
            torch.testing.assert_close(together, torch.stack(apart), **CLOSE)


def test_scores_do_not_depend_on_the_batch(loaded: tuple[models.LanguageModel, Encoder, Scorer]) -> None:
    lm, encoder, scorer = loaded
    encoded = [encoder.encode(e) for e in [*examples(lm.form), *several_tokens(lm.form)]]
    assert len({e.length for e in encoded}) > 3  # so that there is padding to get wrong
    with torch.no_grad():
        alone = torch.stack(
            [
                torch.nn.functional.pad(s := scorer.scores(scorer.collate([e]))[0], (0, 3 - len(s)), value=-torch.inf)
                for e in encoded
            ]
        )
        together = scorer.scores(scorer.collate(encoded))
        backwards = scorer.scores(scorer.collate(encoded[::-1])).flip(0)
    torch.testing.assert_close(together, alone, **CLOSE)
    torch.testing.assert_close(backwards, alone, **CLOSE)


@pytest.mark.parametrize("peft", ["lora", "ln", "prefix", "prompt"])
def test_soft_prompts_do_not_shift_the_scored_positions(peft: str, model_folder: ModelFolder) -> None:
    """The gathered logits are those of the full output at the answer's place, wherever virtual tokens went."""
    lm = models.load(str(model_folder("llama")), device="cpu", peft=peft)
    with Scorer(lm.model, lm.form, lm.pad_id) as scorer, torch.no_grad():
        encoder = Encoder(lm.tokenizer, lm.form, lm.max_length)
        encoded = [encoder.encode(e) for e in examples("causal")]
        scores = scorer.scores(scorer.collate(encoded))
        for e, row in zip(encoded, scores, strict=True):
            last = lm.model(input_ids=torch.tensor([e.inputs[0]])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(row, torch.stack([last[s.targets[0]] for s in e.spans]), **CLOSE)


def test_other_forwards_are_left_alone(model_folder: ModelFolder) -> None:
    lm = models.load(str(model_folder("llama")), device="cpu")
    ids = torch.arange(10)[None]
    plain = lm.model(input_ids=ids).logits
    with Scorer(lm.model, lm.form, lm.pad_id):
        assert torch.equal(lm.model(input_ids=ids).logits, plain)
    assert not lm.model.get_output_embeddings()._forward_pre_hooks


def test_losses(model_folder: ModelFolder) -> None:
    lm = models.load(str(model_folder("gpt2")), device="cpu")
    encoder = Encoder(lm.tokenizer, lm.form, lm.max_length)
    chosen = several_tokens("causal")
    with Scorer(lm.model, lm.form, lm.pad_id) as scorer, torch.no_grad():
        table = [by_definition(lm, e) for e in chosen]
        classification = -torch.stack([row.log_softmax(0)[e.label] for row, e in zip(table, chosen, strict=True)]).mean()
        gold = [
            (row[e.label], e.label + 1) for row, e in zip(table, chosen, strict=True)
        ]  # candidate k of several_tokens has k + 1 tokens
        language = -sum(mean * n for mean, n in gold) / sum(n for _, n in gold)
        batch = scorer.collate([encoder.encode(e) for e in chosen])
        gold_batch = scorer.collate([encoder.encode(e, gold_only=True) for e in chosen])
        torch.testing.assert_close(OBJECTIVES["classification"].loss(scorer, batch), classification, **CLOSE)
        torch.testing.assert_close(OBJECTIVES["language-model"].loss(scorer, gold_batch), language, **CLOSE)


def test_a_16_bit_model_has_a_float32_loss(model_folder: ModelFolder) -> None:
    """Nothing behind the logits is rounded to 16 bits: scores and loss are those of a float64 computation from the same logits."""
    lm = models.load(str(model_folder("llama")), device="cpu", dtype="bfloat16")
    encoder = Encoder(lm.tokenizer, lm.form, lm.max_length)
    logits: list[torch.Tensor] = []
    lm.model.register_forward_hook(lambda module, given, output: logits.append(output.logits))
    with Scorer(lm.model, lm.form, lm.pad_id) as scorer, torch.no_grad():
        batch = scorer.collate([encoder.encode(e) for e in examples("causal")])
        found = scorer.token_log_probs(batch)
        loss = OBJECTIVES["classification"].loss(scorer, batch)
    assert logits[0].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    wanted = logits[0].double().log_softmax(-1)[batch.points, batch.targets]
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    scores = wanted.sum(-1) / batch.present.sum(-1)
    torch.testing.assert_close(loss.double(), torch.nn.functional.cross_entropy(scores, batch.labels), atol=1e-5, rtol=0)


TOKENS = (5, 6, 10, 7)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "roberta"])
def test_contrasts_are_the_scores_but_for_a_number_of_each_example(family: str, model_folder: ModelFolder) -> None:
    """With the head run for the answers' words alone where each is one token and nobody trains the head; its hooks and its forward stay what they are."""
    lm = models.load(str(model_folder(family)), device="cpu")
    head = lm.model.get_output_embeddings()
    widths: list[int] = []
    head.register_forward_hook(lambda module, given, output: widths.append(output.shape[-1]))
    where = (len(TOKENS) - 1,)
    one = [Encoded((TOKENS,), tuple(Span(0, where, (word,)) for word in words), 0) for words in ((9, 7, 8), (9, 11), (7, 8, 12))]
    for part, short in ((one, True), ([*one, Encoded((TOKENS,), (Span(0, (2, 3), (4, 9)), Span(0, where, (8,))), 0)], False)):
        with Scorer(lm.model, lm.form, lm.pad_id) as scorer:
            batch = scorer.collate(part)
            for trained in (True, False):
                head.requires_grad_(trained)
                widths.clear()
                scores, contrasts = scorer.scores(batch), scorer.contrasts(batch)
                assert widths == [lm.vocabulary, len(batch.words) if short and not trained else lm.vocabulary]
                assert "forward" not in head.__dict__ and torch.equal(scores.isinf(), contrasts.isinf())
                off = (scores - contrasts)[:, :1]
                there = ~scores.isinf()
                torch.testing.assert_close((scores - contrasts)[there], off.expand_as(scores)[there], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("context", "answer", "parted"),
    [
        ("a\n\n", "b", (["a", "Ċ", "Ċ"], ["b"])),  # alone, the context ends with one token of two new lines
        ("ab c", "d", (["ab"], ["Ġcd"])),
        ("a ", "cd", (["a"], ["Ġcd"])),
        ("ab", " cd", (["ab"], ["Ġcd"])),
    ],
)
def test_an_answers_tokens_are_those_with_a_character_of_it(context: str, answer: str, parted: tuple[list[str], list[str]]) -> None:
    """However the context alone is tokenized; and what is written follows the tokens that training has before an answer."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1000, special_tokens=["<s>"], initial_alphabet=alphabet)
    core.train_from_iterator(["ab", "a\n\n", " cd"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    assert tokenizer.tokenize("a\n\n")[-1] == "ĊĊ"
    example = Example((Candidate(context, f"{answer}\n"),), 0, references=((answer,),))
    encoded = Encoder(tokenizer, "causal", 64).encode(example)
    (span,) = encoded.spans
    found = [tokenizer.convert_ids_to_tokens(list(ids)) for ids in (encoded.prompt, span.targets[:-1])]
    assert found == [*parted] and encoded.inputs[0][: span.positions[0] + 1] == encoded.prompt


@pytest.mark.parametrize("form", ["causal", "masked"])
def test_special_tokens_in_a_text_are_told(form: Form, tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, form, 64)
    for sentence in ("a plain one", "cut </s> in two", "<mask> and <s>", "<pad>"):
        encoder.encode(get_task("sst2").example({"sentence": sentence, "label": 0}, form))
    assert encoder.special == 2
    assert notes_on_texts(encoder, 4, 64)[0].startswith("warning: 2 of 4 texts hold special tokens of the tokenizer")


def test_long_prompts_lose_their_beginning(causal_tokenizer: Any, tokenizer: Any) -> None:
    long = " ".join(f"word{k}" for k in range(50))
    for encoder in (Encoder(causal_tokenizer, "causal", 20), Encoder(tokenizer, "masked", 20)):
        candidates = tuple(Candidate(f"{long} It was", w, ".") for w in (" great", " terrible great"))
        encoded = encoder.encode(Example(candidates, 0))
        assert all(len(tokens) <= 20 for tokens in encoded.inputs)
        for tokens, span in zip(encoded.inputs, encoded.spans, strict=True):
            assert tokens[0] == 0  # <s>
            text = encoder.tokenizer.decode(tokens[: span.positions[0] + (encoder.form == "causal")])
            assert text.endswith("49 It was")


def test_encoder_errors(causal_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no mask token"):
        Encoder(causal_tokenizer, "masked", 20)
    with pytest.raises(UserError, match="has no token"):
        Encoder(causal_tokenizer, "causal", 20).encode(Example((Candidate("It was", ""),), 0))
    with pytest.raises(UserError, match="--max-length 2 leaves no room"):
        Encoder(causal_tokenizer, "causal", 2).encode(Example((Candidate("It was", " great great great"),), 0))
