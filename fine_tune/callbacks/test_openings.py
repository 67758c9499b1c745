"""Every opening of the sealed test split is counted: in the run's record and beside the split itself."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.batches import data_of
from fine_tune.errors import UserError
from fine_tune.runs.run_folder import RECORD, RunFolder, run_of

log = logging.getLogger("fine_tune")
SHOWN_OPENINGS = 5


class TestOpenings(Callback):
    """Record when the test split is opened, by which run, and what came of it; show the earlier ones.

    Openings are known from the records of all runs under ``lightning_logs`` and from the list beside the sealed split,
    so that neither deleting a run nor emptying the cache makes them forgotten.
    """

    __test__ = False  # no test class, whatever pytest thinks of its name

    def __init__(self) -> None:
        self._opening: dict[str, Any] = {}

    @property
    def has_opened(self) -> bool:
        """Whether the test split was opened in this process."""
        return bool(self._opening)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say by which run it was opened, before anything is measured."""
        sealed = data_of(trainer).sealed_test
        if sealed is None or not trainer.is_global_zero:
            return
        run = run_of(trainer)
        checkpoint = Path(str(trainer.ckpt_path)).name if trainer.ckpt_path else None
        self._opening = {**sealed.opening, "run": str(run.path), "checkpoint": checkpoint}
        known = known_openings(sealed, run.path.resolve().parents[1], run)
        earlier = [opening for opening in known if opening["id"] != self._opening["id"]]
        self._note(sealed, run)
        log.info(
            "test split %s: opened for the %s time", sealed.hash[:8], ordinal(len(earlier) + 1)
        )
        for opening in earlier[-SHOWN_OPENINGS:]:
            by = opening.get("run", "outside a run")
            log.info("  %s  %s  %s", opening["time"], by, _shown(opening))
        overlap = sealed.rows_opened_before()
        if overlap:
            log.info("  %s of its rows were opened before, in other test splits", f"{overlap:,}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the result to the opening."""
        sealed = data_of(trainer).sealed_test
        if sealed is not None and trainer.is_global_zero:
            values = trainer.callback_metrics.items()
            self._opening["result"] = {n: float(v) for n, v in values if n.startswith("test/")}
            self._note(sealed, run_of(trainer))

    def _note(self, sealed: Any, run: RunFolder) -> None:
        sealed.note_opening(self._opening)
        before = run.read().get("test_openings", [])
        others = [opening for opening in before if opening.get("id") != self._opening["id"]]
        run.update({"test_openings": [*others, self._opening]})


def known_openings(sealed: Any, logs: Path, own: RunFolder) -> list[dict[str, Any]]:
    """List every known opening of a sealed test split, oldest first, its result included if there was one.

    Args:
        sealed: The test split.
        logs: The folder ``lightning_logs``.
        own: The run that asks, wherever it lies.
    """
    noted = list(sealed.openings())
    for file in {*logs.glob(f"*/version_*/{RECORD}"), own.path.resolve() / RECORD}:
        try:
            noted += RunFolder(file.parent).read().get("test_openings", [])
        except UserError as error:  # another run's record is damaged: no reason to stop this one
            log.info("WARNING: %s; its openings are not counted", error)
    of_split = [opening for opening in noted if opening.get("test_hash") == sealed.hash]
    by_id: dict[str, dict[str, Any]] = {}
    for opening in of_split:
        by_id[opening["id"]] = {**by_id.get(opening["id"], {}), **opening}
    return sorted(by_id.values(), key=lambda opening: str(opening["time"]))


def ordinal(number: int) -> str:
    """Write 1st, 2nd, 3rd, 4th ..."""
    ending = (
        "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    )
    return f"{number}{ending}"


def _shown(opening: dict[str, Any]) -> str:
    result = opening.get("result") or {}
    return "  ".join(f"{name} {value:.4g}" for name, value in result.items()) or "no result"
