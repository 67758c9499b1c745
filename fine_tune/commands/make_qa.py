"""`make-qa`: write the quickstart's questions and its tokenizer from a table of facts.

Sits before the straight line: what it writes is what `data/formats.py` reads.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fine_tune.corpus import tokenizers
from fine_tune.corpus.fact_texts import fact_texts
from fine_tune.corpus.facts import digest, filled, per_mille, read_relations, relation_facts
from fine_tune.errors import UserError
from fine_tune.printable import printable

log = logging.getLogger("fine_tune")
QUICKSTART = Path(__file__).parents[1] / "quickstart"
SPLITS = ("train", "validation", "test", "test_new_phrasings", "test_new_operands")
CORPUS = "corpus.txt"
# Per mille of the (fact, phrasing) pairs.
TEST, VALIDATION, NEW_PHRASINGS, NEW_OPERANDS_ASKED = 100, 35, 300, 500


class Row(NamedTuple):
    """One question with its answer; the pair (fact, phrasing) is its identity."""

    question: str
    answer: str
    fact: str
    phrasing: str


def make_qa(
    output: str,
    *,
    facts: str | list[str] | None = None,
    tokenizer_vocab_size: int | None = 1500,
    corpus_texts: int = 0,
    overwrite: bool = False,
) -> None:
    """Write train, validation and test questions in Indonesian, and a tokenizer fitted to them.

    The same facts give the same bytes. `test.jsonl` and `validation.jsonl` ask facts and use
    phrasings that `train.jsonl` also has, but never that fact in that phrasing.
    `test_new_phrasings.jsonl` asks in phrasings that are never trained on,
    `test_new_operands.jsonl` about operand pairs that are never trained on.

    Args:
        output: Folder for the five JSONL files and the folder `tokenizer`.
        facts: YAML file of relations with their facts and phrasings, or several, a later one adding
            to an earlier one; by default the one shipped in `fine_tune/quickstart/facts.yaml`.
            Extend it to ask about something else: rows that were there before stay in the file
            they were in.
        tokenizer_vocab_size: Largest number of tokens, special tokens included; at least 261 (256
            bytes and 5 special tokens). Fewer tokens: longer rows, a smaller embedding. None: no
            tokenizer.
        corpus_texts: Texts of the facts' `statements` to write into `corpus.txt`, one a line, to
            pretrain on; no question stands in them.
        overwrite: Whether to replace files that are already there.

    Raises:
        UserError: If a file to write is there and `overwrite` is false, the vocabulary is too
            small, or the facts cannot be read or ask one question twice.
    """
    least = tokenizers.least_tokens("bpe", tokenizers.SPECIAL_TOKENS)
    if tokenizer_vocab_size is not None and tokenizer_vocab_size < least:
        raise UserError(
            f"--tokenizer_vocab_size: {tokenizer_vocab_size} is too small; the 256 bytes and the "
            f"special tokens need {least}."
        )
    if corpus_texts < 0:
        raise UserError(f"--corpus_texts: must be at least 0, got {corpus_texts}")
    folder = Path(output)
    paths = [folder / f"{split}.jsonl" for split in SPLITS]
    corpus = [folder / CORPUS] * (corpus_texts > 0)
    tokenizer = [folder / "tokenizer" / n for n in tokenizers.FILES] * bool(tokenizer_vocab_size)
    refuse_existing([*paths, *corpus, *tokenizer], overwrite)
    relations = read_relations(facts_files(facts))
    rows = split_rows(relations)
    texts = {path: fact_texts(relations, corpus_texts) for path in corpus}
    lines = {
        path: (json.dumps(row._asdict(), ensure_ascii=False) for row in rows[path.stem])
        for path in paths
    }
    contents = {
        path: "".join(f"{line}\n" for line in of_path)
        for path, of_path in {**lines, **texts}.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        path.write_text(content, encoding="utf-8", newline="\n")
    if tokenizer_vocab_size is not None:
        trained = (f"{row.question} {row.answer}" for row in rows["train"])
        tokenizers.save(
            tokenizers.train(trained, "bpe", tokenizer_vocab_size), folder / "tokenizer"
        )
    more = [f"{corpus_texts:,} texts in {CORPUS}"] * bool(corpus)
    say_written(folder, rows, [*more, *["a tokenizer"] * bool(tokenizer)])


def facts_files(facts: str | list[str] | None) -> list[Path]:
    """Return the files of relations that are given, or the shipped one."""
    given = [facts] if isinstance(facts, str) else facts or [str(QUICKSTART / "facts.yaml")]
    return [Path(file) for file in given]


def say_written(folder: Path, rows: Mapping[str, Sequence[Any]], more: Sequence[str] = ()) -> None:
    """Say how many rows each file got, and what else was written."""
    counts = [f"{len(of_split):,} in {split}.jsonl" for split, of_split in rows.items()]
    log.info("%s", printable(f"written: {folder}: {', '.join([*counts, *more])}"))


def refuse_existing(files: list[Path], overwrite: bool) -> None:
    """Refuse to write over files that are there.

    Raises:
        UserError: Names them, unless they may be replaced.
    """
    existing = [str(path) for path in files if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"These files exist already: {', '.join(existing)}.",
            "Choose another --output, or replace them with --overwrite true.",
        )


def split_rows(relations: dict[str, dict[str, Any]]) -> dict[str, list[Row]]:
    """Ask every fact in every phrasing and say which file each question belongs to.

    Args:
        relations: As `read_relations` gives them.

    Returns:
        The rows of each split, which follows from the hash of the ids of fact and phrasing.
        Relations take turns, so that the first rows of a file are varied; within a relation a
        `pinned` row comes first and the others in the order of their hash.

    Raises:
        UserError: Two rows ask the same question.
    """
    by_relation = [_relation_rows(*item) for item in relations.items()]
    by_question: dict[str, Row] = {}
    for row in (row for rows in by_relation for split in SPLITS for row in rows[split]):
        other = by_question.setdefault(row.question, row)
        if other is not row:
            raise UserError(
                f"--facts: {row.question!r} is asked twice: for the fact {other.fact} phrased as "
                f"{other.phrasing}, and for {row.fact} phrased as {row.phrasing}. "
                "Change one of the two phrasings."
            )
    return {
        split: [
            rows[split][turn]
            for turn in range(max(len(rows[split]) for rows in by_relation))
            for rows in by_relation
            if turn < len(rows[split])
        ]
        for split in SPLITS
    }


def _relation_rows(name: str, relation: dict[str, Any]) -> dict[str, list[Row]]:
    pinned = tuple(f"{name}:{part}" for part in relation.get("pinned", {}).values())
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for fact in relation_facts(name, relation):
        for kind in ("phrasings", "new_phrasings"):
            for key, template in relation.get(kind, {}).items():
                question = filled(template, fact, f"{name}:{key}")
                row = Row(question, fact.answer, fact.id, f"{name}:{key}")
                is_pinned = (row.fact, row.phrasing) == pinned
                split = "validation" if is_pinned else _split(row, fact.is_trained, kind)
                if split is not None:
                    rows[split].append(row)
    # A fact or phrasing that only held-out rows have goes back to training (small tables only).
    facts_trained = {row.fact for row in rows["train"]}
    phrasings_trained = {row.phrasing for row in rows["train"]}
    for split in ("validation", "test"):
        for row in list(rows[split]):
            if row.fact not in facts_trained or row.phrasing not in phrasings_trained:
                rows[split].remove(row)
                rows["train"].append(row)
    for split in SPLITS:
        rows[split].sort(key=lambda row: ((row.fact, row.phrasing) != pinned, digest(*row[2:])))
    return rows


def _split(row: Row, is_trained: bool, kind: str) -> str | None:
    place = per_mille(row.fact, row.phrasing)
    if kind == "new_phrasings":
        return "test_new_phrasings" if is_trained and place < NEW_PHRASINGS else None
    if not is_trained:
        return "test_new_operands" if place < NEW_OPERANDS_ASKED else None
    if place < TEST:
        return "test"
    return "validation" if place < TEST + VALIDATION else "train"
