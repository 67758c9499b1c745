"""An example -> ``input_ids`` and ``labels``: template, tokens, mask and truncation in this one place.

An example becomes segments of text, each supervised or not; the tokens of a supervised segment carry loss. The mask is
made by position, never by token id, so a pad token equal to EOS cannot hide the stop token.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fine_tune.data.formats import Example
from fine_tune.data.templates import RowError
from fine_tune.errors import UserError
from fine_tune.losses import IGNORE_INDEX

Truncation = Literal["drop", "prompt_left", "completion_right"]
AssistantTurns = Literal["all", "last"]
_OPEN, _CLOSE = (
    "\ue000",
    "\ue001",
)  # private-use characters around text that must not become a special token
_GUARDED_TEXT = re.compile(f"({_OPEN}[0-9a-f]*{_CLOSE})")


@dataclass(frozen=True)
class Segment:
    """A stretch of a row's text; supervised means its tokens carry loss."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class EncodedRow:
    """Token ids and labels of one row, and how many tokens truncation took away.

    Of a pair, the ids are those of the prompt, the chosen answer and the rejected answer, one after the other;
    ``num_prompt`` and ``num_chosen`` say where one ends (0 for any other row). ``problem`` says why nothing of a row
    can be learned once it is cut.
    """

    input_ids: list[int]
    labels: list[int]
    num_cut: int = 0
    num_supervised_cut: int = 0
    num_prompt: int = 0
    num_chosen: int = 0
    num_answers_cut: int = 0
    problem: str = ""


class Encoder:
    """Turn examples into token ids and labels.

    Args:
        tokenizer: A fast tokenizer with an EOS token (and a chat template for conversations).
        max_length: Tokens a row may have.
        truncation: What happens to longer rows (see ``truncate``).
        assistant_turns: Which assistant turns of a conversation carry loss.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        truncation: Truncation = "prompt_left",
        assistant_turns: AssistantTurns = "all",
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.truncation, self.assistant_turns = truncation, assistant_turns
        self.special_texts = sorted(
            {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}, key=len
        )
        guarded = [_OPEN, *reversed(self.special_texts)]
        self._guarded = re.compile("|".join(re.escape(text) for text in guarded))
        whole, plain = (
            list(tokenizer("a")["input_ids"]),
            self._ids(["a"], split_special_tokens=False)[0],
        )
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self._prefix_ids = whole[: next(starts, 0)]  # BOS, where the tokenizer puts one
        # SentencePiece and its like put a space before every text they are given:
        self._adds_space = str(tokenizer.convert_ids_to_tokens(plain[0])).startswith("\u2581")

    def guard(self, value: Any) -> Any:
        """Mark special-token text in a row's own data, so that it stays text."""
        if isinstance(value, str):
            return self._guarded.sub(
                lambda match: f"{_OPEN}{match[0].encode().hex()}{_CLOSE}", value
            )
        if isinstance(value, list):
            return [self.guard(item) for item in value]
        if isinstance(value, dict):
            return {key: self.guard(item) for key, item in value.items()}
        return value

    def segments(self, example: Example) -> list[Segment]:
        """Lay an example out as segments, the stop token included.

        Raises:
            RowError: A conversation the chat template refuses, or that rewrites earlier turns.
        """
        if "messages" in example:
            return self._chat_segments(example["messages"], example.get("tools"))
        eos = Segment(str(self.tokenizer.eos_token), True)
        if "text" in example:
            return [Segment(example["text"], True), eos]
        return [Segment(example["prompt"], False), Segment(example["completion"], True), eos]

    def encode(self, rows: list[list[Segment]], *, chat: bool) -> list[EncodedRow | None]:
        """Tokenize and truncate a batch of rows; None stands for a row the truncation policy drops."""
        return [
            truncate(ids, labels, self.max_length, self.truncation, self.num_kept(ids))
            for ids, labels in self.ids_and_labels(rows, chat=chat)
        ]

    def num_kept(self, ids: list[int]) -> int:
        """Return how many tokens at the beginning no truncation takes: BOS, where there is one."""
        return len(self._prefix_ids) if ids[: len(self._prefix_ids)] == self._prefix_ids else 0

    def ids_and_labels(
        self, rows: list[list[Segment]], *, chat: bool
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Tokenize a batch of rows, whatever their length.

        Segments are tokenized one by one, so that a prompt has the very tokens it has when the model is asked later.
        Tokenizers that put a space before every text (SentencePiece) get the whole row, cut by character offsets.
        """
        tokens = self._tokenize([segment.text for row in rows for segment in row])
        for row in rows:
            of_segments = [next(tokens) for _ in row]
            ids = [token for segment_ids in of_segments for token in segment_ids]
            supervised = [
                s.supervised
                for s, segment_ids in zip(row, of_segments, strict=True)
                for _ in segment_ids
            ]
            if self._adds_space:
                ids, supervised = self._whole(row) or (ids, supervised)
            if not chat and self._prefix_ids and ids[: len(self._prefix_ids)] != self._prefix_ids:
                ids, supervised = (
                    self._prefix_ids + ids,
                    [False] * len(self._prefix_ids) + supervised,
                )
            labels = [
                token if s else IGNORE_INDEX for token, s in zip(ids, supervised, strict=True)
            ]
            yield ids, labels

    def _tokenize(self, texts: list[str]) -> Iterator[list[int]]:
        pieces = [piece for text in texts for piece in _GUARDED_TEXT.split(text)]
        plain = [bytes.fromhex(piece[1:-1]).decode() for piece in pieces if piece.startswith(_OPEN)]
        parsed = [piece for piece in pieces if not piece.startswith(_OPEN)]
        plain_ids = iter(self._ids(plain, split_special_tokens=True))
        parsed_ids = iter(self._ids(parsed, split_special_tokens=False))
        for text in texts:
            ids: list[int] = []
            for piece in _GUARDED_TEXT.split(text):
                ids += next(plain_ids if piece.startswith(_OPEN) else parsed_ids)
            yield ids

    def _ids(self, texts: list[str], *, split_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": split_special_tokens}
        return list(self.tokenizer(texts, return_attention_mask=False, **options)["input_ids"])

    def _whole(self, row: list[Segment]) -> tuple[list[int], list[bool]] | None:
        text = "".join(segment.text for segment in row)
        if _OPEN in text or not self.tokenizer.is_fast:
            return None
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = list(accumulate(len(segment.text) for segment in row))
        supervised: list[bool] = []
        for start, stop in tokens["offset_mapping"]:
            segment = next(
                i for i, end in enumerate(ends) if max(start + 1, stop) <= end or i == len(row) - 1
            )
            if start < ends[segment] - len(row[segment].text):
                return None  # the token straddles two segments
            supervised.append(row[segment].supervised)
        return list(tokens["input_ids"]), supervised

    def _chat_segments(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> list[Segment]:
        template = self.tokenizer.chat_template
        if not template:
            raise UserError(
                "data.format: the rows are conversations but the tokenizer has no chat template; use an instruct "
                "model's tokenizer (--model.tokenizer) or rows with a prompt and a completion"
            )
        try:
            if re.search(
                r"\{%-?\s*generation\s*-?%\}", self.tokenizer.get_chat_template(tools=tools)
            ):
                text, spans = self._marked_spans(messages, tools)
            else:
                text, spans = self._prefix_spans(messages, tools)
        except (UserError, RowError):
            raise
        except Exception as error:  # templates raise through jinja with errors of their own
            raise RowError(
                f"the chat template refuses the conversation: {str(error).splitlines()[0]}"
            ) from error
        return self._with_stop_tokens(text, spans if self.assistant_turns == "all" else spans[-1:])

    def _marked_spans(
        self, messages: list[Any], tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        render: Any = render_jinja_template
        rendered, spans = render(
            conversations=[messages],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return rendered[0], [(int(start), int(end)) for start, end in spans[0]]

    def _prefix_spans(
        self, messages: list[Any], tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        def render(turns: list[Any], ask: bool) -> str:
            options: dict[str, Any] = {
                "tools": tools,
                "tokenize": False,
                "add_generation_prompt": ask,
            }
            return str(self.tokenizer.apply_chat_template(turns, **options))

        text, spans = render(messages, False), []
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or (self.assistant_turns == "last" and i < last):
                continue
            before = render(messages[:i], True)
            after = text if i == len(messages) - 1 else render(messages[: i + 1], False)
            if not (text.startswith(before) and text.startswith(after)):
                raise RowError(
                    "the chat template writes earlier turns differently once later ones follow, so they cannot be "
                    "found again; set data.assistant_turns: last"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _with_stop_tokens(self, text: str, spans: list[tuple[int, int]]) -> list[Segment]:
        special = "|".join(re.escape(token) for token in reversed(self.special_texts)) or r"(?!)"
        row, position = [], 0
        for start, end in spans:
            stops = list(re.finditer(special, text[start:end]))
            following = re.match(special, text[end:])
            if stops and not text[start + stops[-1].end() : end].strip():
                end = (
                    start + stops[-1].end()
                )  # what follows the stop token (a newline) is the template's
            elif following:
                end += following.end()
            row += [Segment(text[position:start], False), Segment(text[start:end], True)]
            position = end
        ends_with_stop = re.search(f"(?:{special})$", row[-1].text) if row else None
        if row and not ends_with_stop and position >= len(text.rstrip()):
            row.append(Segment(str(self.tokenizer.eos_token), True))
        return [*row, Segment(text[position:], False)]


def truncate(
    ids: list[int], labels: list[int], max_length: int, policy: Truncation, num_kept: int = 0
) -> EncodedRow | None:
    """Cut a row to ``max_length`` tokens.

    ``drop`` leaves long rows out. ``prompt_left`` takes tokens off the front, behind the first ``num_kept`` (BOS), as
    long as they carry no loss; a row whose supervised tokens alone do not fit is left out, and plain text, which has no
    prompt, loses its end. ``completion_right`` takes tokens off the end, the stop token included.

    Returns:
        The row and what was cut, or None where the policy leaves it out.
    """
    excess = len(ids) - max_length
    if excess <= 0:
        return EncodedRow(ids, labels)
    if policy == "drop":
        return None
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    if policy == "completion_right" or first <= num_kept:
        lost = sum(label != IGNORE_INDEX for label in labels[max_length:])
        return EncodedRow(ids[:max_length], labels[:max_length], excess, lost)
    if first - num_kept <= excess:
        return None
    kept = [*range(num_kept), *range(num_kept + excess, len(ids))]
    return EncodedRow([ids[i] for i in kept], [labels[i] for i in kept], excess, 0)
