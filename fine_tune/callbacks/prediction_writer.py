"""Results of ``predict`` on their way into the output file, each as soon as its row is done."""

import json
import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.batches import data_of
from fine_tune.callbacks.progress import format_seconds
from fine_tune.callbacks.stop_signals import StopRequest
from fine_tune.output_file import OutputFile

log = logging.getLogger("fine_tune")
TELL_EVERY_SECONDS = 10.0


class PredictionWriter(Callback):
    """Keep each row's result, and put all of them in order at the end.

    Args:
        output: Where they go.
        stop: Listens for signals; Lightning's trainer installs handlers of its own.
    """

    def __init__(self, output: OutputFile, stop: StopRequest) -> None:
        self.output, self.stop = output, stop
        self._parts: dict[int, list[tuple[int, dict[str, Any]]]] = {}  # of rows with several items
        self._start = self._told = 0.0
        self._num_before = self._num_tokens = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.rows, self.tokenizer = data_of(trainer).predict_rows, data_of(trainer).tokenizer
        self._num_items: dict[int, int] = {}
        for item in self.rows.items:
            self._num_items[item.row] = self._num_items.get(item.row, 0) + 1
        pl_module.predicting.tell = self._hear

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop.listen()
        self._start = self._told = time.monotonic()
        self._num_before = len(self.output.results)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(self.rows)
        for line in self._summary():
            log.info(line)

    def finish(self, rows: Any) -> None:
        """Write the output file."""
        num_rows = len(rows.lines)
        self.output.finish(num_rows, lambda row, result: _joined(rows.lines[row], result))

    def _hear(self, item: int, result: dict[str, Any]) -> None:
        of_item = self.rows.items[item]
        parts = self._parts.setdefault(of_item.row, [])
        parts.append((item, result))
        self._num_tokens += sum(map(len, result.get("ids", [])))
        if len(parts) == self._num_items[of_item.row]:
            del self._parts[of_item.row]
            self.output.keep(of_item.row, self._result(of_item.row, sorted(parts)))
            self._tell()

    def _result(self, row: int, parts: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        if "reward" in parts[0][1]:
            if row in self.rows.lists:
                return {"reward": [part["reward"] for _, part in parts]}
            return {self.rows.items[item].name: part["reward"] for item, part in parts}
        ((item, part),) = parts
        texts = [self._text(ids) for ids in part["ids"]]
        reasons = part["finish_reason"]
        several = len(texts) > 1
        result = {
            "prediction": texts if several else texts[0],
            "finish_reason": reasons if several else reasons[0],
        }
        num_cut = self.rows.items[item].num_cut
        return {**result, "prompt_cut": num_cut} if num_cut else result

    def _text(self, ids: list[int]) -> str:
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return text if self.rows.is_text else text.strip()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < TELL_EVERY_SECONDS:
            return
        self._told = now
        done, total = len(self.output.results), len(self.rows.lines)
        seconds = now - self._start
        left = seconds / max(1, done - self._num_before) * (total - done)
        speed = f"  {self._num_tokens / seconds:,.0f} tokens/s" if self._num_tokens else ""
        log.info(f"row {done:,}/{total:,}{speed}  about {format_seconds(left)} left")

    def _summary(self) -> list[str]:
        seconds, total = time.monotonic() - self._start, len(self.rows.lines)
        new = total - self._num_before
        line = f"{total:,} rows in {self.output.path}"
        if self._num_before:
            line += f", {self._num_before:,} of them from before"
        line += f"; {new:,} rows in {format_seconds(seconds)}"
        if self._num_tokens:
            line += (
                f", {self._num_tokens:,} tokens written, {self._num_tokens / seconds:,.0f} tokens/s"
            )
        results = self.output.results.values()
        reasons = [r["finish_reason"] for r in results if "finish_reason" in r]
        flat = [x for r in reasons for x in (r if isinstance(r, list) else [r])]
        at_length = flat.count("length")
        if at_length:
            return [
                line,
                f"{at_length:,} of {len(flat):,} answers ended at sampling.max_new_tokens, not by themselves",
            ]
        return [line]


def _joined(line: str, result: dict[str, Any]) -> str:
    """Write a row's own fields as they stood, and the result behind them."""
    fields = line.strip().removesuffix("}").rstrip()
    comma = "" if fields == "{" else ", "
    return f"{fields}{comma}{json.dumps(result, ensure_ascii=False)[1:]}"
