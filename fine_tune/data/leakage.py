"""Rows that stand, exactly or nearly, in two splits or twice in one, compared by what they say without templates."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations, islice, product
from typing import Any

import numpy as np

from fine_tune.corpus.near_duplicates import NearDuplicates, find_near_duplicates
from fine_tune.data.content import own_words
from fine_tune.data.files import rows_of
from fine_tune.data.parts import Part
from fine_tune.data.sources import path_of
from fine_tune.data.split import SPLITS

MAX_LISTED_PAIRS, MAX_LISTED_OF_ROW = 10_000, 20


@dataclass
class Leakage:
    """What was found.

    Args:
        threshold: Jaccard similarity of word pairs from which two rows are near-duplicates.
        between: For ``train/validation`` and so on, the rows of each side that the other has too: with the same words
            (exact), or nearly.
        within: Rows of a split that repeat an earlier one, and rows nearly equal to another one.
        num_pairs: Pairs between splits.
        pairs: The first of them: split, source and row (from 1) of both sides, and the similarity.
        num_capped: Rows with so many near-duplicates that not all were looked at.
        dropped_from_train: Training rows left out on request.
    """

    threshold: float
    between: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    within: dict[str, dict[str, int]] = field(default_factory=dict)
    num_pairs: int = 0
    pairs: list[dict[str, Any]] = field(default_factory=list)
    num_capped: int = 0
    dropped_from_train: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_leakage(parts: list[Part], threshold: float) -> tuple[Leakage, np.ndarray]:
    """Find exact and near-duplicate rows between and within splits.

    Args:
        parts: The rows of every split.
        threshold: See ``Leakage``.

    Returns:
        What was found, and the ids of the training rows that stand in another split too.
    """
    texts = [text for part in parts for text in _texts(part)]
    splits = np.repeat([SPLITS.index(p.split) for p in parts], [len(p.rows) for p in parts])
    found = find_near_duplicates(texts, threshold=threshold, groups=splits)
    # Bit s of a class of equal rows: it has a member in split s; of its neighbours: a nearly equal row is there.
    bits = (1 << splits).astype(np.int64)
    members, neighbours = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
    np.bitwise_or.at(members, found.first_copy, bits)
    first, second = found.pairs[:, 0], found.pairs[:, 1]
    np.bitwise_or.at(neighbours, first, members[second])
    np.bitwise_or.at(neighbours, second, members[first])
    exact, near = members[found.first_copy], neighbours[found.first_copy]
    leakage = Leakage(threshold, num_capped=found.num_capped)
    present = [s for s in range(len(SPLITS)) if (splits == s).any()]
    for s in present:
        mine = splits == s
        leakage.within[SPLITS[s]] = {
            "repeated": int(mine.sum() - len(np.unique(found.first_copy[mine]))),
            "near": int((mine & (near >> s & 1 == 1)).sum()),
        }
        for other in (t for t in present if t > s):
            sides = {s: other, other: s}
            leakage.between[f"{SPLITS[s]}/{SPLITS[other]}"] = {
                SPLITS[a]: {
                    "exact": int(((splits == a) & (exact >> b & 1 == 1)).sum()),
                    "near": int(
                        ((splits == a) & (exact >> b & 1 == 0) & (near >> b & 1 == 1)).sum()
                    ),
                }
                for a, b in sides.items()
            }
    leakage.num_pairs = _num_pairs_between(found, splits)
    places = [(part, i) for part in parts for i in range(len(part.rows))]
    leakage.pairs = [
        {"first": _place(*places[i]), "second": _place(*places[j]), "similarity": round(s, 4)}
        for i, j, s in islice(_pairs_between(found, splits), MAX_LISTED_PAIRS)
    ]
    row_ids = np.concatenate([part.row_ids for part in parts])
    return leakage, row_ids[found.leaks(held_out=splits != SPLITS.index("train"))]


def leakage_notes(leakage: Leakage) -> list[str]:
    """Say between which splits rows stand twice, and what can be done."""
    notes = []
    for names, sides in leakage.between.items():
        first, second = names.split("/")
        if first == "train" and leakage.dropped_from_train:
            continue
        counts = {"in the same words": sides[second]["exact"], "nearly so": sides[second]["near"]}
        said = " and ".join(f"{count:,} {how}" for how, count in counts.items() if count)
        if said:
            drop = "; --data.drop_leaked true leaves them out of train" if first == "train" else ""
            notes.append(f"WARNING: rows of {second} say what rows of {first} say: {said}{drop}")
    if leakage.num_capped:
        notes.append(
            f"{leakage.num_capped:,} rows have more near-duplicates than were looked at: their counts are lower bounds"
        )
    if leakage.dropped_from_train:
        notes.append(
            f"{leakage.dropped_from_train:,} rows left out of train: they stand in another split too"
        )
    return notes


def _texts(part: Part) -> Iterator[str]:
    said = [
        own_words(row, part.format_name, part.source.templates)
        for start in range(0, len(part.rows), 1000)
        for row in rows_of(part.rows[start : start + 1000])
    ]
    # A system turn that most rows share says nothing of a row; one of its own may hold the text it is about.
    systems = Counter(words.system for words in said)
    shared = {system for system, count in systems.items() if 2 * count > len(said) > 1}
    for words in said:
        yield "\n".join(words[1:] if words.system in shared else words)


def _num_pairs_between(found: NearDuplicates, splits: np.ndarray) -> int:
    counts = np.zeros((len(splits), len(SPLITS)), np.int64)  # per class of equal rows and split
    np.add.at(counts, (found.first_copy, splits), 1)
    of_class = counts.sum(1)
    equal = (of_class**2 - (counts**2).sum(1)).sum() // 2
    first, second = found.pairs[:, 0], found.pairs[:, 1]
    near = of_class[first] * of_class[second] - (counts[first] * counts[second]).sum(1)
    return int(equal + near.sum())


def _pairs_between(found: NearDuplicates, splits: np.ndarray) -> Iterator[tuple[int, int, float]]:
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)  # by class of equal rows and split
    for row, (first_copy, split) in enumerate(zip(found.first_copy, splits, strict=True)):
        rows[int(first_copy), int(split)].append(row)
    equal = ((int(c), int(c), 1.0) for c in np.unique(found.first_copy))
    near = zip(found.pairs.tolist(), found.similarities.tolist(), strict=True)
    for one, other, similarity in chain(equal, ((a, b, s) for (a, b), s in near)):
        for low, high in combinations(range(len(SPLITS)), 2):
            sides = {(one, other), (other, one)}
            for a, b in sides:
                found_here = product(rows.get((a, low), ()), rows.get((b, high), ()))
                yield from ((i, j, similarity) for i, j in islice(found_here, MAX_LISTED_OF_ROW))


def _place(part: Part, index: int) -> dict[str, Any]:
    path = path_of(part.source, part.found_in)
    return {"split": part.split, "source": path, "row": int(part.positions[index]) + 1}
