"""What the user gave, setting by setting, each with its place: YAML files with their lines, and flags."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse._loaders_dumpers import get_yaml_default_loader

from fine_tune.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
CLASS_SECTIONS = ("model", "data")  # their options stand under init_args
NO_WORD = "YAML: a key must be a word, not a list or a mapping"
MOST_VALUES, DEEPEST = 10_000, 50


class Loader(yaml.SafeLoader):
    """Reads 1e3 as a number and 2024-01-01 as a text, as jsonargparse will."""

    yaml_implicit_resolvers = get_yaml_default_loader().yaml_implicit_resolvers


@dataclass(frozen=True)
class Setting:
    """One value the user gave.

    Args:
        key: Like ``data.batch_size``, without ``init_args``.
        value: As YAML gave it; a text for a flag.
        where: ``configs/x.yaml:7``, or the flag itself.
        from_flag: Whether it stood on the command line.
    """

    key: str
    value: Any
    where: str
    from_flag: bool = False


def read_yaml(file: str) -> tuple[list[Setting], list[str]]:
    """Read a YAML file into settings, each with its line.

    Returns:
        The settings, and the problems: missing file, syntax, duplicate keys, tags that would build objects.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        return [], [f"--config: '{file}' cannot be read: {error.strerror}"]
    except UnicodeDecodeError:
        return [], [f"--config: '{file}' is not UTF-8 text"]
    inside = text.find(BYTE_ORDER_MARK, 1)
    if inside > 0:  # YAML reads it as text, and the value behind it as something else
        line = text.count("\n", 0, inside) + 1
        return [], [f"{file}:{line}: YAML: an invisible byte order mark (U+FEFF); remove it"]
    try:
        root = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        return [], [f"{where}: YAML: {_told(error)}"]
    except RecursionError:
        return [], [f"{file}: YAML: nested too deeply"]
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{file}:1: a mapping of keys is wanted"]
    problems: list[str] = []
    return list(_walk(root, "", file, problems, depth=0)), problems


def _walk(
    node: yaml.MappingNode, prefix: str, file: str, problems: list[str], depth: int
) -> Iterator[Setting]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        where = f"{file}:{key_node.start_mark.line + 1}"
        key = str(key_node.value)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{where}: {NO_WORD}")
            continue
        if key in seen:
            problems.append(f"{where}: duplicate key '{key}' (first in line {seen[key]})")
        seen[key] = key_node.start_mark.line + 1
        of_class = key == "init_args" and depth == 1 and prefix.rstrip(".") in CLASS_SECTIONS
        path = prefix if of_class else f"{prefix}{key}"
        if (depth == 0 or of_class) and isinstance(value_node, yaml.MappingNode):
            inner = path if of_class else f"{path}."
            yield from _walk(value_node, inner, file, problems, depth + 1)
            continue
        wrong = list(_problems_inside(value_node, file))
        if not wrong:
            try:
                value = Loader("").construct_document(value_node)
            except Exception as error:  # 0x_ and !!timestamp x make PyYAML raise whatever comes
                wrong = [f"{where}: YAML: {_told(error)}"]
        if wrong:
            problems += wrong
            continue
        yield Setting(path, value, where)


def _problems_inside(node: yaml.Node, file: str) -> Iterator[str]:
    left = [MOST_VALUES]

    def look(node: yaml.Node, above: tuple[yaml.Node, ...]) -> Iterator[str]:
        where = f"{file}:{node.start_mark.line + 1}: "
        left[0] -= 1
        if left[0] == 0:
            yield f"{where}YAML: more than {MOST_VALUES:,} values, aliases counted as often as they stand"
        if node in above or len(above) > DEEPEST:
            yield f"{where}YAML: " + (
                "an anchor that holds itself" if node in above else "nested too deeply"
            )
        elif left[0] > 0 and isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from look(item, (*above, node))
        elif left[0] > 0 and isinstance(node, yaml.MappingNode):
            seen = set()
            for key_node, value_node in node.value:
                key = str(key_node.value)
                if not isinstance(key_node, yaml.ScalarNode):
                    yield f"{where}{NO_WORD}"
                elif key in seen:
                    yield f"{file}:{key_node.start_mark.line + 1}: duplicate key '{key}'"
                seen.add(key)
                yield from look(value_node, (*above, node))

    yield from look(node, ())


def _told(error: Exception) -> str:
    told = getattr(error, "problem", None) or " ".join(str(error).split())
    return str(told) if isinstance(error, yaml.YAMLError) else f"no such value ({told})"


def flag_problems(setting: Setting) -> list[str]:
    """Say what is wrong inside a flag's list or mapping, of which a parser would keep the last of two equal keys."""
    if not setting.value.lstrip().startswith(("{", "[", "&", "!")):
        return []
    try:
        node = yaml.compose(setting.value, Loader=Loader)
        problems = list(_problems_inside(node, "value")) if node is not None else []
        if not problems:
            Loader("").construct_document(node)
    except yaml.YAMLError:
        return []  # a text, then
    except Exception as error:
        problems = [_told(error)]
    return [
        f"command line: {setting.key}: {problem.removeprefix('value:1: ')}" for problem in problems
    ]


def plain(setting: Setting) -> Any:
    """Return a setting's value, a flag's read as the YAML it is."""
    if not setting.from_flag:
        return setting.value
    try:
        return yaml.load(setting.value, Loader=Loader)
    except Exception:  # 0x_ and !!timestamp x make PyYAML raise whatever comes
        return setting.value


def split_flags(args: list[str]) -> tuple[list[Setting], list[str]]:
    """Read the flags behind a verb into settings, and name the YAML files among them."""
    flags, files, i = [], [], 0
    while i < len(args):
        arg = args[i]
        if not arg.startswith("-"):
            raise UserError(f"{arg[:120]!r}: a flag was expected here, like --data.batch_size 8")
        name, equals, value = arg.partition("=")
        if not equals:
            i += 1
            if i >= len(args):
                raise UserError(f"{arg}: a value is missing")
            value = args[i]
        i += 1
        if name in ("--config", "-c"):
            files.append(value)
        else:
            flags.append(
                Setting(name.lstrip("-").replace(".init_args.", "."), value, name, from_flag=True)
            )
    return flags, files


def take_templates(args: list[str]) -> tuple[list[str], dict[str, str | None]]:
    """Take templates out of the flags: they are text, while YAML would read ``Q: {question}`` as a mapping."""
    rest, templates, i = [], {}, 0
    while i < len(args):
        name, equals, value = args[i].partition("=")
        key = name.replace(".init_args.", ".").removeprefix("--data.")
        if name.startswith("--data.") and key in ("prompt", "completion", "chosen", "rejected"):
            i += 0 if equals else 1
            value = value if equals else args[i]
            templates[key] = None if value == "null" else value
        else:
            rest.append(args[i])
        i += 1
    return rest, templates
