"""Values that jsonargparse would take for something else than what was written, or drop, without a word."""

from typing import Any, get_args

import yaml
from jsonargparse import Namespace

from fine_tune.settings import Setting, plain


def forbids_null(parser: Any, name: str) -> str | None:
    """Say that a key cannot be null: jsonargparse lets null pass whatever the type.

    Args:
        parser: Knows the key.
        name: The key, without its section.
    """
    action = next((a for a in parser._actions if a.dest == name), None)
    wanted = getattr(action, "_typehint", Any)
    if action is None or wanted is Any or action.default is None or type(None) in get_args(wanted):
        return None
    return f"null is not possible here; leave the key out for its default, {action.default!r:.80}"


def misread_text(given: Any, got: Any) -> str | None:
    """Say which text, in quotes, would be taken for null, a truth value, a list or a mapping.

    Args:
        given: A value as the YAML has it.
        got: What jsonargparse makes of it.
    """
    if isinstance(got, Namespace):
        got = vars(got)
    if isinstance(given, dict) and isinstance(got, dict):
        if not {"class_path", "init_args"} & given.keys():
            got = _mapping(got.get("init_args", got))
        pairs = [(value, got[key]) for key, value in given.items() if key in got]
    elif isinstance(given, list) and isinstance(got, list | tuple):
        pairs = list(zip(given, got, strict=False))
    elif isinstance(given, str) and _is_no_text(got) and _is_no_text(_read(given)):
        return f"{given!r:.80} is a text; to mean {given:.80}, leave the quotes out"
    else:
        pairs = []
    return next((told for a, b in pairs if (told := misread_text(a, b))), None)


def names_class(setting: Setting) -> bool:
    """Whether a value says which class it is for: its path alone, or a mapping with ``class_path``."""
    value = plain(setting)
    return isinstance(value, str) or (isinstance(value, dict) and "class_path" in value)


def _mapping(value: Any) -> dict[str, Any]:
    return vars(value) if isinstance(value, Namespace) else value


def _is_no_text(value: Any) -> bool:
    return value is None or isinstance(value, bool | list | dict | Namespace)


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception:  # 2024-99-99 makes PyYAML raise whatever comes
        return text
