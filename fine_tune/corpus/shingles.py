"""What a text is compared by: its words, and the set of its pairs of consecutive words."""

import re
import unicodedata
from itertools import pairwise

import regex

_ASCII_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+|[-#$%&*+/<=>@^`|~]")
_UNSPACED = r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&\p{L}]"
# A letter keeps its marks: `\w` alone would break Devanagari and pointed Arabic at every vowel sign.
_WORD = regex.compile(
    rf"(?V1)\d+(?:[.,]\d+)+|{_UNSPACED}\p{{M}}*|(?:[[\p{{L}}\p{{N}}]--{_UNSPACED}]\p{{M}}*)+|[\p{{S}}#%&*/@-]"
)
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200c\u200d"))  # soft hyphen, (non-)joiners


def words(text: str) -> list[str]:
    """Split a text into the words that carry its meaning: NFKC, lower case, no punctuation, no spacing.

    Symbols are words, because ``2 + 3`` is not ``2 - 3``, nor ``C++`` ``C``.

    Scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Myanmar) give one word per character with its marks.

    Args:
        text: Any text.

    Returns:
        The words in order. A text without a letter or digit is one word, itself: ``":-)"`` is not ``":-("``.
    """
    if text.isascii():
        found = _ASCII_WORD.findall(text.lower())
    else:
        text = unicodedata.normalize("NFKC", text)
        found = _WORD.findall(text.lower().translate(_INVISIBLE))
    if any(word[0].isalnum() for word in found):
        return found
    text = text.strip().encode("utf-8", "backslashreplace").decode()  # a lone surrogate is no UTF-8
    return [text] if text else []


def jaccard(first: str, second: str) -> float:
    """Measure how much two texts share: shingles in both / shingles in either (Broder 1997, "resemblance").

    A text's shingles are the set of its pairs of consecutive words, or its one word if there is only one.

    Args:
        first: A text.
        second: Another.

    Returns:
        From 0 (nothing shared) to 1 (the same set); two empty texts are the same.
    """
    return similarity(shingles(first), shingles(second))


def shingles(text: str) -> frozenset[str]:
    """Return the set of a text's pairs of consecutive words, or its one word if there is only one."""
    found = words(text)
    return frozenset([f"{first} {second}" for first, second in pairwise(found)] or found)


def similarity(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the Jaccard similarity of two sets of shingles: shared / in either."""
    shared = len(first & second)
    either = len(first) + len(second) - shared
    return shared / either if either else 1.0
