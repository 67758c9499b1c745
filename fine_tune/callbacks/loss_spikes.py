"""Losses far above those of the steps before: recorded with their rows, training goes on."""

import logging
import shlex
import statistics
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.ranks import from_all_ranks
from fine_tune.runs.run_folder import run_of

log = logging.getLogger("fine_tune")
WINDOW = 64  # steps that say what is usual
FEWEST = 16
SPREADS = 8.0  # how far above, in robust standard deviations
SMALLEST_RISE = 0.2  # of the median; smooth losses have next to no spread
MOST_RECORDED = 100


class LossSpikes(Callback):
    """Name the rows of a step whose loss jumps, so that bad data can be found.

    A spike lies more than eight robust standard deviations (1.4826 times the median absolute deviation) and a fifth
    above the median of the last 64 losses. The first 100 are recorded.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._num_recorded = 0

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "num_recorded": self._num_recorded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses, self._num_recorded = state_dict["losses"], state_dict["num_recorded"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"])  # on the host already: the step has looked at it
        limit = spike_limit(self._losses)
        self._losses = [*self._losses, loss][-WINDOW:]
        if limit is None or loss <= limit or self._num_recorded >= MOST_RECORDED:
            return
        self._num_recorded += 1
        ranks = from_all_ranks(list(batch["row_ids"]), trainer.world_size)
        if trainer.is_global_zero:
            usual = statistics.median(self._losses[:-1])
            event = f"loss {loss:.4g} of step {trainer.global_step}, where {usual:.4g} is usual"
            run = run_of(trainer)
            log.info(
                "WARNING: %s; its rows: python -m fine_tune explain-step %s %d",
                event,
                shlex.quote(str(run.path)),
                trainer.global_step,
            )
            row_ids = [row_id for of_rank in ranks for row_id in of_rank]
            entry = {"step": trainer.global_step, "kind": "loss_spike", "event": event}
            entry["row_ids"] = row_ids
            run.note_event(entry)


def spike_limit(losses: list[float]) -> float | None:
    """Return the loss above which a step is a spike, or None while too few are known.

    ``median + max(8 * 1.4826 * MAD, 0.2 * median)``: of the losses 1, 2, 3 (five times each, and one 2) the median is
    2 and the MAD 1, so the limit is 2 + 11.86.
    """
    if len(losses) < FEWEST:
        return None
    median = statistics.median(losses)
    spread = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    return median + max(SPREADS * spread, SMALLEST_RISE * abs(median))
