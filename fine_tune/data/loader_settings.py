"""How rows are handed out: what users set of it."""

from dataclasses import dataclass
from typing import Literal

MicroBatch = int | Literal["auto"] | None  # padded tokens


@dataclass(frozen=True)
class LoaderSettings:
    """How rows are handed out, and where prepared ones are kept; ``SFTData`` documents them."""

    batch_size: int | None
    max_tokens_per_micro_batch: MicroBatch
    epochs: int | None
    eval_batch_size: int | None
    num_workers: int
    seed: int
    cache_dir: str | None
    tokenizer: str | None
    tokenizer_revision: str | None
    predict_path: str | None


def number_of(tokens: MicroBatch) -> int | None:
    """Return the budget where it is a number; what fits is found out later."""
    return tokens if isinstance(tokens, int) else None
