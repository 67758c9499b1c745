"""Memory: the worst step is rehearsed before the first, watched while training, and survived when it runs out."""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.batches import StepFailure, data_of, log_interval, most_tokens_at_once, plan_of
from fine_tune.callbacks.rehearsal import circumstances, rehearse
from fine_tune.device_memory import DeviceMemory, memory_of
from fine_tune.errors import GoBack, RunStopped, UserError
from fine_tune.ranks import any_rank, from_all_ranks
from fine_tune.runs.run_folder import run_of
from fine_tune.runs.stored_checkpoints import NAME

log = logging.getLogger("fine_tune")
WARN_PERCENT = 90
GIB = 2**30
TOO_LARGE = (
    "one row alone does not fit; set --model.gradient_checkpointing true, --model.quantization nf4 with --model.lora "
    "auto, or --data.max_length {}"
)
LONG_ANSWERS = "one prompt alone does not fit; set --{}.max_new_tokens lower, or quantize the model"
NO_LESS = "vram_guard.min_tokens {:,} allows no smaller micro-batch; set --vram_guard.min_tokens 1"


class VRAMGuard(Callback):
    """Keep a run within its device's memory.

    Before the first step it rehearses the worst one (longest rows, optimizer, validation, generation, save and
    reload) and leaves everything as it was; a budget left to ``auto`` is cut until 10 % of the device stay free. Out
    of memory, it halves the budget and takes the same rows again: same step, same learning rate, same gradient.

    Args:
        rehearse: Rehearse before the first step.
        threshold_percent: Of the device's memory; above it caches are cleared, and the budget is cut before a step.
        min_tokens: The budget is never cut below so many padded tokens; one row alone is always tried.
    """

    def __init__(
        self, rehearse: bool = True, threshold_percent: float = 95.0, min_tokens: int = 1
    ) -> None:
        if not 0 < threshold_percent <= 100 or min_tokens < 1:
            raise UserError(
                f"vram_guard: threshold_percent {threshold_percent} lies above 0 and up to 100, "
                f"min_tokens {min_tokens} must be at least 1"
            )
        self.rehearse, self.threshold_percent, self.min_tokens = (
            rehearse,
            threshold_percent,
            min_tokens,
        )
        self._budget: int | None = None  # None: the plan's
        self._cut_from: list[int | None] | None = None  # the plan's budget, and the device's bytes
        self._rehearsed: dict[str, Any] = {}
        self._warned = False
        self._failed_update = 0  # the last step that was taken again
        self._untold: list[tuple[int, str, str]] = []  # events of this rank's own: not yet recorded
        self._bytes_per_token = 0.0  # as rehearsed; 0: not known

    def state_dict(self) -> dict[str, Any]:
        return {
            "budget": self._budget,
            "cut_from": self._cut_from,
            "rehearsed": self._rehearsed,
            "bytes_per_token": self._bytes_per_token,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._budget, self._cut_from = state_dict["budget"], state_dict.get("cut_from")
        self._rehearsed = state_dict["rehearsed"]
        self._bytes_per_token = state_dict["bytes_per_token"]

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.memory: DeviceMemory = memory_of(trainer.strategy.root_device)
        pl_module.failure_handlers["vram_guard"] = partial(self._handle, trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._keep_budget(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._keep_budget(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._share(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._share(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        plan = plan_of(trainer)
        self._keep_budget(trainer, pl_module)
        if self._budget is not None:
            log.info("micro-batches: %s tokens, cut earlier in this run", f"{self._budget:,}")
        pl_module.keeps_state = self.memory.can_run_out and _is_adapter(pl_module)
        now = circumstances(trainer, pl_module, self.memory)
        changed = self.rehearse and now != self._rehearsed and trainer.global_step < plan.num_steps
        if any_rank(changed, pl_module.device, trainer.world_size):  # together: devices may differ
            cut = partial(self._cut_as_rehearsed, trainer, pl_module)
            chosen = data_of(trainer).fills_memory
            rehearsed = rehearse(trainer, pl_module, self.memory, cut if chosen else None)
            for line in rehearsed.lines:
                log.info(line)
            self._rehearsed, self._bytes_per_token = now, rehearsed.bytes_per_token
        self.memory.reset_peak()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give way to other processes on the device before they make the step fail."""
        if not self.memory.can_run_out or not batch["lengths"]:
            return
        if self._percent() >= self.threshold_percent:
            self.memory.clear_cache()
        longest, budget = batch["lengths"][0], pl_module.max_tokens_per_micro_batch
        tokens = most_tokens_at_once(batch["lengths"], budget)
        fitting = self._tokens_that_fit()
        if self._percent() >= self.threshold_percent:
            smaller, why = (budget or tokens) // 2, "the device is nearly full"
        elif tokens > max(fitting, longest):
            why = f"the device has room for about {fitting:,.0f} padded tokens, the step would take {tokens:,}"
            smaller = int(fitting)
        else:
            return
        smaller = max(smaller, longest, self.min_tokens)
        if smaller < (budget or tokens):
            step = trainer.global_step + 1
            self._cut(trainer, pl_module, smaller, step, why, "nearly_full", alone=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % log_interval(trainer):
            return
        self._share(trainer, pl_module)
        used = self._percent()
        pl_module.log_dict(
            {
                "perf/memory_allocated_gib": self.memory.allocated() / GIB,
                "perf/memory_reserved_gib": self.memory.reserved() / GIB,
                "perf/memory_used_percent": used,
            }
        )
        if used >= WARN_PERCENT and not self._warned:
            self._warned = True
            total = self.memory.total() / GIB
            log.info("WARNING: %.0f %% of the device's %.1f GiB are used", used, total)

    def _keep_budget(self, trainer: Trainer, pl_module: Any) -> None:
        """Stay at a budget that was cut, unless the one it was cut from, or the device, is another now."""
        if self._budget is None:
            return
        if self._cut_from not in (None, self._cuts_from(trainer)):  # None: by an older version
            log.info(
                "micro-batches: the cut to %s tokens was of another budget or device",
                f"{self._budget:,}",
            )
            self._budget = None
            return
        pl_module.max_tokens_per_micro_batch = self._budget

    def _cuts_from(self, trainer: Trainer) -> list[int | None]:
        return [plan_of(trainer).max_tokens_per_micro_batch, self.memory.total()]

    def _tokens_that_fit(self) -> float:
        if not self._bytes_per_token:
            return math.inf
        unused = (
            self.memory.reserved() - self.memory.allocated()
        )  # held, but free for the next step
        return (self.memory.total() - self.memory.used() + unused) / self._bytes_per_token

    def _percent(self) -> float:
        return 100 * self.memory.used() / self.memory.total()

    def _handle(self, trainer: Trainer, pl_module: Any, failure: StepFailure) -> bool:
        if failure.kind != "out_of_memory":
            return False
        self.memory.clear_cache()
        if failure.stage == "optimizer":
            return self._retry_update(trainer, pl_module, failure)
        step = _step_of(trainer, failure)
        where = f"out of memory in the {failure.stage} of step {step}"
        longest = failure.tokens_at_once // max(1, failure.rows_at_once)
        if failure.rows_at_once <= 1:
            asked = "sampling" if trainer.state.fn == "predict" else "generations"
            answers = failure.stage == "generation"
            hint = LONG_ANSWERS.format(asked) if answers else TOO_LARGE.format(max(1, longest // 2))
            raise RunStopped(f"{where} with a row of {longest:,} tokens: {hint}")
        why = f"{where} ({failure.rows_at_once} rows at once, longest {longest:,} tokens)"
        if failure.stage == "generation":
            told = f"{why}: half of them at a time"
            self._record(trainer, step, told, "out_of_memory", alone=True)
            return True
        budget = max(self.min_tokens, failure.tokens_at_once // 2)
        if budget >= failure.tokens_at_once:
            raise RunStopped(f"{why}: {NO_LESS.format(self.min_tokens)}")
        alone = not failure.on_all_ranks
        self._cut(trainer, pl_module, budget, step, why, "out_of_memory", alone=alone)
        return True

    def _retry_update(self, trainer: Trainer, pl_module: Any, failure: StepFailure) -> bool:
        if not pl_module.keeps_state:
            why = f"the optimizer ran out of memory at step {failure.step}, half of its update done"
            self._record(trainer, failure.step, why, "out_of_memory")
            raise GoBack(why)
        if self._failed_update == failure.step:
            saved = f", and step {failure.step - 1} is saved" if failure.step > 1 else ""
            raise RunStopped(
                f"out of memory in the optimizer's update of step {failure.step}, twice: its state does not fit. The "
                f"update was undone{saved}; make room on the device, or take an 8-bit "
                "or paged optimizer (bitsandbytes.optim.PagedAdamW8bit) or a smaller model.lora.r"
            )
        self._failed_update = failure.step
        event = "out of memory in the optimizer's update; it was undone and taken again"
        self._record(trainer, failure.step, event, "out_of_memory")
        return True

    def _cut_as_rehearsed(self, trainer: Trainer, pl_module: Any, budget: int, why: str) -> None:
        before, allowed = pl_module.max_tokens_per_micro_batch, max(budget, self.min_tokens)
        if before is None or allowed < before:
            step = trainer.global_step + 1
            self._cut(trainer, pl_module, allowed, step, why, "nearly_full", alone=False)
        elif allowed > budget:
            log.info("WARNING: %s; %s", why, NO_LESS.format(self.min_tokens))

    def _cut(
        self,
        trainer: Trainer,
        pl_module: Any,
        budget: int,
        step: int,
        why: str,
        kind: str,
        *,
        alone: bool,
    ) -> None:
        before = pl_module.max_tokens_per_micro_batch
        budget = budget if before is None else min(budget, before)  # this rank's may be smaller
        self._take_budget(trainer, pl_module, budget)
        shown = f"{before:,}" if before is not None else "the whole step"
        event = f"{why}: {shown} -> {budget:,} tokens per micro-batch"
        self._record(trainer, step, event, kind, alone=alone)

    def _take_budget(self, trainer: Trainer, pl_module: Any, budget: int) -> None:
        pl_module.max_tokens_per_micro_batch = self._budget = budget
        self._cut_from = self._cuts_from(trainer)

    def _record(
        self, trainer: Trainer, step: int, event: str, kind: str, *, alone: bool = False
    ) -> None:
        if trainer.is_global_zero:
            log.info("WARNING: %s", event)
            if trainer.state.fn == "predict":  # it is no run and writes into none
                return
            run_of(trainer).note_event({"step": step, "kind": kind, "event": event})
        elif alone:
            self._untold.append((step, f"rank {trainer.global_rank}: {event}", kind))

    def _share(self, trainer: Trainer, pl_module: Any) -> None:
        """Tell what other ranks met alone, and let all of them keep the smallest budget: one is saved."""
        if not any_rank(bool(self._untold), pl_module.device, trainer.world_size):
            return
        ranks = from_all_ranks((self._untold, self._budget), trainer.world_size)
        self._untold = []
        smallest = min((budget for _, budget in ranks if budget is not None), default=None)
        if smallest is not None and smallest != self._budget:
            self._take_budget(trainer, pl_module, smallest)
        for step, event, kind in (told for of_rank, _ in ranks for told in of_rank):
            self._record(trainer, step, event, kind)


def _step_of(trainer: Trainer, failure: StepFailure) -> int:
    """Return the optimizer step of a failure; of weights measured after training, the one they were saved at."""
    named = NAME.fullmatch(Path(str(trainer.ckpt_path)).name)
    return int(named[1]) if named and trainer.state.fn in ("validate", "test") else failure.step


def _is_adapter(pl_module: Any) -> bool:
    trained = [p for p in pl_module.parameters() if p.requires_grad]
    return sum(p.numel() for p in trained) < 0.5 * sum(p.numel() for p in pl_module.parameters())
