"""What the run was trained on: sources, splits, lengths, truncation, duplicates, leakage, as the audit found them."""

from typing import Any

from fine_tune.report.blocks import Block, Facts, Section, Sentences, Table
from fine_tune.report.record import RunRecord
from fine_tune.report.setup import sources
from fine_tune.report.words import Words

BAR = 12
TEMPLATES = ("prompt", "completion", "chosen", "rejected")


def data_card(run: RunRecord, words: Words) -> Section:
    """Describe the data by ``data.json``, which ``fit`` writes before the first step."""
    blocks: list[Block] = [_sources(run, words)]
    audit = run.audit
    try:
        blocks += _audited(audit, words) if audit else []
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        audit = {}
    if not audit:
        blocks.append(Sentences([("note", words("data_unknown"))]))
    return Section("data", words("data_card"), blocks)


def _sources(run: RunRecord, words: Words) -> Table:
    licences = run.setting("licences")
    given = licences if isinstance(licences, dict) else {}
    rows = []
    for path, source in sources(run):
        weight = source.get("weight", 1.0)
        licence = given.get(path, given.get("all"))
        template = [source.get(k) or run.setting(f"data.{k}") for k in TEMPLATES]
        read = " → ".join(str(part) for part in template if part)
        rows.append(
            [
                path,
                str(licence or words("licence_not_given")),
                read
                or str(source.get("format") or run.setting("data.format") or words("detected")),
                words.number(weight),
            ]
        )
    head = [words(k) for k in ("source", "licence", "read_as", "weight")]
    return Table(head, rows, num_text=3, title=words("sources"), stacks=True)


def _audited(audit: dict[str, Any], words: Words) -> list[Block]:
    splits = []
    for split, rows in audit["rows"].items():
        found = audit["splits"].get(split, {})
        length, supervised = found.get("length", {}), found.get("supervised_length", {})
        numbers = [length.get(k) for k in ("mean", "median", "p95", "max")] + [
            supervised.get("mean")
        ]
        shown = [words.fixed(n, 1) if n is not None else "" for n in numbers]
        splits.append([words.known(f"split_{split}", split), words.number(rows), *shown])
    head = [words(k) for k in ("split", "rows", "mean", "median", "p95", "max", "supervised_mean")]
    return [
        Table(head, splits, title=words("splits"), note=words("lengths_in_tokens")),
        _histogram(audit["length"]["histogram"], words),
        Facts(_quality(audit, words)),
    ]


def _histogram(histogram: dict[str, list[float]], words: Words) -> Table:
    edges, counts = histogram["edges"], histogram["counts"]
    most = max(counts)
    rows = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        wide = int(high) - int(low) > 1
        tokens = (
            f"{words.number(int(low))}–{words.number(int(high) - 1)}"
            if wide
            else words.number(int(low))
        )
        rows.append([tokens, "█" * round(BAR * count / most), words.number(count)])
    head = [words("tokens_per_row"), words("share"), words("rows")]
    return Table(head, rows, num_text=2, title=words("length_histogram"), bars=1)


def _quality(audit: dict[str, Any], words: Words) -> list[tuple[str, str]]:
    repeated, leakage = audit["repeated_rows"], audit["leakage"]
    supervised = audit["supervised_tokens"] / audit["tokens"]
    pairs = [
        (
            words("tokens"),
            words("tokens_supervised", tokens=audit["tokens"], share=words.share(supervised)),
        ),
        (
            words("truncation"),
            words(
                "truncation_of",
                rows=words.share(audit["truncated_rows_share"]),
                tokens=words.share(audit["supervised_tokens_lost_share"]),
                left_out=audit["too_long_rows"],
            ),
        ),
        (words("empty_answers"), words.number(audit["empty_completions"])),
        (
            words("duplicates"),
            words("duplicates_of", exact=repeated["repeated"], near=repeated["near"]),
        ),
    ]
    for names, sides in leakage["between"].items():
        second = names.split("/")[1]
        first, other = (words.known(f"split_{n}", n) for n in names.split("/"))
        told = words(
            "leakage_of", exact=sides[second]["exact"], near=sides[second]["near"], split=other
        )
        pairs.append((words("leakage", first=first, second=other), told))
    if leakage.get("dropped_from_train"):
        pairs.append((words("leaked_dropped"), words.number(leakage["dropped_from_train"])))
    found = audit.get("preferences")
    if found:
        longer = words.share(found["longer_chosen"])
        pairs.append((words("length_bias"), words("longer_chosen", share=longer)))
        told = words("pairs_cut_of", one=found["one_answer_cut"], both=found["both_answers_cut"])
        pairs.append((words("pairs_cut"), told))
        pairs.append((words("contradictory"), words.number(found["contradictory"])))
    return pairs
