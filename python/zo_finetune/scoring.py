"""Scores of candidate answers: tokens, batches, one forward pass for each distinct input, mean log-probability of the answer's
tokens.

    score(candidate) = 1/n sum_t log p(answer_t | what stands before it)          (MeZO, Malladi et al. 2023, appendix E)

Cost of a batch: one row of the forward pass per distinct input, and the vocabulary head at the scored positions only; and of that the
answers' words only, where an example's candidates are set against each other (`contrasts`) and nothing trains the head. A causal model
needs the answer's tokens but the last as input, so all one-token answers to one prompt share one row; a masked model reads masks in place
of the answer, so all answers of one length do.

Belongs here: everything between an `Example` and its scores. Does not belong here: what is made of them (objectives/, metrics/), files,
optimizers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from zo_finetune.chat import turns_of
from zo_finetune.data import in_batches
from zo_finetune.errors import UserError
from zo_finetune.frozen import Lower, Once, States
from zo_finetune.packed import Line, Packer
from zo_finetune.stand_ins import standing_in
from zo_finetune.tasks.base import Candidate, Example, Form

MOST_NEW = 50  # tokens of a free answer (MeZO's)


@dataclass(frozen=True)
class Span:
    """A candidate's answer: the token `targets[k]` is predicted at position `positions[k]` of input number `row`."""

    row: int
    positions: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: its distinct inputs, a span for each candidate; `label`, `right` and `references` are the example's. `prompt`: what a free
    answer follows, short enough for as many tokens behind it as `new_tokens` says."""

    inputs: tuple[tuple[int, ...], ...]
    spans: tuple[Span, ...]
    label: int
    right: frozenset[int] = frozenset()
    references: tuple[tuple[str, ...], ...] = ()
    prompt: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return max(map(len, self.inputs))


def new_tokens(max_length: int) -> int:
    """The most that a free answer may have; half of a short context is the prompt's."""
    return min(MOST_NEW, max_length // 2)


def right_ones(examples: Sequence[Encoded], width: int) -> Tensor:
    """bool [N, width]: which candidates count as right."""
    return torch.tensor([[k in (example.right or {example.label}) for k in range(width)] for example in examples], dtype=torch.bool)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Encoder:
    """Examples to tokens, for one tokenizer and one form of model.

    Args:
        tokenizer: of transformers.
        form: "causal" or "masked".
        max_length: the longest input in tokens; a longer context loses its beginning, since the question stands at its end.
        vocabulary: tokens that the model knows; one beyond, added to the tokenizer alone, would read other memory or fail.
        chat: a context is the user's turn of a chat, in the tokenizer's template, and an answer begins the assistant's (chat.py).

    `cut` counts the examples whose context lost its beginning, `special` those whose texts hold special tokens.

    Raises:
        UserError: a masked model's tokenizer has no mask token, a chat's no template, the special tokens around a text cannot be told from it, or
            (`encode`) an answer has no token, does not fit or is the same as another's, or a text has a token that the model has not.
    """

    def __init__(self, tokenizer: Any, form: Form, max_length: int, vocabulary: int | None = None, chat: bool = False) -> None:
        self.tokenizer, self.form, self.max_length, self.vocabulary = tokenizer, form, max_length, vocabulary
        self.cut = self.special = 0
        unread = {
            tokenizer.unk_token_id,
            tokenizer.pad_token_id,
        }  # what stands for other text; of some tokenizers the end token, too
        self._special = ({*tokenizer.all_special_ids} - unread) | {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._lost = 0
        self._known: dict[str, list[int]] = {}  # texts of the examples at hand -> tokens
        if form == "masked" and tokenizer.mask_token_id is None:
            raise UserError(
                "the tokenizer has no mask token, which a masked language model needs: choose another --model or --form causal"
            )
        if chat and form == "masked":
            raise UserError("--chat: a masked language model takes no turns: leave it out, or choose a causal --model")
        self.turns = turns_of(tokenizer) if chat else None
        self.before, self.after = self._around() if self.turns is None else ([], [])

    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text."""
        for text in ("a", "1", "the film"):
            plain, marked = self._ids(text), list(self.tokenizer(text).input_ids)
            for start in range(len(marked) - len(plain) + 1) if plain else ():
                if marked[start : start + len(plain)] == plain:
                    return marked[:start], marked[start + len(plain) :]
        raise UserError(
            f"{type(self.tokenizer).__name__} changes a text's tokens when it adds its special ones: choose another --model, or restore tokenizer.json"
        )

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._learn([text])
        return self._known[text]

    def _learn(self, texts: Iterable[str]) -> None:
        """Tokens of texts, in one call of the tokenizer."""
        new = [text for text in dict.fromkeys(texts) if text]
        if new:
            self._known.update(zip(new, self.tokenizer(new, add_special_tokens=False).input_ids, strict=True))
        self._known[""] = []

    def encode(self, example: Example, gold_only: bool = False) -> Encoded:
        """An example in tokens. `gold_only` keeps the right candidate alone, which is all that the language-model objective
        trains on."""
        return self.encode_all([example], gold_only)[0]

    def encode_all(self, examples: Sequence[Example], gold_only: bool = False) -> list[Encoded]:
        """Each example in tokens, as `encode` has it; every text is tokenized once, all of a piece together."""
        encoded = []
        for piece in in_batches(examples, 1000):
            self._learn(text for e in piece for c in self._chosen(e, gold_only) for text in self._texts(c))
            encoded += [self._encode(e, gold_only) for e in piece]
            self._known.clear()
        return encoded

    def _texts(self, candidate: Candidate) -> tuple[str, ...]:
        """What `_causal` or `_masked` asks for."""
        if self.form == "causal":
            context = self._context(candidate)
            return context, context + self._answer(candidate)
        return candidate.context, candidate.answer, candidate.tail

    def _context(self, candidate: Candidate) -> str:
        """What a causal model reads before the answer."""
        return candidate.context if self.turns is None else self.turns.context(candidate.context)

    def _answer(self, candidate: Candidate) -> str:
        return candidate.answer if self.turns is None else self.turns.answer(candidate.answer)

    @staticmethod
    def _chosen(example: Example, gold_only: bool) -> tuple[Candidate, ...]:
        return (example.candidates[example.label],) if gold_only else example.candidates

    def _parted(self, candidate: Candidate) -> tuple[list[int], list[int]]:
        """The tokens before the answer, and the answer's. The text is tokenized as one piece, as the model met such text in training; a token that has
        characters of both is the answer's. The context alone may have others: two new lines at its end are one token of GPT-2's, and before a word two."""
        before, text = self._texts(candidate)
        context, full = self._ids(before), self._ids(text)
        start = shared(context, full)
        if start < len(context) and self.tokenizer.is_fast:
            places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            start = next((k for k, (_, end) in enumerate(places) if end > len(before)), len(full))
        return full[:start], full[start:]

    def _causal(self, candidate: Candidate) -> tuple[list[int], list[int], list[int]]:
        """(input, positions, targets)."""
        prompt, targets = self._parted(candidate)
        body = self._fit(prompt, self.max_length - len(self.before) - len(targets) + 1, candidate)
        tokens = [*self.before, *body, *targets[:-1]]
        if len(self.before) + len(body) == 0:
            raise UserError(
                f"the prompt {candidate.context!r} has no token for the answer to follow: the tokenizer adds no start token"
            )
        first = len(self.before) + len(body) - 1
        return tokens, list(range(first, first + len(targets))), targets

    def _prompt(self, candidate: Candidate, span: Span) -> list[int]:
        if candidate.answer.endswith("\n") and "\n" not in self.tokenizer.decode(span.targets):
            raise UserError(
                f"{type(self.tokenizer).__name__} drops the newline that ends an answer, {candidate.answer!r:.80}: no model could learn where to end; "
                "choose another --model"
            )
        room = self.max_length - len(self.before) - new_tokens(self.max_length)
        return [*self.before, *self._fit(self._parted(candidate)[0], room, candidate)]

    def _masked(self, candidate: Candidate) -> tuple[list[int], list[int], list[int]]:
        targets, tail = self._ids(candidate.answer), self._ids(candidate.tail)
        room = self.max_length - len(self.before) - len(self.after) - len(tail) - len(targets)
        head = [*self.before, *self._fit(self._ids(candidate.context), room, candidate)]
        tokens = [*head, *[self.tokenizer.mask_token_id] * len(targets), *tail, *self.after]
        return tokens, list(range(len(head), len(head) + len(targets))), targets

    def _fit(self, context: list[int], room: int, candidate: Candidate) -> list[int]:
        head = tail = 0  # tokens of a chat's turns, which stay
        if self.turns is not None:
            head, tail = shared(self._ids(self.turns.before), context), len(self._ids(self.turns.after))
        if room < head + tail + 1:
            raise UserError(
                f"--max-length {self.max_length} leaves no room for a prompt beside the answer {candidate.answer!r}: raise it"
            )
        self._lost += len(context) > room
        return context[:head] + context[head - room :] if len(context) > room else context

    def _encode(self, example: Example, gold_only: bool) -> Encoded:
        chosen = self._chosen(example, gold_only)
        rows: dict[tuple[int, ...], int] = {}
        spans: list[Span] = []
        owners: dict[Span, Candidate] = {}
        before = self._lost
        for candidate in chosen:
            tokens, positions, targets = self._causal(candidate) if self.form == "causal" else self._masked(candidate)
            if not targets:
                raise UserError(f"the answer {candidate.answer!r} has no token: a candidate needs text to be scored on")
            if self.vocabulary is not None and max(*tokens, *targets) >= self.vocabulary:
                self._refuse(max(*tokens, *targets), candidate)
            span = Span(rows.setdefault(tuple(tokens), len(rows)), tuple(positions), tuple(targets))
            if (twin := owners.setdefault(span, candidate)) != candidate:
                raise UserError(
                    f"the answers {twin.answer!r} and {candidate.answer!r} are the same tokens {list(targets)} to {type(self.tokenizer).__name__}: "
                    "no score could tell them apart; choose another --model"
                )
            spans.append(span)
        prompt = self._prompt(chosen[0], spans[0]) if example.references else []
        self.cut += self._lost > before
        if self.turns is None:  # a chat's own are in its every text
            self.special += any(not self._special.isdisjoint(self._ids(text)) for c in chosen for text in self._texts(c))
        label, right = (0, frozenset[int]()) if gold_only else (example.label, example.right)
        return Encoded(tuple(rows), tuple(spans), label, right, example.references, tuple(prompt))

    def _refuse(self, token: int, candidate: Candidate) -> None:
        word = self.tokenizer.convert_ids_to_tokens(token)
        raise UserError(
            f"the text {candidate.context[-60:]!r} has the token {word!r}, number {token} of a model with {self.vocabulary}: it was added to the "
            "tokenizer alone; take it out of the text, or choose a model whose embedding was resized"
        )


@dataclass(frozen=True)
class Batch:
    """Examples side by side, on the model's device. B examples, C candidates (the most of any), R rows, L tokens, P scored
    positions, T the longest answer."""

    input_ids: Tensor  # [R, L], padded on the right
    attention_mask: Tensor | None  # [R, L]; None for a causal model, whose tokens never see what follows them
    point_rows: Tensor  # [P]
    point_columns: Tensor  # [P], counted from the end of the padded row: a soft prompt put before the tokens does not shift them
    points: Tensor  # [B, C, T], index into P
    targets: Tensor  # [B, C, T], token ids
    present: Tensor  # [B, C, T], fp32: 1 where the candidate has a t-th answer token
    labels: Tensor  # [B]
    right: Tensor  # [B, C], bool: whether the candidate counts as right
    words: Tensor | None = (
        None  # [W]: the answers, where each is one token and an example's all stand at one position; None: they do not
    )
    words_at: Tensor | None = None  # [B, C], index into W
    states: Tensor | None = None  # [R, L, H]: what comes out of the blocks that need not run again (frozen.py)
    line: Line | None = field(
        default=None, kw_only=True
    )  # of which its one row of tokens is made (packed.py); None: its rows are the inputs


def padded(inputs: Sequence[Sequence[int]], form: Form, pad_id: int, multiple: int = 1) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens as `input_ids` and `attention_mask` of a `Batch`, on the CPU."""
    width = -(-max(map(len, inputs)) // multiple) * multiple
    input_ids = torch.tensor([[*tokens, *(pad_id,) * (width - len(tokens))] for tokens in inputs], dtype=torch.long)
    mask = (torch.arange(width) < torch.tensor([*map(len, inputs)])[:, None]).long()
    return input_ids, mask if form == "masked" else None


def collate(examples: Sequence[Encoded], form: Form, pad_id: int, device: torch.device, multiple: int = 1) -> Batch:
    """The batch of some encoded examples, padded to a width that is a multiple of `multiple`: fewer different shapes."""
    inputs: list[tuple[int, ...]] = []
    points: dict[tuple[int, int], int] = {}
    shape = (len(examples), max(len(e.spans) for e in examples), max(len(s.targets) for e in examples for s in e.spans))
    of_tokens = [[[[0] * shape[2] for _ in range(shape[1])] for _ in examples] for _ in range(3)]
    where, targets, present = of_tokens  # lists, since a number is put into a tensor in microseconds
    for b, example in enumerate(examples):
        for c, span in enumerate(example.spans):
            for t, (position, target) in enumerate(zip(span.positions, span.targets, strict=True)):
                where[b][c][t] = points.setdefault((len(inputs) + span.row, position), len(points))
                targets[b][c][t], present[b][c][t] = target, 1
        inputs.extend(example.inputs)
    input_ids, mask = padded(inputs, form, pad_id, multiple)
    spots = torch.tensor(list(points))
    points_of, answers, there = (torch.tensor(one) for one in of_tokens)
    labels, right = torch.tensor([e.label for e in examples]), right_ones(examples, shape[1])
    words = words_at = None
    if shape[2] == 1 and all(len({(s.row, s.positions) for s in e.spans}) == 1 for e in examples):
        words, words_at = torch.unique(answers[..., 0], return_inverse=True)
    fields = (spots[:, 0], spots[:, 1] - input_ids.shape[1], points_of, answers, there.float(), labels, right)
    moved = [None if one is None else one.to(device) for one in (mask, words, words_at)]
    return Batch(input_ids.to(device), moved[0], *(f.to(device) for f in fields), *moved[1:])


class Scorer:
    """A model's scores of candidate answers.

    While it lives, a pre-hook on the output embedding hands that layer the scored positions alone; it works for every
    architecture with an output embedding, wherever padding or a soft prompt moves the positions, which transformers'
    `logits_to_keep` (one set of positions for all rows, causal models only) does not. Forward passes that are not this class's
    own are left as they are. `close`, or use as a context manager, removes the hook.

    Args:
        model: a causal or masked language model of transformers, perhaps inside a peft model.
        form: "causal" or "masked".
        pad_id: a token for the padding.
        tokenizer, max_length: what writing an answer needs besides (decoding/generate.py).
        states: of inputs whose forwards need not run the lower blocks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        form: Form,
        pad_id: int,
        tokenizer: Any = None,
        max_length: int = 2 * MOST_NEW,
        states: States | None = None,
    ) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise UserError(f"{type(model).__name__} has no output embedding: choose a causal or masked language model")
        self.model, self.form, self.pad_id, self.tokenizer, self.max_length = model, form, pad_id, tokenizer, max_length
        self.device = next(model.parameters()).device
        self.states = states
        self.packer: Packer | None = None  # of training batches (packing.py)
        self._head = head
        self._once: Once | None = None
        self._points: dict[int, tuple[Tensor, Tensor]] = {}  # of each thread's forward: those of an offloaded model take turns
        self._hook = head.register_forward_pre_hook(self._keep_points)

    def close(self) -> None:
        self._hook.remove()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _keep_points(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        points = self._points.get(threading.get_ident())
        if points is None:
            return None
        rows, columns = points
        hidden = args[0]
        return (hidden[rows, hidden.shape[1] + columns], *args[1:])

    def collate(self, examples: Sequence[Encoded], multiple: int = 1) -> Batch:
        batch = collate(examples, self.form, self.pad_id, self.device, multiple)
        if self.states is None:
            return batch
        inputs = [tokens for example in examples for tokens in example.inputs]
        return replace(batch, states=self.states.of(inputs, batch.input_ids.shape[1], self.device))

    def packed(self, batch: Any, examples: Sequence[Encoded]) -> Any:
        """The `Batch` of these examples with its rows as one sequence, where there is a packer and it pays; otherwise as it is."""
        lengths = [len(tokens) for example in examples for tokens in example.inputs]
        if self.packer is None or not self.packer.pays(lengths):
            return batch
        line, places = self.packer.of(batch.input_ids, lengths)
        rows, width = batch.input_ids.shape
        at = torch.empty(rows * width, dtype=torch.long, device=places.device)
        at[places] = torch.arange(len(places), device=places.device)
        columns = at[batch.point_rows * width + width + batch.point_columns] - len(places)
        ids, states = (None if x is None else x.flatten(0, 1)[places][None] for x in (batch.input_ids, batch.states))
        assert ids is not None
        where = {"point_rows": torch.zeros_like(columns), "point_columns": columns}
        return replace(batch, input_ids=ids, attention_mask=None, states=states, line=line, **where)

    @contextlib.contextmanager
    def once(self, lower: Lower | None) -> Iterator[None]:
        """Forwards inside run these blocks once for each batch, a `Batch` that stays the same object: while their weights stay. None: they run as ever."""
        self._once = None if lower is None else Once(lower)
        try:
            yield
        finally:
            self._once = None

    def outputs(self, input_ids: Tensor, attention_mask: Tensor | None, **more: Any) -> Any:
        """What the model returns for rows as a `Batch` has them."""
        if self.form == "masked":
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
        return self.model(input_ids=input_ids, use_cache=False, **more)

    def _logits(self, batch: Batch) -> Tensor:
        """At the scored positions, fp32 [P, V]."""
        self._points[threading.get_ident()] = where = batch.point_rows, batch.point_columns
        try:
            with contextlib.ExitStack() as stack:
                if self.states is not None and batch.states is not None:
                    stack.enter_context(self.states.lower.instead(batch.states))
                    if self.states.narrow is not None:
                        stack.enter_context(self.states.narrow.at(where, batch.input_ids.shape[1]))
                if self._once is not None:
                    stack.enter_context(self._once.forward(batch.input_ids))
                more = {}
                if batch.line is not None and self.packer is not None:
                    stack.enter_context(self.packer.apart(batch.line))
                    more["position_ids"] = batch.line.positions
                logits: Tensor = self.outputs(batch.input_ids, batch.attention_mask, **more).logits
        finally:
            del self._points[threading.get_ident()]
        if logits.ndim != 2 or logits.shape[0] != batch.point_rows.shape[0]:
            raise UserError(
                f"{type(self.model).__name__} returned logits of shape {tuple(logits.shape)} "
                f"for {batch.point_rows.shape[0]} positions: its output embedding does not make its logits; choose another --model"
            )
        return logits.float()

    def token_log_probs(self, batch: Batch) -> Tensor:
        """log p of every answer token, fp32 [B, C, T]; 0 where there is none.

        The logits go to fp32 before the logarithm: SPSA divides a difference of two losses by 2 eps, and a loss of 0.7 rounded
        to fp16 would come in steps of 0.24 at eps = 1e-3."""
        logits = self._logits(batch)
        log_probs = logits[batch.points, batch.targets] - torch.logsumexp(logits, -1)[batch.points]
        return torch.where(batch.present > 0, log_probs, 0.0)

    def scores(self, batch: Batch) -> Tensor:
        """Mean log-probability of every candidate's answer, fp32 [B, C]; -inf where an example has fewer candidates."""
        counts = batch.present.sum(-1)
        return torch.where(counts > 0, self.token_log_probs(batch).sum(-1) / counts, -torch.inf)

    def sums(self, batch: Batch) -> Tensor:
        """Log-probability of every candidate's answer, fp32 [B, C]; -inf where an example has fewer candidates."""
        return torch.where(batch.present.any(-1), self.token_log_probs(batch).sum(-1), -torch.inf)

    def contrasts(self, batch: Batch) -> Tensor:
        """`scores`, but for a number of each example: enough where its candidates are set against each other. fp32 [B, C].

        Where the candidates of each example are one token each at one position, that number is what their log-probabilities have in common, so that the head
        is run for these words alone; it has to be a plain linear layer that nobody trains."""
        if batch.words is None or batch.words_at is None or type(self._head) is not torch.nn.Linear or self._trained(self._head):
            return self.scores(batch)
        weight, bias = self._head.weight[batch.words], None if self._head.bias is None else self._head.bias[batch.words]
        with standing_in({self._head: lambda hidden: torch.nn.functional.linear(hidden, weight, bias)}):
            logits = self._logits(batch)
        return torch.where(batch.present[..., 0] > 0, logits[batch.points[..., 0], batch.words_at], -torch.inf)

    @staticmethod
    def _trained(module: torch.nn.Module) -> bool:
        return any(p.requires_grad for p in module.parameters())
