"""Find everything wrong with YAML and flags at once, with file and line, before anything is built.

Each setting is tried alone against the class it belongs to; what passes goes on to LightningCLI's own parser.
"""

import importlib
import inspect
import re
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from fine_tune.errors import UserError, nearest
from fine_tune.settings import Setting, flag_problems, read_yaml, split_flags

SECTIONS = {"model": LightningModule, "data": LightningDataModule}
NO_RUN = re.compile(r"-h|--print_config|--print_shtab|--([\w.]+\.)?help")
LINKED = {
    "data.tokenizer": "model.tokenizer",
    "data.tokenizer_revision": "model.revision",
}
SECRET_KEY = re.compile(r"(api_?key|token|password|secret)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|[0-9a-f]{40})\b")


def check_settings(args: list[str], parser: Any, classes: dict[str, type]) -> None:
    """Check every setting of the command line and of the YAML files it names.

    Args:
        args: Everything behind the verb.
        parser: The verb's parser, for the keys that belong to no class.
        classes: Classes of the sections that are always the same: trainer and the forced callbacks.

    Raises:
        UserError: One line per problem.
    """
    flags, files = split_flags(args)
    settings: list[Setting] = []
    problems: list[str] = []
    for file in files:
        found, wrong = read_yaml(file)
        settings += found
        problems += wrong
    broken = (
        bool(problems) and not settings
    )  # a file that cannot be read says nothing of what it lacks
    settings += flags
    classes = {**classes, **_section_classes(settings, problems, complete=not broken)}
    top_level = sorted(
        {action.dest.split(".")[0] for action in parser._actions if action.dest != "help"}
    )
    parsers = {section: _class_parser(cls) for section, cls in classes.items()}
    for setting in settings:
        problems += _check_setting(setting, top_level, parsers, classes)
    if problems:
        raise UserError(*dict.fromkeys(problems))


def _section_classes(
    settings: list[Setting], problems: list[str], *, complete: bool
) -> dict[str, type]:
    classes: dict[str, type] = {}
    for setting in settings:
        section = setting.key.removesuffix(".class_path")
        if section not in SECTIONS or not isinstance(setting.value, str):
            continue
        found, problem = _import_class(setting.value, section)
        if found is not None:
            classes[section] = found
        else:
            problems.append(f"{setting.where}: {problem}")
    for section in SECTIONS if complete else ():
        if section not in classes and not any(
            s.key in (section, f"{section}.class_path") for s in settings
        ):
            examples = "fine_tune.modules.SFT" if section == "model" else "fine_tune.data.SFTData"
            problems.append(f"{section}: no class given; set {section}.class_path, like {examples}")
    return classes


def _import_class(path: str, section: str) -> tuple[type | None, str]:
    home = "fine_tune.modules" if section == "model" else "fine_tune.data"
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name or home)
    except ImportError:
        module = importlib.import_module(home)
    found = getattr(module, name, None)
    if inspect.isclass(found) and issubclass(found, SECTIONS[section]):
        return found, ""
    known = [f"{home}.{n}" for n in importlib.import_module(home).__all__]
    return (
        None,
        f"'{path}' is not a {SECTIONS[section].__name__}{nearest(path, known) or '; known: ' + ', '.join(known)}",
    )


def _class_parser(cls: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True)
    return parser


def _check_setting(
    setting: Setting,
    top_level: list[str],
    parsers: dict[str, ArgumentParser],
    classes: dict[str, type],
) -> list[str]:
    section, _, rest = setting.key.partition(".")
    secret = _looks_secret(setting)
    if secret:
        return [secret]
    if section not in top_level:
        inner = [f"{name}.{field}" for name, p in parsers.items() for field in _names(p)]
        hint = nearest(section, top_level) or nearest(setting.key, inner)
        return [f"{_where(setting)}: unknown {_kind(setting, section)}{hint}"]
    if setting.from_flag and (wrong := flag_problems(setting)):
        return wrong
    if not rest and section in SECTIONS and not isinstance(setting.value, str):
        return [f"{_where(setting)}: {section}: a class is wanted; set {section}.class_path"]
    if not rest and section in classes and section not in SECTIONS:
        return _not_a_section(setting)
    if setting.key in LINKED and setting.value is not None:
        return [f"{_where(setting)}: {setting.key}: is the model's; set {LINKED[setting.key]}"]
    of_class = rest == "class_path" and section in SECTIONS
    if not rest or of_class or section not in parsers:
        return []
    parser, names = parsers[section], _names(parsers[section])
    name = rest.split(".")[0]
    name = name.removesuffix("+")
    if name not in names:
        close = nearest(name, names)
        if close and setting.from_flag:
            close = close.replace("'", f"'--{section}.", 1)
        return [
            f"{_where(setting)}: unknown {_kind(setting, name)} of {classes[section].__name__}{close}"
        ]
    if section == "trainer" and name in ("callbacks", "logger", "plugins", "strategy"):
        return []  # classes by path: LightningCLI's parser knows them
    try:
        if setting.from_flag:
            parser.parse_args([f"--{rest}={setting.value}"], _skip_validation=True)
        else:
            parser.parse_object({name: setting.value}, _skip_validation=True)
    except Exception as error:  # jsonargparse raises errors of several classes
        if name == "optimizer" and "class_path" not in str(error) and "accepted" not in str(error):
            return [
                f"{_where(setting)}: {setting.key}: '{setting.value}' is not an optimizer; like torch.optim.AdamW"
            ]
        return [
            f"{_where(setting)}: {setting.key}: {innermost(str(error), classes[section], name)}"
        ]
    return []


def asks_for_help(args: list[str]) -> bool:
    """Whether these arguments ask for something else than a run: help, or the config."""
    return any(NO_RUN.fullmatch(arg.split("=")[0]) for arg in args)


def with_key(message: str) -> str:
    """Reduce jsonargparse's report to the key it speaks of, and what is wrong with it."""
    key = re.search(r'(?:Parser key|key|argument) "?(?:--)?([\w.]+)', message)
    told = innermost(message)
    return f"{key[1].replace('.init_args', '')}: {told}" if key and key[1] not in told else told


def _not_a_section(setting: Setting) -> list[str]:
    try:
        value = yaml.safe_load(setting.value) if setting.from_flag else setting.value
    except Exception:  # 2024-99-99 makes PyYAML raise whatever comes
        value = setting.value
    if isinstance(value, dict):
        return []
    return [
        f"{_where(setting)}: {setting.key}: a mapping of keys is wanted, got {value!r:.60}; "
        f"as flags, set its keys: --{setting.key}.<key>"
    ]


def innermost(message: str, cls: type | None = None, name: str = "") -> str:
    """Reduce jsonargparse's nested report to the line that tells the user what is wrong."""
    not_accepted = re.findall(
        r"Option '([^']+)' is not accepted|Key '([^']+)' is not expected", message
    )
    if not_accepted:
        option = not_accepted[-1][0] or not_accepted[-1][1]
        known = _inner_options(cls, name) if cls else []
        return f"unknown option '{option}'{nearest(option.split('.')[-1], known)}"
    lines = [line.strip(" -") for line in message.splitlines()]
    telling = [
        line
        for line in lines
        if re.match(r"(Expected|Invalid|Unexpected|Unable|Import|Problem)", line)
    ]
    telling = [
        line
        for line in telling
        if "NoneType" not in line and not line.startswith("Problem with given class")
    ]
    given = [line for line in lines if line.startswith("Given value:") and "NestedArg" not in line]
    told = "; ".join(dict.fromkeys(telling)) or " ".join(" ".join(lines).split())
    told = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", told)
    told = told.replace("Expected a int", "Expected an int")
    told = re.sub(r"(?:typing|collections\.abc)\.", "", told)
    return told + (
        f" ({given[-1]})" if given and "Got value" not in told and "got" not in told else ""
    )


def _inner_options(cls: type, name: str) -> list[str]:
    if name == "lora":
        from peft import LoraConfig

        return list(inspect.signature(LoraConfig).parameters)
    if name == "sources":
        from fine_tune.data.sources import Source

        return list(inspect.signature(Source).parameters)
    if name == "optimizer":
        from torch.optim import AdamW

        return list(inspect.signature(AdamW).parameters)
    return list(inspect.signature(cls).parameters)


def _names(parser: ArgumentParser) -> list[str]:
    return sorted(
        {
            action.dest.split(".")[0]
            for action in parser._actions
            if action.dest not in ("help", "print_shtab")
        }
    )


def _where(setting: Setting) -> str:
    return "command line" if setting.from_flag else setting.where


def _kind(setting: Setting, name: str) -> str:
    return f"flag '{setting.where}'" if setting.from_flag else f"key '{name}'"


def _looks_secret(setting: Setting) -> str | None:
    last = setting.key.split(".")[-1]
    if not isinstance(setting.value, str) or "revision" in last:
        return None
    named = SECRET_KEY.search(last) and last != "tokenizer"
    if setting.value and (named or SECRET_VALUE.search(setting.value)):
        return (
            f"{_where(setting)}: '{setting.key}' looks like a secret; "
            "put it in the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    return None
