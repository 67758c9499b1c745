"""Exact and near duplicates: words and similarity by hand, pairs against brute force."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from fine_tune.corpus.near_duplicates import NearDuplicates, bands_and_rows, find_near_duplicates
from fine_tune.corpus.shingles import jaccard, words

VOCABULARY = [f"kata{i}" for i in range(2000)]


def families(seed: int, num: int = 60, size: int = 5) -> list[str]:
    """``num`` texts, each with ``size - 1`` copies in which up to 5 words are replaced, dropped or added."""
    draw = random.Random(seed)
    texts = []
    for _ in range(num):
        original = draw.choices(VOCABULARY, k=draw.randint(15, 60))
        texts.append(" ".join(original))
        for _ in range(size - 1):
            copy = list(original)
            for _ in range(draw.randint(0, 5)):
                at = draw.randrange(len(copy))
                copy[at : at + draw.choice([0, 1, 1])] = draw.choice(
                    [[], [draw.choice(VOCABULARY)]]
                )
            texts.append(" ".join(copy))
    draw.shuffle(texts)
    return texts


def templated(num: int, seed: int = 0) -> list[str]:
    """Every text is one template of 40 words with one word replaced: all are 0.8 similar and more."""
    draw = random.Random(seed)
    template = draw.sample(VOCABULARY, k=40)
    texts = []
    for i in range(num):
        at = draw.randrange(40)
        texts.append(" ".join([*template[:at], f"nomor{i}", *template[at + 1 :]]))
    return texts


def brute_force(texts: Sequence[str]) -> dict[tuple[int, int], float]:
    sets = [set(pairwise(text.split())) for text in texts]
    return {
        (i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for i, j in combinations(range(len(texts)), 2)
    }


def as_dict(found: NearDuplicates) -> dict[tuple[int, int], float]:
    pairs = [(i, j) for i, j in found.pairs.tolist()]
    return dict(zip(pairs, found.similarities.tolist(), strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ibu kota, IBU KOTA!", ["ibu", "kota", "ibu", "kota"]),
        ("I pay $0.2; don't_stop", ["i", "pay", "$", "0.2", "don", "t", "stop"]),
        ("C#, 1.500,5 & 3", ["c", "#", "1.500,5", "&", "3"]),
        ("C++: 2 - 3 = −1", ["c", "+", "+", "2", "-", "3", "=", "−", "1"]),  # symbols are words
        ("ﬁne Ｆｏｏ x²", ["fine", "foo", "x2"]),  # NFKC: ligature, full width, superscript
        ("北京2024年,好!", ["北", "京", "2024", "年", "好"]),
        ("カﾀｶﾅとかな", ["カ", "タ", "カ", "ナ", "と", "か", "な"]),
        ("ที่นี่ ๑๒๓", ["ที่", "นี่", "๑๒๓"]),  # marks stay with their letter, digits together
        ("हिन्दी में, लिखा", ["हिन्दी", "में", "लिखा"]),
        ("العَرَبِيَّة لغة", ["العَرَبِيَّة", "لغة"]),
        ("می\u200cخواهم ex\u00adample", ["میخواهم", "example"]),  # invisible joiner and soft hyphen
        ("한국어 문장", ["한국어", "문장"]),
        (" + - = ", ["+ - ="]),
        ("😀", ["😀"]),
        ("\ud83d", ["\\ud83d"]),  # half an emoji, as broken JSON gives it
        (" \n", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("satu dua tiga", "Satu, dua: TIGA!", 1.0),
        ("satu dua tiga", "satu dua empat", 1 / 3),  # {12, 23} and {12, 24}
        ("satu dua tiga empat", "satu dua tiga", 2 / 3),  # {12, 23, 34} and {12, 23}
        ("a b a b a b", "a b a", 1.0),  # sets: {ab, ba} both
        ("satu dua", "dua satu", 0.0),
        ("satu", "satu", 1.0),
        ("satu", "satu dua", 0.0),  # {1} and {12}
        ("12 apel 5 jeruk", "12 apel 7 jeruk", 1 / 5),  # numbers are words
        ("北京好", "北京大", 1 / 3),
        ("+ -", "- +", 0.0),
        ("2 + 3", "2 - 3", 0.0),
        ("", "", 1.0),
        ("", "satu", 0.0),
    ],
)
def test_jaccard(first: str, second: str, expected: float) -> None:
    assert jaccard(first, second) == expected == jaccard(second, first)


def test_copies_point_to_the_first_text_with_the_same_words() -> None:
    texts = ["Satu dua!", "tiga", "satu  DUA", ":-)", "tiga.", ":-(", "", " ", "dua satu"]
    found = find_near_duplicates(texts)
    assert found.first_copy.tolist() == [0, 1, 0, 3, 1, 5, 6, 6, 8]
    assert found.pairs.shape == (0, 2)
    assert found.num_capped == 0


def test_tiny_texts_pair_up() -> None:
    found = find_near_duplicates(["x", "a b a", "y", "a b a b", "b a"], threshold=0.5)
    assert as_dict(found) == {(1, 3): 1.0, (1, 4): 0.5, (3, 4): 0.5}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pairs_equal_brute_force(seed: int) -> None:
    texts = families(seed)
    everything = brute_force(texts)
    for threshold in (0.5, 0.7, 0.9):
        found = find_near_duplicates(texts, threshold=threshold)
        pairs = as_dict(found)
        originals = set(found.first_copy.tolist())
        true = {
            pair: similarity
            for pair, similarity in everything.items()
            if similarity >= threshold and originals.issuperset(pair)
        }
        assert pairs.items() <= true.items()
        assert len(true) > 20
        assert len(pairs) >= 0.97 * len(true)
        assert list(pairs) == sorted(pairs)
        assert found.num_capped == 0


def test_bands_reach_the_threshold() -> None:
    for threshold in np.linspace(0.5, 1, 51):
        bands, rows = bands_and_rows(threshold)
        assert bands * rows <= 300
        assert 1 - (1 - threshold**rows) ** bands >= 0.99


def test_order_of_texts_does_not_matter() -> None:
    texts = sorted(set(families(3)))
    order = random.Random(0).sample(range(len(texts)), len(texts))
    straight = find_near_duplicates(texts, threshold=0.6)
    shuffled = find_near_duplicates([texts[i] for i in order], threshold=0.6)
    back = {(min(order[i], order[j]), max(order[i], order[j])) for i, j in shuffled.pairs.tolist()}
    assert len(back) > 100
    assert back == set(as_dict(straight))


def test_an_iterator_of_texts_is_enough() -> None:
    texts = families(4, num=10)
    assert as_dict(find_near_duplicates(iter(texts))) == as_dict(find_near_duplicates(texts))


def test_the_result_is_the_same_in_every_process() -> None:
    program = (
        "from test_near_duplicates import families, templated\n"
        "from fine_tune.corpus.near_duplicates import find_near_duplicates\n"
        "found = find_near_duplicates(families(0) + templated(200))\n"
        "print(found.first_copy.tolist(), found.pairs.tolist(), found.similarities.tolist(), found.num_capped)"
    )
    here = Path(__file__)
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[2])]),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    found = find_near_duplicates(families(0) + templated(200))
    assert outputs[0].endswith(f"{found.similarities.tolist()} {found.num_capped}\n")


def test_texts_that_all_resemble_one_another_stay_bounded() -> None:
    texts = templated(2000)
    found = find_near_duplicates(texts, max_partners=20)
    assert len(found.pairs) <= 2000 * 20  # of 1,999,000 that are similar
    assert found.num_capped == 2000
    assert np.bincount(found.pairs.ravel(), minlength=2000).min() >= 20
    assert all(
        jaccard(texts[i], texts[j]) == similarity
        for (i, j), similarity in list(as_dict(found).items())[:100]
    )


def test_looks_are_capped_and_said_so_even_where_partners_are_not() -> None:
    texts = ["a b " * length for length in range(2, 402)]  # all have the shingles {ab, ba}
    found = find_near_duplicates(texts, max_partners=10_000)
    assert len(found.pairs) == 400 * 64  # of 79,800: each looks at 64 of its bucket
    assert set(found.similarities.tolist()) == {1.0}
    assert found.num_capped == 400


def test_partners_kept_are_the_most_similar() -> None:
    base = VOCABULARY[:30]
    texts = [" ".join(base), *[" ".join([*base, *VOCABULARY[100 : 100 + i]]) for i in range(1, 6)]]
    found = find_near_duplicates(texts, max_partners=1)  # 29 + i shingles each, one inside the next
    assert as_dict(found) == {(i, i + 1): (29 + i) / (30 + i) for i in range(5)}
    assert found.num_capped == 6


def test_partners_in_ones_own_group_hide_none_in_another() -> None:
    texts = templated(603)
    groups = [0] * 600 + [1] * 3
    across = {(i, j) for i in range(600) for j in range(600, 603)}
    found = set(as_dict(find_near_duplicates(texts, groups=groups)))
    assert across <= found
    assert len(found) <= 603 * 20 * 2
    together = set(as_dict(find_near_duplicates(texts)))
    assert len(across & together) < len(across) / 2


def test_a_text_with_copies_in_two_groups_belongs_to_both() -> None:
    texts = templated(600)
    found = find_near_duplicates([*texts, texts[7].upper()], groups=[0] * 600 + [1])
    assert found.first_copy[600] == 7
    partners = found.pairs[(found.pairs == 7).any(axis=1)]
    assert len(partners) == 599  # the one text of group 1 that each of group 0 has


def test_training_rows_that_leak() -> None:
    base = VOCABULARY[:40]
    other = VOCABULARY[50:90]
    train = [" ".join(base), " ".join(other), " ".join([*base[:-1], "x"]), "lain sekali", "sama"]
    test = [" ".join([*base, "tambahan"]), "Sama!"]
    held_out = np.array([False] * len(train) + [True] * len(test))
    found = find_near_duplicates([*train, *test], groups=held_out)
    assert found.leaks(held_out).tolist() == [True, False, True, False, True, False, False]


@pytest.mark.parametrize("texts", [[], [""], ["satu"]])
def test_nothing_to_pair(texts: list[str]) -> None:
    found = find_near_duplicates(texts, groups=[0] * len(texts))
    assert found.first_copy.tolist() == list(range(len(texts)))
    assert found.first_copy.dtype == found.pairs.dtype == np.int64
    assert found.similarities.dtype == np.float64
    assert found.pairs.shape == (0, 2)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_a_threshold_outside_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        find_near_duplicates(["satu"], threshold=threshold)


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="max_partners: 0"):
        find_near_duplicates(["satu"], max_partners=0)
    with pytest.raises(ValueError, match="groups: 1 given for 2 texts"):
        find_near_duplicates(["satu", "dua"], groups=[0])
