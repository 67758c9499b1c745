"""All that decides which rows go where and which tokens they get, beside the data and the tokenizer."""

from dataclasses import dataclass
from typing import Literal

from fine_tune.data.encode import AssistantTurns, Truncation

Split = Literal["existing", "none"] | dict[str, float]
EmptyCompletions = Literal["error", "drop"]


@dataclass(frozen=True)
class Options:
    """The settings that are part of the cache's key; ``SFTData`` documents them.

    ``max_length`` None stands for the longest training row, up to ``length_cap``.
    """

    max_length: int | None
    length_cap: int
    truncation: Truncation
    assistant_turns: AssistantTurns
    split: Split | None
    group_by: str | None
    stratify_by: str | None
    max_rows: dict[str, int]
    empty_completions: EmptyCompletions
    near_duplicates: float
    drop_leaked: bool
