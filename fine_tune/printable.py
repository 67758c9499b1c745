"""Text of others, made to do nothing to a terminal."""

JOINERS = "\u200c\u200d"  # in scripts and emoji; they steer nothing and show nothing of their own


def printable(text: str, keep: str = "") -> str:
    """Return text with every control character written out, except those to ``keep``."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
