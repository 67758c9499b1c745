"""Exact and near duplicates among texts: leakage between splits, repeated rows, repeated documents of a corpus.

MinHash and locality-sensitive hashing propose pairs, an exact Jaccard similarity decides. Pure functions, no torch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from rensa import RMinHash

from fine_tune.corpus.shingles import shingles, similarity, words

# Shape letters: N texts, U first copies (unique texts), G groups, K hashes, P pairs.
_MAX_HASHES = 300  # per signature: twice as many bytes, at thresholds up to 0.9
_MISS_RATE = 0.01  # of pairs exactly at the threshold; those above it are missed less
_LOOKS_PER_BUCKET = 64  # members of one bucket and group that a text is compared with
_LOOKS_PER_TEXT = 512  # the same over all buckets
_CACHED_SHINGLES = 1_000_000  # about 100 MB
_BLOCK = 1 << 20  # pairs handled at once


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Which texts repeat others.

    Attributes:
        first_copy: ``[N]``, for each text the first one with the same words (itself if it is the first).
        pairs: ``[P, 2]``, i < j, sorted; both are first copies and their similarity reaches the threshold.
        similarities: ``[P]``, the exact Jaccard similarity of each pair.
        num_capped: First copies with more look-alikes than were looked at or kept: their pairs may be incomplete.
            Every other text has all of its pairs, up to the recall of ``bands_and_rows``.
    """

    first_copy: np.ndarray
    pairs: np.ndarray
    similarities: np.ndarray
    num_capped: int

    def leaks(self, held_out: np.ndarray) -> np.ndarray:
        """Find the texts to leave out of training: the same as, or similar to, a held-out text.

        Args:
            held_out: Boolean ``[N]``, the texts of the other splits. Give the splits as ``groups`` to the search, so
                that no held-out partner is lost to the cap.

        Returns:
            Boolean ``[N]``, false for the held-out texts themselves.
        """
        kept = np.zeros(len(self.first_copy), dtype=bool)
        held_out = np.asarray(held_out, dtype=bool)
        kept[self.first_copy[held_out]] = True
        similar = kept.copy()
        similar[self.pairs[kept[self.pairs].any(axis=1)]] = True
        return similar[self.first_copy] & ~held_out


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Choose how signatures are cut, so that pairs at the threshold meet in some bucket.

    Two texts of similarity s agree in a band of r hashes with probability s^r, so in at least one of b bands with
    1 - (1 - s^r)^b (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.2). The most rows for which
    this reaches 0.99 at s = threshold within 300 hashes: more rows, fewer dissimilar texts in a bucket.

    Args:
        threshold: In (0, 1].

    Returns:
        Bands b and rows r: (72, 4) at 0.5, (37, 6) at 0.7, (20, 15) at 0.9. Below 0.02 the 0.99 is out of reach.
    """
    best = (_MAX_HASHES, 1)
    for rows in range(1, _MAX_HASHES + 1):
        missed = 1 - threshold**rows
        bands = math.ceil(math.log(_MISS_RATE) / math.log(missed)) if missed > 0 else 1
        if bands * rows > _MAX_HASHES:
            break
        best = (bands, rows)
    return best


def find_near_duplicates(
    texts: Iterable[str],
    *,
    threshold: float = 0.7,
    groups: Sequence[int] | np.ndarray | None = None,
    max_partners: int = 20,
) -> NearDuplicates:
    """Find the texts with the same words, and the pairs whose ``jaccard`` reaches the threshold.

    No false pair: each is checked exactly. At least 97 % of the true ones for thresholds from 0.5 to 0.9, see
    ``bands_and_rows``. Time and memory (about 0.6 kB per text, texts not counted) grow with the number of texts, also
    when all resemble one another: a text looks at up to 64 texts per group in each of its buckets, 512 in all, and no
    further once it has more than ``max_partners``. The result depends on the texts and their order, on nothing else.

    Args:
        texts: The texts; read more than once, so an iterator is first made a list.
        threshold: Lowest similarity of a pair, in (0, 1]. Under 0.5, large corpora fill the buckets with texts that
            are no duplicates, and ``num_capped`` rises.
        groups: The group of each text, such as the number of its split; a handful of different ones. Look-alikes are
            searched and capped in each group apart, so many in a text's own split hide none in another. A text with
            copies in several groups belongs to all of them. None: one group.
        max_partners: A text keeps this many most similar partners per group; a pair stands if either text keeps it.

    Returns:
        Copies, pairs, similarities, and how many texts were capped.

    Raises:
        ValueError: A threshold outside (0, 1], ``max_partners`` below 1, or ``groups`` of another length.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: {threshold} given; it must be above 0 and at most 1")
    if max_partners < 1:
        raise ValueError(f"max_partners: {max_partners} given; it must be at least 1")
    texts = texts if isinstance(texts, Sequence) else list(texts)
    group_of_text = np.zeros(len(texts), np.int64) if groups is None else np.asarray(groups)
    if group_of_text.shape != (len(texts),):
        raise ValueError(
            f"groups: {len(group_of_text)} given for {len(texts)} texts; give one each"
        )
    first_copy = _first_copies(texts)
    originals, original_of_text = np.unique(first_copy, return_inverse=True)
    values, group_of_text = np.unique(group_of_text, return_inverse=True)
    membership = np.zeros((len(originals), len(values)), dtype=bool)
    membership[original_of_text, group_of_text] = True
    search = _Search([texts[i] for i in originals.tolist()], membership, threshold, max_partners)
    pairs, similarities = search.run()
    return NearDuplicates(first_copy, originals[pairs], similarities, int(search.capped.sum()))


@dataclass(eq=False)
class _Search:
    texts: Sequence[str]
    membership_UG: np.ndarray
    threshold: float
    max_partners: int
    cached: dict[int, frozenset[str]] = field(default_factory=dict)
    num_cached: int = 0

    def __post_init__(self) -> None:
        self.bands, self.rows = bands_and_rows(self.threshold)
        self.signatures_UK, self.sizes = _signatures(self.texts, self.bands * self.rows)
        self.found_UG = np.zeros(self.membership_UG.shape, dtype=np.int32)
        self.looked_UG = np.zeros(self.membership_UG.shape, dtype=np.int32)
        self.capped = np.zeros(len(self.texts), dtype=bool)
        # Sorted codes of pairs, behind a code that is none so that a search always lands on one.
        self.compared = np.array([-1], dtype=np.int64)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        pairs, similarities = [np.zeros((0, 2), dtype=np.int64)], [np.zeros(0)]
        for band in range(self.bands):
            for candidates in self._looks(band):
                exact = self._compare(candidates)
                similar = exact >= self.threshold
                pairs.append(candidates[similar])
                similarities.append(exact[similar])
                for one, other in (candidates[similar].T, candidates[similar].T[::-1]):
                    np.add.at(self.found_UG, one, self.membership_UG[other])
        self.capped |= (self.found_UG > self.max_partners).any(axis=1)
        return self._strongest(np.concatenate(pairs), np.concatenate(similarities))

    def _looks(self, band: int) -> Iterator[np.ndarray]:
        # Pairs that share a bucket of this band and may be similar, each once in the whole search.
        keys = _band_keys(self.signatures_UK[:, band * self.rows : (band + 1) * self.rows])
        _, bucket, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        members = np.flatnonzero(sizes[bucket] > 1)
        members = members[np.argsort(bucket[members], kind="stable")]
        bucket = bucket[members]
        position = np.arange(len(members)) - np.searchsorted(bucket, bucket)
        for group in range(self.membership_UG.shape[1]):
            own = self.membership_UG[members, group]
            theirs = members[own]  # the group's part of each bucket lies in [start, start + length)
            start = np.searchsorted(bucket[own], bucket)
            length = np.searchsorted(bucket[own], bucket, side="right") - start
            looks = self._allowed(members, group, length - own)
            # A text starts behind itself in its own group, at its position in the bucket elsewhere.
            offset = np.where(own, np.cumsum(own) - start, position)
            cuts = np.searchsorted(np.cumsum(looks), np.arange(_BLOCK, looks.sum(), _BLOCK))
            for block in np.split(np.arange(len(members)), cuts):
                times = looks[block]
                looker = np.repeat(block, times)
                step = np.arange(len(looker)) - np.repeat(np.cumsum(times) - times, times)
                seen = theirs[start[looker] + (offset[looker] + step) % length[looker]]
                yield self._promising(members[looker], seen)

    def _allowed(self, members: np.ndarray, group: int, others: np.ndarray) -> np.ndarray:
        searching = self.found_UG[members, group] <= self.max_partners
        searching &= self.looked_UG[members, group] < _LOOKS_PER_TEXT
        looks = np.where(searching, np.minimum(others, _LOOKS_PER_BUCKET), 0)
        self.capped[members] |= looks < others
        self.looked_UG[members, group] += looks
        return looks

    def _promising(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        codes = np.minimum(one, other) * len(self.texts) + np.maximum(one, other)
        # In the order of the buckets, not of the codes: the cache of shingles then holds what comes next.
        codes = codes[np.sort(np.unique(codes, return_index=True)[1])]
        # Not np.isin, np.union1d: numpy 2.4's hash table was seen to take 0.5 s where sorting takes 10 ms.
        codes = codes[self.compared[np.searchsorted(self.compared, codes, "right") - 1] != codes]
        pairs = np.stack(np.divmod(codes, len(self.texts)), axis=1)
        sizes = self.sizes[pairs]
        fits = sizes.min(axis=1) / sizes.max(axis=1) >= self.threshold  # the most it can be
        codes, pairs = codes[fits], pairs[fits]
        deviation = math.sqrt(self.threshold * (1 - self.threshold) / self.signatures_UK.shape[1])
        near = self._estimates(pairs) >= self.threshold - 3.5 * deviation
        self.compared = np.sort(np.concatenate([self.compared, codes[near]]), kind="stable")
        return pairs[near]

    def _estimates(self, pairs: np.ndarray) -> np.ndarray:
        agreement = np.empty(len(pairs))
        for start in range(0, len(pairs), 1 << 14):
            first, second = pairs[start : start + (1 << 14)].T
            equal = self.signatures_UK[first] == self.signatures_UK[second]
            agreement[start : start + (1 << 14)] = equal.mean(axis=1)
        return agreement

    def _compare(self, pairs: np.ndarray) -> np.ndarray:
        sets = ((self._shingles(one), self._shingles(other)) for one, other in pairs.tolist())
        return np.fromiter((similarity(*both) for both in sets), np.float64, len(pairs))

    def _shingles(self, index: int) -> frozenset[str]:
        found = self.cached.get(index)
        if found is None:
            if self.num_cached > _CACHED_SHINGLES:
                self.cached.clear()
                self.num_cached = 0
            found = self.cached[index] = shingles(self.texts[index])
            self.num_cached += len(found)
        return found

    def _strongest(
        self, pairs: np.ndarray, similarities: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        source, target = np.concatenate([pairs, pairs[:, ::-1]]).T
        pair = np.tile(np.arange(len(pairs)), 2)
        order = np.lexsort((target, -similarities[pair], source))
        kept = np.zeros(len(pairs), dtype=bool)
        for group in range(self.membership_UG.shape[1]):
            edges = order[self.membership_UG[target[order], group]]
            rank = np.arange(len(edges)) - np.searchsorted(source[edges], source[edges])
            kept[pair[edges[rank < self.max_partners]]] = True
        pairs, similarities = pairs[kept], similarities[kept]
        order = np.lexsort(pairs.T[::-1])
        return pairs[order], similarities[order]


def _first_copies(texts: Sequence[str]) -> np.ndarray:
    first: dict[bytes, int] = {}
    digests = (blake2b(" ".join(words(text)).encode(), digest_size=16).digest() for text in texts)
    copies = [first.setdefault(digest, index) for index, digest in enumerate(digests)]
    return np.array(copies, dtype=np.int64)


def _signatures(texts: Sequence[str], num_hashes: int) -> tuple[np.ndarray, np.ndarray]:
    # 16 of the 32 bits: half the memory; unequal hashes look equal once in 65,536 (Li & König 2010, b-bit MinHash).
    signatures = np.empty((len(texts), num_hashes), dtype=np.uint16)
    sizes = np.empty(len(texts), dtype=np.int64)
    for start in range(0, len(texts), 1024):
        sets = [list(shingles(text)) for text in texts[start : start + 1024]]
        matrix = RMinHash.digest_matrix_from_token_sets(sets, num_hashes, 1)
        rows = np.array(matrix.to_rows(), dtype=np.uint32)
        signatures[start : start + 1024] = rows.astype(np.uint16)
        sizes[start : start + 1024] = [len(of_text) for of_text in sets]
    return signatures, sizes


def _band_keys(band: np.ndarray) -> np.ndarray:
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in band.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    return keys
