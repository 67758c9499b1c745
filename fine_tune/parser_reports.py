"""jsonargparse's nested reports, reduced to what tells the user what is wrong."""

import inspect
import re

from fine_tune.errors import nearest

CLASSES = {"model": "SFT", "data": "SFTData"}  # an example of what a section's flags belong to


def with_key(message: str) -> str:
    """Reduce jsonargparse's report to the key it speaks of, and what is wrong with it."""
    key = re.search(r'(?:Parser key|key|argument) "?(?:--)?([\w.]+)', message)
    nested = re.search(r"NestedArg\(key='([\w.]+)'", message)
    behind = nested and f"unknown option '{nested[1]}'" in message
    if key and nested and behind and key[1] in CLASSES:
        flag, named = f"--{key[1]}.{nested[1]}", f"--{key[1]} {CLASSES[key[1]]}"
        return f"{key[1]}: {flag} stands before the class it belongs to; name that first, like {named} {flag} ..."
    told = innermost(message)
    inner = re.match(r"([\w.]+): (?:Expected|Invalid|Unable)", told)
    if key and inner and not inner[1].startswith(key[1]):
        return f"{key[1]}.{told}".replace(".init_args", "")
    return f"{key[1].replace('.init_args', '')}: {told}" if key and key[1] not in told else told


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
        if re.match(r"(?:[\w.]+: )?(Expected|Invalid|Unexpected|Unable|Import|Problem)", line)
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
