"""Rules over the settings that no type can say: named classes, options beside ``auto``, secrets."""

import importlib
import inspect
import re

from fine_tune.misread import names_class
from fine_tune.settings import Setting, plain

SECRET_KEY = re.compile(r"(api_?key|token|password|secret)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|[0-9a-f]{40})\b")


def rule_problems(settings: list[Setting]) -> list[str]:
    """Say what is wrong with the settings together."""
    return [*_classless(settings), *_more_than_auto(settings), *_no_optimizers(settings)]


def where(setting: Setting) -> str:
    """Name the file and line of a setting, or the command line."""
    return "command line" if setting.from_flag else setting.where


def _classless(settings: list[Setting]) -> list[str]:
    """Find a YAML's options of an optimizer that nothing names: jsonargparse drops them, a flag's not."""
    key = "model.optimizer"
    given = [s for s in settings if s.key == key]
    if any(s.key == f"{key}.class_path" for s in settings) or any(map(names_class, given)):
        return []
    return [
        f"{s.where}: {key}: {' and '.join(map(str, s.value)) or 'nothing'} without class_path; "
        "name the class, like torch.optim.AdamW"
        for s in given
        if isinstance(s.value, dict)
    ]


def _no_optimizers(settings: list[Setting]) -> list[str]:
    """Find anything but an optimizer where one is named: building it would call it, and it may do anything."""
    problems = []
    for setting in settings:
        if setting.key not in ("model.optimizer", "model.optimizer.class_path"):
            continue
        value = plain(setting)
        path = value.get("class_path") if isinstance(value, dict) else value
        if isinstance(path, str) and "." in path and not _is_optimizer(path):
            problems.append(
                f"{where(setting)}: model.optimizer: '{path:.120}' is not an optimizer; like torch.optim.AdamW"
            )
    return problems


def _is_optimizer(path: str) -> bool:
    from torch.optim import Optimizer

    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, TypeError):
        return False
    return inspect.isclass(found) and issubclass(found, Optimizer)


def _more_than_auto(settings: list[Setting]) -> list[str]:
    """Find options of LoRA beside ``lora: auto``, which chooses them all."""
    given = [setting for setting in settings if setting.key.startswith("model.lora")]
    auto = [setting for setting in given if setting.key == "model.lora"]
    if not auto or auto[-1].value != "auto":
        return []
    return [
        f"{where(s)}: {s.key}: model.lora: auto chooses it; leave auto out to set it yourself"
        for s in given[given.index(auto[-1]) + 1 :]
        if s.key.removeprefix("model.lora.").removeprefix("init_args.") in _lora_fields()
    ]


def _lora_fields() -> list[str]:
    from peft import LoraConfig

    return list(inspect.signature(LoraConfig).parameters)


def looks_secret(setting: Setting) -> str | None:
    """Say that a setting belongs into the environment, if it looks like a secret."""
    last = setting.key.split(".")[-1]
    if not isinstance(setting.value, str) or "revision" in last:
        return None
    named = SECRET_KEY.search(last) and last != "tokenizer"
    if setting.value and (named or SECRET_VALUE.search(setting.value)):
        return (
            f"{where(setting)}: '{setting.key}' looks like a secret; "
            "put it in the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    return None
