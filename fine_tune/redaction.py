"""Values of environment variables that hold secrets, and texts without them."""

import os
import re
from pathlib import Path

SECRET_NAME = re.compile(
    r"((?<!(?<![a-z])(?:mon|hot|don))key|token|secret|passw(or)?d|pwd|credential)s?(_|\d|$)",
    re.IGNORECASE,
)  # TOKENIZER, KEYBOARD and MONKEY are none; APIKEY, ACCOUNTKEY and PGPASSWORD are
NO_SECRETS = ("PWD", "OLDPWD")  # the shell's folders
SHORTEST_SECRET = 6  # shorter values, like 0 and true, are settings


def secrets() -> list[str]:
    """List the values of variables whose names sound secret, the longest first; a path to a file is none."""
    values = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and name not in NO_SECRETS and len(value) >= SHORTEST_SECRET
    }
    return sorted((v for v in values if not _is_path(v)), key=len, reverse=True)


def redacted(text: str) -> str:
    """Return a text with every secret in it replaced by ``***``."""
    for secret in secrets():
        text = text.replace(secret, "***")
    return text


def _is_path(value: str) -> bool:
    try:
        return value[0] in "/~." and Path(value).expanduser().exists()
    except (OSError, RuntimeError):  # too long a name; no home
        return False
