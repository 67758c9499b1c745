"""Settings the user left open, chosen from the training rows: a user's value goes first, then a plan's, then these."""

from typing import Any

import numpy as np

from fine_tune.batches import Choice

LENGTH_LIMIT = 32_768
# Of a CPU at a time: more tokens only add padding, larger logits leave its caches, fewer tokens starve the products.
CPU_TOKENS, CPU_LOGITS_BYTES, FEWEST_CPU_TOKENS = 2_048, 32 * 2**20, 512
# p95 of the tokens per row -> rows per micro-batch, micro-batches per step
ROWS_BY_P95 = (
    (16_000, 1, 32),
    (12_000, 1, 16),
    (8_000, 1, 8),
    (4_000, 2, 4),
    (2_000, 4, 2),
    (0, 8, 1),
)


def longest_up_to_128(longest_row: int, cap: int) -> int:
    """Round the longest row up to a multiple of 128, within the cap."""
    return min(cap, -(-longest_row // 128) * 128)


def cpu_tokens(vocabulary_size: int, supervised_share: float) -> int:
    """Return the tokens a CPU takes at a time: those whose logits it keeps in its caches, 512 to 2,048.

    Args:
        vocabulary_size: Words the model chooses from, 4 bytes each.
        supervised_share: Share of the tokens that have logits, above 0 up to 1.
    """
    tokens = int(CPU_LOGITS_BYTES / (4 * vocabulary_size * supervised_share)) // 128 * 128
    return max(FEWEST_CPU_TOKENS, min(CPU_TOKENS, tokens))


def choose(
    lengths: np.ndarray,
    *,
    longest_row: int,
    max_length: int,
    length_cap: int,
    cpu_limit: int | None = None,
) -> dict[str, Choice]:
    """Choose every dynamic setting.

    Args:
        lengths: Tokens of each training row.
        longest_row: Tokens of the longest of them, before truncation.
        max_length: The one in force, chosen by ``longest_up_to_128`` or given.
        length_cap: Positions of the model, at most 32,768.
        cpu_limit: Tokens at a time (``cpu_tokens``) where there is nothing but a CPU to train on.

    Returns:
        A value and a reason for each key that may be left open.
    """
    longest, mean, p95 = (
        int(lengths.max()),
        float(lengths.mean()),
        float(np.percentile(lengths, 95)),
    )
    micro, accumulation = next((m, a) for above, m, a in ROWS_BY_P95 if p95 > above)
    capped = ", up to a multiple of 128"
    if longest_row > length_cap:
        limit = "the most a rule gives" if length_cap == LENGTH_LIMIT else "the model's positions"
        capped = f", held to {length_cap:,}, {limit}"
    elif max_length == length_cap:
        capped = f", up to the model's {length_cap:,} positions"
    tokens = micro * max_length
    at_a_time = f"{micro} rows of {max_length:,} at a time"
    if cpu_limit is not None and tokens > max(cpu_limit, max_length):
        tokens = max(cpu_limit, max_length)
        at_a_time += f", on a CPU at most {tokens:,} tokens"
    checkpointing = longest > 4_000 or mean > 2_000
    choices: dict[str, tuple[Any, str]] = {
        "data.max_length": (max_length, f"longest training row {longest_row:,} tokens{capped}"),
        "data.batch_size": (
            micro * accumulation,
            f"95 % of the training rows have up to {p95:,.0f} tokens: {micro} rows x {accumulation}",
        ),
        "data.max_tokens_per_micro_batch": (
            tokens,
            f"95 % of the training rows have up to {p95:,.0f} tokens: {at_a_time}",
        ),
        "model.gradient_checkpointing": (
            checkpointing,
            f"longest row {longest:,}, mean {mean:,.0f} tokens; on above 4,000 or 2,000",
        ),
    }
    return {key: Choice(value, reason) for key, (value, reason) in choices.items()}
