"""Targets of a run: reached or missed, by which way is better."""

from dataclasses import dataclass
from typing import Any

MORE_IS_BETTER = ("accuracy", "exact_match", "margin", "rewards_chosen", "logps_chosen")


@dataclass(frozen=True)
class Target:
    """A metric to reach, and what came of it; ``measured`` is None where the run stopped before it."""

    name: str
    goal: float
    measured: float | None

    @property
    def is_reached(self) -> bool:
        if self.measured is None:
            return False
        more_is_better = any(part in self.name for part in MORE_IS_BETTER)
        return self.measured >= self.goal if more_is_better else self.measured <= self.goal


def judge(results: list[dict[str, Any]], targets: dict[str, float]) -> list[Target]:
    """Hold the newest results against the targets."""
    measured = {k: v for result in results for k, v in result["metrics"].items()}
    return [Target(name, goal, measured.get(name)) for name, goal in targets.items()]
