"""Find everything wrong with YAML and flags at once, with file and line, before anything is built.

Each setting is tried alone against the class it belongs to; what passes goes on to LightningCLI's own parser.
"""

import importlib
import inspect
import re
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from fine_tune.errors import UserError, nearest
from fine_tune.misread import forbids_null, misread_text
from fine_tune.parser_reports import innermost
from fine_tune.setting_rules import looks_secret, rule_problems, where
from fine_tune.settings import Setting, flag_problems, plain, read_yaml, split_flags

SECTIONS = {"model": LightningModule, "data": LightningDataModule}
HOMES = {"model": "fine_tune.modules", "data": "fine_tune.data"}
TOP = ""  # keys that belong to no class
CLASSES_BY_PATH = ("callbacks", "logger", "plugins", "strategy")  # LightningCLI's parser knows them
ALLOWED = {  # of keys that take a word or a mapping, in which jsonargparse's own report says little
    "split": "give ratios like {train: 0.8, validation: 0.1, test: 0.1}, row counts like {validation: 500, test: 500}, "
    "existing, or none",
    "lora": "give auto, or LoRA's own settings, like model.lora.r: 16",
}
NO_RUN = re.compile(r"-h|--print_config|--print_shtab|--([\w.]+\.)?help")
LINKED = {
    "data.tokenizer": "model.tokenizer",
    "data.tokenizer_revision": "model.revision",
}


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
    settings += [part for flag in flags for part in _opened(flag, set(classes))]
    classes = {**classes, **_section_classes(settings, problems, complete=not broken)}
    top_level = sorted(
        {action.dest.split(".")[0] for action in parser._actions if action.dest != "help"}
    )
    parsers = _Parsers(parser, classes)
    problems += rule_problems(settings)
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
    home = HOMES[section]
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name or home)
    except (ImportError, TypeError):  # the latter for ../x
        module = importlib.import_module(home)
    found = getattr(module, name, None)
    if inspect.isclass(found) and issubclass(found, SECTIONS[section]):
        return found, ""
    known = [f"{home}.{n}" for n in importlib.import_module(home).__all__]
    return (
        None,
        f"'{path:.120}' is not a {SECTIONS[section].__name__}{nearest(path, known) or '; known: ' + ', '.join(known)}",
    )


class _Parsers(dict[str, ArgumentParser]):
    """A parser for each section, made when it is first asked for."""

    def __init__(self, verb_parser: Any, classes: dict[str, type]) -> None:
        super().__init__()
        self.verb_parser, self.classes = verb_parser, classes

    def __missing__(self, section: str) -> ArgumentParser:
        made = (
            _top_parser(self.verb_parser)
            if section == TOP
            else _class_parser(self.classes[section])
        )
        self[section] = made
        return made


def _class_parser(cls: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True)
    return parser


def _top_parser(verb_parser: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    for action in verb_parser._actions:
        typed = getattr(action, "_typehint", None)
        if typed is not None and "." not in action.dest and action.dest not in SECTIONS:
            parser.add_argument(f"--{action.dest}", type=typed, default=action.default)
    return parser


def _opened(flag: Setting, sections: set[str]) -> list[Setting]:
    """Take a flag that gives a whole section as a mapping, like --trainer={max_steps: 3}, apart."""
    value = plain(flag) if flag.key in sections and not flag_problems(flag) else None
    if not isinstance(value, dict):
        return [flag]
    return [Setting(f"{flag.key}.{name}", part, flag.where) for name, part in value.items()]


def _check_setting(
    setting: Setting,
    top_level: list[str],
    parsers: "_Parsers",
    classes: dict[str, type],
) -> list[str]:
    section, _, rest = setting.key.partition(".")
    secret = looks_secret(setting)
    if secret:
        return [secret]
    if section not in top_level:
        inner = [f"{name}.{field}" for name in classes for field in _names(parsers[name])]
        hint = nearest(section, top_level) or nearest(setting.key, inner)
        return [f"{where(setting)}: unknown {_kind(setting, section)}{hint}"]
    if setting.from_flag and (wrong := flag_problems(setting)):
        return wrong
    if not rest and section in SECTIONS and not isinstance(setting.value, str):
        return [f"{where(setting)}: {section}: a class is wanted; set {section}.class_path"]
    if not rest and section in classes and section not in SECTIONS:
        return _not_a_section(setting)
    if setting.key in LINKED and setting.value is not None:
        return [f"{where(setting)}: {setting.key}: is the model's; set {LINKED[setting.key]}"]
    if not rest and section in _names(parsers[TOP]):
        return _check_value(setting, section, section, parsers[TOP], None)
    of_class = rest == "class_path" and section in SECTIONS
    if not rest or of_class or section not in classes:
        return []
    parser, names = parsers[section], _names(parsers[section])
    name = rest.split(".")[0]
    name = name.removesuffix("+")
    if name not in names:
        close = nearest(name, names)
        if close and setting.from_flag:
            close = close.replace("'", f"'--{section}.", 1)
        return [
            f"{where(setting)}: unknown {_kind(setting, name)} of {classes[section].__name__}{close}"
        ]
    return _check_value(setting, name, rest, parser, classes[section])


def _check_value(
    setting: Setting, name: str, rest: str, parser: ArgumentParser, cls: type | None
) -> list[str]:
    key = f"{where(setting)}: {setting.key}"
    if setting.value is None and (forbidden := forbids_null(parser, name)):
        return [f"{key}: {forbidden}"]
    try:
        if setting.from_flag:
            parser.parse_args([f"--{rest}={setting.value}"], _skip_validation=True)
            return []
        got = parser.parse_object({name: setting.value}, _skip_validation=True)[name]
    except Exception as error:  # jsonargparse raises errors of several classes
        if cls is Trainer and name in CLASSES_BY_PATH:
            return []
        if name == "optimizer" and "class_path" not in str(error) and "accepted" not in str(error):
            return [f"{key}: '{setting.value}' is not an optimizer; like torch.optim.AdamW"]
        if rest in ALLOWED and not isinstance(plain(setting), dict):
            return [f"{key}: {ALLOWED[rest]}; got {str(setting.value)!r:.80}"]
        return [f"{key}: {innermost(str(error), cls, name)}"]
    told = misread_text(setting.value, got)
    return [f"{key}: {told}"] if told else []


def know_short_names() -> None:
    """Import the classes that are known by their names alone, so that their help is found by them, too."""
    for home in HOMES.values():
        importlib.import_module(home)


def asks_for_help(args: list[str]) -> bool:
    """Whether these arguments ask for something else than a run: help, or the config."""
    return any(NO_RUN.fullmatch(arg.split("=")[0]) for arg in args)


def _not_a_section(setting: Setting) -> list[str]:
    value = plain(setting)
    if isinstance(value, dict):
        return []
    return [
        f"{where(setting)}: {setting.key}: a mapping of keys is wanted, got {value!r:.60}; "
        f"as flags, set its keys: --{setting.key}.<key>"
    ]


def _names(parser: ArgumentParser) -> list[str]:
    return sorted(
        {
            action.dest.split(".")[0]
            for action in parser._actions
            if action.dest not in ("help", "print_shtab")
        }
    )


def _kind(setting: Setting, name: str) -> str:
    return f"flag '{setting.where}'" if setting.from_flag else f"key '{name}'"
