"""Answers in the model's own words: validation rows before training and at the end, test rows at the test.

Of pairs also the log-odds: how much likelier the model finds the chosen answer than the rejected one.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.batches import data_of, plan_of
from fine_tune.errors import UserError
from fine_tune.losses import IGNORE_INDEX
from fine_tune.runs.answers import OF_ANSWERS, counts_of
from fine_tune.runs.run_folder import run_of
from fine_tune.shards import is_sharded

log = logging.getLogger("fine_tune")
GENERATIONS_FILE = "generations.jsonl"
BATCH_ROWS = 32
SHOWN_CHARACTERS = 40


class Generations(Callback):
    """Let the model answer some rows, beside the expected answers, with exact match.

    Of the test rows also how many answers are wrong and what another row expects (``another_answer``), where rows have
    answers in common: a fact, but not the one asked for.

    Answers are written to ``generations.jsonl`` in the run folder; those already there are not asked again.

    Args:
        rows: Validation rows answered before training and at the end; 0 switches it off.
        max_new_tokens: Tokens an answer may have.
        test_rows: Rows of the test split answered by ``test``: a number, or all.
    """

    def __init__(
        self, rows: int = 8, max_new_tokens: int = 64, test_rows: Literal["all"] | int = 8
    ) -> None:
        if rows < 0 or max_new_tokens < 1 or (test_rows != "all" and test_rows < 0):
            raise UserError(
                "generations: rows and test_rows must not be negative, max_new_tokens at least 1"
            )
        self.rows, self.max_new_tokens, self.test_rows = rows, max_new_tokens, test_rows
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and self.asks(trainer, pl_module):
            self._answer(trainer, pl_module, "validation", "before", self.rows)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate" and self.asks(trainer, pl_module):
            self._answer(trainer, pl_module, "validation", _stage(trainer, "after"), self.rows)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        limit = len(data_of(trainer).rows("test")) if self.test_rows == "all" else self.test_rows
        if limit and cast(Any, pl_module).can_generate:
            answers = self._answer(trainer, pl_module, "test", _stage(trainer, "test"), int(limit))
            if trainer.is_global_zero:
                counts = counts_of(answers)
                cast(Any, pl_module).counted = {n: (c, len(answers)) for n, c in counts.items()}
                values = {name: count / len(answers) for name, count in counts.items()}
                pl_module.log_dict(values, rank_zero_only=True, logger=False)
                exact, another = (counts.get(name) for name in OF_ANSWERS)
                told = [f"{exact} of {len(answers)} match exactly"]
                if another is not None:
                    told.append(f"{another} are the answer to another row")
                log.info("test: %s", ", ".join(told))

    def asks(self, trainer: Trainer, pl_module: Any) -> bool:
        """Say whether validation rows are answered."""
        known = plan_of(trainer).num_rows
        return self.rows > 0 and bool(pl_module.can_generate) and "validation" in known

    def _answer(
        self, trainer: Trainer, pl_module: LightningModule, split: str, stage: str, limit: int
    ) -> list[dict[str, Any]]:
        together = is_sharded(pl_module.model)  # then no rank can answer alone
        if not trainer.is_global_zero and not together:
            return []
        data = data_of(trainer)
        file = run_of(trainer).path / GENERATIONS_FILE
        rows = [
            dict(row) for row in data.rows(split).select(range(min(limit, len(data.rows(split)))))
        ]
        known = {_key(answer): answer for answer in read_generations(file)}
        if together:  # they all ask the same, whatever the first has written meanwhile
            known = trainer.strategy.broadcast(known)
        special = set(data.tokenizer.all_special_ids)
        questions, stop_ids = [], {int(data.tokenizer.eos_token_id)}
        for row in rows:
            prompt_ids, expected_ids = prompt_and_answer(row)
            if expected_ids[-1] in special:
                stop_ids.add(expected_ids.pop())
            question = {
                "stage": stage,
                "row_id": row["row_id"],
                "prompt": data.tokenizer.decode(prompt_ids, skip_special_tokens=True),
                "expected": _text(data.tokenizer, expected_ids),
                "max_new_tokens": self.max_new_tokens,
                "prompt_ids": prompt_ids,
            }
            if row["num_chosen"]:
                rejected = row["input_ids"][row["num_prompt"] + row["num_chosen"] :]
                question["rejected"] = _text(data.tokenizer, rejected)
            questions.append(question)
        asked = sorted(
            (q for q in questions if _key(q) not in known), key=lambda q: len(q["prompt_ids"])
        )
        for start in range(0, len(asked), BATCH_ROWS):
            batch = asked[start : start + BATCH_ROWS]
            prompts = [q["prompt_ids"] for q in batch]
            written = cast(Any, pl_module).generate(prompts, self.max_new_tokens, sorted(stop_ids))
            log_odds = self._log_odds(trainer, pl_module, rows, batch)
            answers = []
            for question, ids in zip(batch, written, strict=True):
                answer = {k: v for k, v in question.items() if k != "prompt_ids"}
                answer["answer"] = _text(data.tokenizer, ids)
                answer["exact_match"] = answer["answer"] == answer["expected"]
                if question["row_id"] in log_odds:
                    answer["log_odds"] = round(log_odds[question["row_id"]], 4)
                known[_key(answer)] = answer
                answers.append(json.dumps(answer, ensure_ascii=False) + "\n")
            if trainer.is_global_zero:
                self._keep(file, answers)
        return [known[_key(question)] for question in questions]

    def _log_odds(
        self, trainer: Trainer, pl_module: Any, rows: list[Any], asked: list[Any]
    ) -> dict[int, float]:
        ids = {question["row_id"] for question in asked if "rejected" in question}
        pairs = [row for row in rows if row["row_id"] in ids]
        if not pairs:
            return {}
        batch = data_of(trainer).make_batch(pairs)
        batch = trainer.strategy.batch_to_device(batch, device=pl_module.device)
        return dict(pl_module.log_odds(batch))

    def _keep(self, file: Path, lines: list[str]) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as handle:
                handle.writelines(lines)
        except OSError as error:
            if not self._warned:
                log.info("WARNING: answers are not kept in %s (%s); training goes on", file, error)
            self._warned = True


def _key(answer: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(answer.get(k) for k in ("stage", "row_id", "prompt", "expected", "max_new_tokens"))


def prompt_and_answer(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Cut an encoded row at its last supervised stretch: what is asked, and what is expected, its stop token included.

    Of a pair, the chosen answer is expected; of packed texts, the second half of the first.
    """
    if "pieces" in row:
        ids = list(row["input_ids"][: row["pieces"][0]])
        return ids[: max(1, len(ids) // 2)], ids[max(1, len(ids) // 2) :]
    length = row["num_prompt"] + row["num_chosen"] or len(row["input_ids"])
    input_ids, labels = row["input_ids"][:length], row["labels"][:length]
    end = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    if start == 0:  # plain text: continue its first half
        start = max(1, end // 2)
    return list(input_ids[:start]), list(input_ids[start:end])


def read_generations(file: Path) -> list[dict[str, Any]]:
    """Read the answers of a run; a last line cut off by a kill is left out."""
    answers = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                answers.append(json.loads(line))
            except ValueError:
                continue
    return answers


def before_after_table(answers: list[dict[str, Any]], after: str) -> list[str]:
    """Lay out the answers before training and at stage ``after`` side by side, as text lines."""
    before = {(a["row_id"], a["prompt"]): a for a in answers if a["stage"] == "before"}
    of_stage = sorted((a for a in answers if a["stage"] == after), key=lambda a: a["row_id"])
    pairs = any("rejected" in answer for answer in of_stage)
    rows: list[tuple[str, ...]] = [("asked", "expected", "before", "after")]
    if pairs:
        rows = [("asked", "chosen", "rejected", "before", "after", "log-odds")]
    for answer in of_stage:
        earlier = before.get((answer["row_id"], answer["prompt"]), {})
        names = ("expected", "rejected") if pairs else ("expected",)
        texts = [answer.get(name, "") for name in names] + [earlier.get("answer", "")]
        texts = [_beginning(_line(text)) for text in [*texts, answer["answer"]]]
        odds = [f"{a['log_odds']:+.2f}" for a in (earlier, answer) if "log_odds" in a]
        texts += [" to ".join(odds)] if pairs else []
        rows.append((_end(_line(answer["prompt"])), *texts))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _stage(trainer: Trainer, name: str) -> str:
    checkpoint = Path(str(trainer.ckpt_path)).name if trainer.ckpt_path else "untrained"
    return f"{name} {checkpoint}"


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else "…" + text[1 - SHOWN_CHARACTERS :]
