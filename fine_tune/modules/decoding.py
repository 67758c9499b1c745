"""Answers written together: a row that has ended makes room for the next one, so nothing is computed for it any more.

Shape letters: B answers being written, T columns, V vocabulary. Rows end at the same column, padded on the left.
"""

import inspect
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from fine_tune.device_memory import MEMORY_ERRORS, is_out_of_memory
from fine_tune.modules.row_cache import RowCache, can_keep_rows
from fine_tune.sampling import Sampling, next_tokens

PROMPT_SHARE = 8  # a forward pass over prompts takes this part of the budget: it holds more than keys and values
FULL_ENOUGH = 0.75  # of the rows; below it, ended ones leave the cache (a copy of it) and prompts are taken in


@dataclass(eq=False)
class Answer:
    """An answer that is being written.

    Args:
        key: What whoever asks knows it by.
        prompt: Token ids it follows.
        max_new_tokens: Tokens it may have.
        draw: Its random numbers.
        written: Its tokens so far, without the stop token.
        ended: Why no more follow; None while they do.
        is_told: Whether it was given back as ended.
    """

    key: Any
    prompt: list[int]
    max_new_tokens: int
    draw: random.Random
    written: list[int] = field(default_factory=list)
    ended: Literal["stop", "length"] | None = None
    is_told: bool = False

    @property
    def context(self) -> list[int]:
        return self.prompt + self.written

    @property
    def most_columns(self) -> int:
        return len(self.prompt) + self.max_new_tokens


class Decoder:
    """Write answers with a causal language model in evaluation mode.

    Args:
        model: A Hugging Face model, or a peft model around one.
        stop_ids: Tokens that end an answer.
        pad_token_id: Fills the space before shorter rows; it is masked.
        sampling: How tokens are chosen.
        max_tokens: Columns of all rows at once, padding and answers to come included.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Iterable[int],
        pad_token_id: int,
        sampling: Sampling,
        max_tokens: int,
    ) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model = base
        self.stop_ids, self.pad_token_id = set(stop_ids), pad_token_id
        self.sampling, self.max_tokens = sampling, max_tokens
        self.active: list[Answer] = []  # the rows of the cache, some of them ended
        self._cache = RowCache()
        self._mask_BT = torch.empty(0)
        self._takes = set(inspect.signature(self.model.forward).parameters)
        config: Any = self.model.config
        self._keeps_rows = not self.model._is_stateful and can_keep_rows(config)

    def write(
        self, answers: Iterable[Answer], out_of_memory: Callable[[list[Answer], int], None]
    ) -> Iterator[Answer]:
        """Write answers, those with long prompts first, and give each as soon as it has ended.

        Args:
            answers: What to write; one with tokens already goes on from them.
            out_of_memory: Told of the rows, and their columns, that did not fit; half as many are taken from then on.
        """
        waiting = deque(sorted(answers, key=lambda answer: -len(answer.prompt)))
        while waiting or self.active:
            taken = self._admitted(waiting)
            failed = False
            try:
                if taken:
                    self.start(taken)
                else:
                    self.step()
            except MEMORY_ERRORS as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
            if failed:  # outside of the handler, which holds on to the tensors of the failed pass
                rows = list(dict.fromkeys([*self.active, *taken]))
                self._forget()
                columns = max(row.most_columns for row in rows) * len(rows)
                out_of_memory(rows, columns)
                self.max_tokens = columns // 2
                waiting.extendleft(reversed([row for row in rows if row.ended is None]))
                yield from (row for row in rows if row.ended is not None and not row.is_told)
                continue
            yield from self.take_ended()

    def start(self, answers: list[Answer]) -> None:
        """Take prompts in and write the first token of each."""
        if not self._keeps_rows:
            self._write_all(answers)
            return
        columns = max(len(answer.context) for answer in answers)
        device = self.model.device
        ids_BT = torch.tensor([self._padded(a.context, columns) for a in answers], device=device)
        mask_BT = _mask([len(answer.context) for answer in answers], columns, device)
        cache = RowCache()
        position_ids_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        self._choose(answers, self._logits(ids_BT, mask_BT, position_ids_BT, cache))
        if self.active:
            self._cache.add(cache)
            more = columns - self._mask_BT.shape[1]
            pairs = ((self._mask_BT, max(0, more)), (mask_BT, max(0, -more)))
            padded = [torch.nn.functional.pad(mask, (missing, 0)) for mask, missing in pairs]
            self._mask_BT = torch.cat(padded)
        else:
            self._cache, self._mask_BT = cache, mask_BT
        self.active += answers

    def step(self) -> None:
        """Write the next token of every answer that has not ended."""
        device, pad = self.model.device, self.pad_token_id
        lasts = [[pad if answer.ended else answer.written[-1]] for answer in self.active]
        living = [[answer.ended is None] for answer in self.active]
        self._mask_BT = torch.nn.functional.pad(self._mask_BT, (0, 1), value=1)
        # an ended row may be past the model's positions: any will do for it
        positions_B1 = self._mask_BT.sum(-1, keepdim=True) - 1
        positions_B1 = positions_B1 * torch.tensor(living, device=device)
        ids_B1 = torch.tensor(lasts, device=device)
        self._choose(self.active, self._logits(ids_B1, self._mask_BT, positions_B1, self._cache))

    def take_ended(self) -> list[Answer]:
        """Return the answers that have ended since the last call, and make room for others where it is worth it."""
        ended = [a for a in self.active if a.ended is not None and not a.is_told]
        for answer in ended:
            answer.is_told = True
        rows = [i for i, answer in enumerate(self.active) if answer.ended is None]
        if not rows or not self._keeps_rows:
            self._forget()
        elif len(rows) <= FULL_ENOUGH * len(self.active):
            self._keep(rows)
        return ended

    def _keep(self, rows: list[int]) -> None:
        self.active = [self.active[i] for i in rows]
        kept = torch.tensor(rows, device=self._mask_BT.device)
        longest = max(len(answer.context) - 1 for answer in self.active)
        start = self._mask_BT.shape[1] - longest
        self._mask_BT = self._mask_BT[kept, start:]
        self._cache.keep(kept, start)

    def _admitted(self, waiting: deque[Answer]) -> list[Answer]:
        if not waiting or (self.active and not self._keeps_rows):
            return []
        columns = max(answer.most_columns for answer in [*self.active, waiting[0]])
        rows_that_fit = max(1, self.max_tokens // columns)
        if self.active and len(self.active) > FULL_ENOUGH * rows_that_fit:
            return []
        taken: list[Answer] = []
        longest = 0
        while waiting and len(self.active) + len(taken) < rows_that_fit:
            longest = max(longest, len(waiting[0].context))
            if taken and longest * (len(taken) + 1) > self.max_tokens / PROMPT_SHARE:
                break
            if waiting[0].most_columns > columns:
                break
            taken.append(waiting.popleft())
        return taken

    def _logits(
        self, ids_BT: Tensor, mask_BT: Tensor, position_ids_BT: Tensor, cache: RowCache
    ) -> Tensor:
        options: dict[str, Any] = {"position_ids": position_ids_BT, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in self._takes}
        output = self.model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _choose(self, answers: list[Answer], logits_BV: Tensor) -> list[int]:
        tokens = next_tokens(
            logits_BV,
            self.sampling,
            draws=[answer.draw for answer in answers],
            contexts=[answer.context for answer in answers]
            if self.sampling.repetition_penalty != 1
            else [],
        )
        for answer, token in zip(answers, tokens, strict=True):
            if answer.ended is not None:
                continue
            if token in self.stop_ids:
                answer.ended = "stop"
            else:
                answer.written.append(token)
                if len(answer.written) >= answer.max_new_tokens:
                    answer.ended = "length"
        return tokens

    def _write_all(self, answers: list[Answer]) -> None:
        """Write answers to their ends with the model's own cache, which may be of any kind."""
        self.active = answers
        columns = max(len(answer.context) for answer in answers)
        device = self.model.device
        choose = LogitsProcessorList([_Chosen(lambda logits: self._choose(answers, logits))])
        self.model.generate(
            input_ids=torch.tensor(
                [self._padded(a.context, columns) for a in answers], device=device
            ),
            attention_mask=_mask([len(a.context) for a in answers], columns, device),
            logits_processor=choose,
            max_new_tokens=max(a.max_new_tokens - len(a.written) for a in answers),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=None,
            pad_token_id=self.pad_token_id,
            eos_token_id=sorted(self.stop_ids),
        )

    def _padded(self, ids: list[int], columns: int) -> list[int]:
        return [self.pad_token_id] * (columns - len(ids)) + ids

    def _forget(self) -> None:
        self.active, self._cache, self._mask_BT = [], RowCache(), torch.empty(0)


class _Chosen(LogitsProcessor):
    """Leaves ``generate`` one token per row to choose from: the one chosen here."""

    def __init__(self, choose: Callable[[Tensor], list[int]]) -> None:
        self.choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = torch.tensor(self.choose(scores), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _mask(lengths: list[int], columns: int, device: torch.device) -> Tensor:
    at_T = torch.arange(columns, device=device)
    starts_B1 = torch.tensor([[columns - length] for length in lengths], device=device)
    return (at_T >= starts_B1).long()
