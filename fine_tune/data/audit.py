"""What there is to know of the data before training on it: lengths, truncation, duplicates, drift between splits.

Everything is of the training split but row counts, leakage and the comparison of the splits.
"""

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset

from fine_tune.data.encode_rows import column, sequence_lengths, token_counts
from fine_tune.data.leakage import Leakage
from fine_tune.data.parts import Part

PERCENTILES = {"p90": 90, "p95": 95, "p99": 99}
NUM_BINS = 12
MOST_BY_LENGTH = 0.65  # of the pairs may be told by their length without a word


def audit(
    encoded: dict[str, Dataset], parts: list[Part], leakage: Leakage, left_out: Counter[str]
) -> dict[str, Any]:
    """Count and compare.

    Args:
        encoded: Encoded rows per split, those that the truncation policy leaves out included (without tokens).
        parts: The raw rows behind them.
        leakage: What ``find_leakage`` found.
        left_out: Rows left out for an empty answer (``empty``), or pairs of twice the same (``same``).

    Returns:
        Plain numbers, lists and texts, as ``data.json`` holds them.
    """
    columns = {split: _columns(rows) for split, rows in encoded.items()}
    train = columns["train"]
    kept = train["num_supervised"] > 0
    lost, supervised = int(train["num_supervised_cut"].sum()), int(train["num_supervised"].sum())
    return {
        "rows": {split: int((c["num_supervised"] > 0).sum()) for split, c in columns.items()},
        "too_long_rows": int((~kept).sum()),
        "empty_completions": left_out.total(),
        "tokens": int(train["tokens"].sum()),
        "supervised_tokens": supervised,
        "length": length_statistics(
            (train["tokens"] + train["num_cut"])[kept]
        ),  # before truncation
        "longest_sequence": int((train["sequence"] + train["num_cut"])[kept].max()),
        "supervised_length": length_statistics(train["num_supervised"][kept]),
        "truncated_rows_share": float((train["num_cut"][kept] > 0).mean()),
        "supervised_tokens_lost_share": lost / (lost + supervised),
        "preferences": preferences(encoded["train"], parts, left_out),
        "repeated_rows": leakage.within["train"],
        "leakage": leakage.as_dict(),
        "splits": {split: _description(split, c, parts) for split, c in columns.items()},
        "drift": {
            split: drift(train, c) | strata_drift(split, parts)
            for split, c in columns.items()
            if split != "train"
        },
    }


def length_statistics(lengths: np.ndarray) -> dict[str, Any]:
    """Describe a distribution of lengths in tokens, with a histogram of equal bins: ``[low, high)``."""
    low, width = int(lengths.min()), -(-(int(np.ptp(lengths)) + 1) // NUM_BINS)
    edges = np.arange(low, int(lengths.max()) + width + 1, width)
    counts, _ = np.histogram(lengths, bins=edges)
    return {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        **{name: float(np.percentile(lengths, p)) for name, p in PERCENTILES.items()},
        "max": int(lengths.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def preferences(rows: Dataset, parts: list[Part], left_out: Counter[str]) -> dict[str, Any]:
    """Describe the pairs among training rows: how long both answers are, and how far length alone tells the better one.

    Returns:
        Empty without pairs. ``longer_chosen`` is the share of the pairs whose chosen answer is the longer one, of all
        whose answers differ in length: how often "always the longer" is right. ``contradictory`` counts the pairs that
        another one of the same prompt turns round. Pairs of empty or of equal answers are counted over all splits.
    """
    num_prompt, chosen = column(rows, "num_prompt"), column(rows, "num_chosen")
    pairs = chosen > 0
    if not pairs.any():
        return {}
    rejected = (token_counts(rows) - num_prompt - chosen)[pairs]
    chosen = chosen[pairs]
    prompts = np.concatenate([part.prompts for part in parts if part.split == "train"])
    _, of_prompt = np.unique(prompts, return_counts=True)
    differ = chosen != rejected
    answers_cut = column(rows, "num_answers_cut")[pairs]
    return {
        "chosen_length": length_statistics(chosen),
        "rejected_length": length_statistics(rejected),
        "longer_chosen": float((chosen > rejected)[differ].mean()) if differ.any() else 0.5,
        "same_length": float((~differ).mean()),
        "num_prompts": len(of_prompt),
        "most_pairs_of_a_prompt": int(of_prompt.max()),
        "one_answer_cut": int((answers_cut == 1).sum()),
        "both_answers_cut": int((answers_cut == 2).sum()),
        "empty_answers": left_out["empty"],
        "same_answers": left_out["same"],
        "contradictory": _contradictory(rows),
    }


def _contradictory(rows: Dataset) -> int:
    pairs = set()
    for row in rows.select_columns(["input_ids", "num_prompt", "num_chosen"]):
        ids, prompt = row["input_ids"], row["num_prompt"]
        if row["num_chosen"]:
            second = prompt + row["num_chosen"]
            sides = (ids[:prompt], ids[prompt:second], ids[second:])
            pairs.add(tuple(hash(tuple(side)) for side in sides))
    return sum((prompt, rejected, chosen) in pairs for prompt, chosen, rejected in pairs)


def preference_notes(found: dict[str, Any]) -> list[str]:
    """Say where length alone tells the chosen answer, where answers are cut, and where pairs contradict each other."""
    notes = []
    share = found.get("longer_chosen", 0.5)
    if not 1 - MOST_BY_LENGTH <= share <= MOST_BY_LENGTH:
        which, often = ("longer", share) if share > 0.5 else ("shorter", 1 - share)
        notes.append(
            f"WARNING: 'always the {which} answer' is right for {often:.0%} of the training pairs: what is learned may "
            "be length; model.ld_alpha below 1 weighs the ends of longer answers less"
        )
    one, both = (found.get(f"{which}_cut", 0) for which in ("one_answer", "both_answers"))
    if one or both:
        notes.append(
            f"WARNING: of {one:,} training pairs one answer is cut, of {both:,} both: what is compared are beginnings; "
            "raise data.max_length, or set data.truncation: prompt_left or drop"
        )
    if found.get("contradictory"):
        notes.append(
            f"WARNING: {found['contradictory']:,} training pairs are turned round by another one of the same prompt"
        )
    return notes


def drift(train: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, Any]:
    """Test whether two splits look drawn alike: the two-sample Kolmogorov-Smirnov test on lengths.

    Returns:
        For all tokens and for supervised ones: ``distance`` (largest gap between the distribution functions, 0 to 1)
        and ``p_value`` (how often splits drawn alike are at least as far apart).
    """
    from scipy.stats import ks_2samp  # half a second to import, needed once per data set

    result = {}
    for name in ("tokens", "num_supervised"):
        of_train, of_other = (c[name][c["num_supervised"] > 0] for c in (train, other))
        test = ks_2samp(of_train, of_other)
        result[name] = {"distance": float(test.statistic), "p_value": float(test.pvalue)}
    return result


def strata_drift(split: str, parts: list[Part]) -> dict[str, Any]:
    """Test whether a split holds the strata in the training split's shares: Pearson's chi-squared test."""
    from scipy.stats import chi2_contingency

    counts = [Counter(_strata(name, parts)) for name in ("train", split)]
    strata = sorted(counts[0] | counts[1])
    if len(strata) < 2:
        return {}
    test = chi2_contingency([[of_split[s] for s in strata] for of_split in counts])
    shares = [np.array([of_split[s] for s in strata]) / of_split.total() for of_split in counts]
    distance = float(np.abs(shares[0] - shares[1]).sum() / 2)
    return {"strata": {"distance": distance, "p_value": float(test.pvalue)}}


def drift_notes(found: dict[str, Any]) -> list[str]:
    """Say which splits differ from the training split by more than chance and more than a little."""
    names = {"tokens": "lengths", "num_supervised": "supervised lengths", "strata": "strata"}
    return [
        f"WARNING: {split} differs from train in its {names[what]} "
        f"(distance {test['distance']:.2f}, p {test['p_value']:.1g})"
        for split, tests in found.items()
        for what, test in tests.items()
        if test["p_value"] < 0.01 and test["distance"] > 0.1
    ]


def _columns(rows: Dataset) -> dict[str, np.ndarray]:
    names = ("num_supervised", "num_cut", "num_supervised_cut")
    lengths = {"tokens": token_counts(rows), "sequence": sequence_lengths(rows)}
    return {**{name: column(rows, name) for name in names}, **lengths}


def _description(split: str, columns: dict[str, np.ndarray], parts: list[Part]) -> dict[str, Any]:
    kept = columns["num_supervised"] > 0
    mine = [part for part in parts if part.split == split]
    sources = Counter({part.source.label: 0 for part in mine})
    for part in mine:
        sources[part.source.label] += len(part.rows)
    strata = Counter(_strata(split, parts))
    return {
        "length": _short(columns["tokens"][kept]),
        "supervised_length": _short(columns["num_supervised"][kept]),
        "sources": {name: count / sources.total() for name, count in sources.items()},
        "strata": {name: n / strata.total() for name, n in sorted(strata.items()) if name},
    }


def _short(lengths: np.ndarray) -> dict[str, float]:
    described = length_statistics(lengths)
    return {name: described[name] for name in ("mean", "median", "p95", "max")}


def _strata(split: str, parts: list[Part]) -> list[str]:
    return [str(value) for part in parts if part.split == split for value in part.strata]
