"""What the answers of a run come to: right, another row's, or neither."""

from typing import Any

ANOTHER = "another_answer"
OF_ANSWERS = ("test/exact_match", f"test/{ANOTHER}")


def is_another(answers: list[dict[str, Any]]) -> list[bool]:
    """Say of each answer whether it is wrong and what another row expects: a fact, but not the one asked for."""
    expected = _expected(answers)
    return [not a.get("exact_match") and str(a.get("answer")) in expected for a in answers]


def counts_of(answers: list[dict[str, Any]]) -> dict[str, int]:
    """Count exact matches and, where rows have answers in common, other rows' answers, by the metrics' names."""
    counts = {OF_ANSWERS[0]: sum(bool(a.get("exact_match")) for a in answers)}
    if len(_expected(answers)) < len(answers):
        counts[OF_ANSWERS[1]] = sum(is_another(answers))
    return counts


def _expected(answers: list[dict[str, Any]]) -> set[str]:
    return {str(answer["expected"]) for answer in answers if "expected" in answer}
