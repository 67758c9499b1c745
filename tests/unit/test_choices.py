"""Settings chosen from the lengths of the training rows."""

import numpy as np
import pytest

from fine_tune.data.choices import choose, cpu_tokens, longest_up_to_128


@pytest.mark.parametrize(
    ("longest", "cap", "expected"),
    [
        (16, 32_768, 128),
        (128, 32_768, 128),
        (129, 32_768, 256),
        (1000, 1000, 1000),
        (999, 1000, 1000),
    ],
)
def test_max_length_is_the_longest_row_up_to_a_multiple_of_128_within_the_cap(
    longest: int, cap: int, expected: int
) -> None:
    assert longest_up_to_128(longest, cap) == expected


@pytest.mark.parametrize(
    ("length", "micro", "accumulation"),
    [
        (100, 8, 1),
        (2_000, 8, 1),
        (2_001, 4, 2),
        (4_000, 4, 2),
        (4_001, 2, 4),
        (8_000, 2, 4),
        (8_001, 1, 8),
        (12_000, 1, 8),
        (12_001, 1, 16),
        (16_000, 1, 16),
        (16_001, 1, 32),
    ],
)
def test_the_batch_follows_the_95th_percentile(length: int, micro: int, accumulation: int) -> None:
    lengths = np.array([length] * 99 + [32_000])  # one very long row in a hundred does not decide
    chosen = choose(lengths, longest_row=32_000, max_length=32_000, length_cap=32_768)
    assert chosen["data.batch_size"].value == micro * accumulation
    assert chosen["data.max_tokens_per_micro_batch"].value == micro * 32_000


@pytest.mark.parametrize(
    ("vocabulary_size", "supervised_share", "expected"),
    [
        (1_500, 1.0, 2_048),
        (4_096, 1.0, 2_048),
        (8_192, 1.0, 1_024),  # 32 MiB / (4 x 8,192)
        (8_192, 0.4, 2_048),
        (32_000, 0.4, 640),  # 655, down to a multiple of 128
        (32_000, 0.3, 768),
        (32_000, 1.0, 512),
        (152_000, 1.0, 512),
    ],
)
def test_a_cpu_takes_the_tokens_whose_logits_stay_in_its_caches(
    vocabulary_size: int, supervised_share: float, expected: int
) -> None:
    assert cpu_tokens(vocabulary_size, supervised_share) == expected


@pytest.mark.parametrize(
    ("max_length", "limit", "expected"),
    [(128, 2_048, 1_024), (256, 2_048, 2_048), (256, 640, 640), (4_096, 2_048, 4_096)],
)
def test_a_cpu_takes_no_more_at_a_time_than_that_or_one_row(
    max_length: int, limit: int, expected: int
) -> None:
    lengths = np.array([100] * 10)
    chosen = choose(
        lengths, longest_row=max_length, max_length=max_length, length_cap=8_192, cpu_limit=limit
    )
    assert chosen["data.max_tokens_per_micro_batch"].value == expected


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([4_000, *[10] * 9], False),
        ([4_001, *[10] * 9], True),
        ([2_000, 2_000], False),
        ([2_001, 2_001], True),
    ],
)
def test_gradient_checkpointing_is_for_long_rows(lengths: list[int], expected: bool) -> None:
    chosen = choose(
        np.array(lengths), longest_row=max(lengths), max_length=4_096, length_cap=32_768
    )
    assert chosen["model.gradient_checkpointing"].value is expected
    assert "4,000 or 2,000" in chosen["model.gradient_checkpointing"].reason


def test_the_reason_names_the_longest_row() -> None:
    chosen = choose(np.array([371, 20]), longest_row=371, max_length=384, length_cap=2_048)
    assert (
        chosen["data.max_length"].reason
        == "longest training row 371 tokens, up to a multiple of 128"
    )
    held = choose(np.array([2_048, 20]), longest_row=2_500, max_length=2_048, length_cap=2_048)
    assert (
        held["data.max_length"].reason
        == "longest training row 2,500 tokens, held to 2,048, the model's positions"
    )
    ours = choose(np.array([32_768]), longest_row=120_005, max_length=32_768, length_cap=32_768)
    assert ours["data.max_length"].reason.endswith("held to 32,768, the most a rule gives")
    full = choose(np.array([1_000]), longest_row=1_000, max_length=1_000, length_cap=1_000)
    assert full["data.max_length"].reason.endswith("up to the model's 1,000 positions")
