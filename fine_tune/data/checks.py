"""What can be wrong with the data module's settings, told before anything is read."""

from dataclasses import replace

from fine_tune.data.formats import FormatName
from fine_tune.data.options import Split
from fine_tune.data.sources import Source
from fine_tune.data.split import SPLITS, check_split
from fine_tune.data.templates import PREFERENCE
from fine_tune.errors import UserError


def listed_sources(
    path: str | dict[str, str] | None,
    sources: list[Source] | None,
    format: FormatName | None,
    prompt: str | None,
    completion: str | None,
    revision: str | None,
) -> list[Source]:
    """Return the sources, given as one path with its settings or as a list.

    Raises:
        UserError: Both or neither are given, or a weight is not above 0.
    """
    if (path is None) == (sources is None):
        given = "both" if path is not None else "neither"
        raise UserError(f"data.path, data.sources: give one of them, {given} given")
    if path is not None:
        return [
            Source(path, format=format, prompt=prompt, completion=completion, revision=revision)
        ]
    if format is not None or prompt is not None or completion is not None or revision is not None:
        raise UserError(
            "data.format, data.prompt, data.completion, data.revision: with data.sources, set them per source"
        )
    if not sources:
        raise UserError("data.sources: the list is empty")
    weights = {source.label: source.weight for source in sources}  # null is let through to here
    wrong = [label for label, w in weights.items() if w is None or not 0 < w < float("inf")]
    if wrong:
        raise UserError(f"data.sources: the weight of {', '.join(wrong)} must be above 0")
    return sources


def pair_sources(
    path: str | dict[str, str] | None,
    sources: list[Source] | None,
    prompt: str | None,
    chosen: str | None,
    rejected: str | None,
    revision: str | None,
) -> list[Source]:
    """Return the sources of pairs, given as one path with its settings or as a list.

    Raises:
        UserError: Both or neither are given, or a weight is not above 0.
    """
    if sources is not None and {prompt, chosen, rejected} != {None}:
        raise UserError(
            "data.prompt, data.chosen, data.rejected: with data.sources, set them per source"
        )
    listed = listed_sources(path, sources, None, None, None, revision)
    if path is not None:
        listed = [replace(listed[0], prompt=prompt, chosen=chosen, rejected=rejected)]
    return [replace(source, format=PREFERENCE) for source in listed]


def check_settings(
    sizes: dict[str, int | None],
    *,
    num_workers: int,
    seed: int,
    near_duplicates: float,
    split: Split | None,
    max_rows: int | dict[str, int] | None,
) -> dict[str, int]:
    """Refuse what cannot be meant, all at once.

    Args:
        sizes: What must be at least 1, by its key; None is left open.
        num_workers: Processes; not negative.
        seed: From 0 up to 2^63.
        near_duplicates: A similarity above 0 and up to 1.
        split: Checked by ``check_split``.
        max_rows: One number, or one per split.

    Returns:
        The most rows each split may have.

    Raises:
        UserError: One line per problem.
    """
    problems = [
        f"data.{key}: must be at least 1, got {size}"
        for key, size in sizes.items()
        if size is not None and size < 1
    ]
    if num_workers < 0:
        problems.append(f"data.num_workers: must not be negative, got {num_workers}")
    if not 0 <= seed < 2**63:
        problems.append(f"data.seed: must lie between 0 and 2^63, got {seed}")
    if not 0 < near_duplicates <= 1:
        problems.append(
            f"data.near_duplicates: a similarity lies above 0 and up to 1, got {near_duplicates}"
        )
    if isinstance(split, dict):
        try:
            check_split(split)
        except UserError as error:
            problems += error.problems
    given = dict.fromkeys(SPLITS, max_rows) if isinstance(max_rows, int) else max_rows
    limits = dict(given or {})
    if any(name not in SPLITS or limit < 1 for name, limit in limits.items()):
        problems.append(
            f"data.max_rows: {max_rows}; give a number above 0, or one for each of {', '.join(SPLITS)}"
        )
    if problems:
        raise UserError(*problems)
    return limits
