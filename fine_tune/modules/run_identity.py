"""What a run is: all that must stay the same when it goes on from a checkpoint, as flat plain values."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from lightning.pytorch.cli import OptimizerCallable
from peft import LoraConfig

from fine_tune.adapters import PEFTS_OWN
from fine_tune.errors import UserError
from fine_tune.model_config import adapter_base, holds_commit, resolve_source
from fine_tune.modules.optimization import build_optimizer

STEPS, FILES, ROWS = "data.epochs, trainer.max_steps", "data.files", "data.training_rows"
# What may change: where things lie, what fits the device, what is only looked at. Anything else, the settings of
# modules and data to come included, is part of the run. What is named by content or taken as resolved stands here too.
FREE = {
    "model": {
        "model_name_or_path", "revision", "tokenizer", "lora", "optimizer",
        "attn_implementation", "gradient_checkpointing", "prefix_sharing", "reference",
        "pack_rows", "compile", "offload_activations",
    },
    "data": {
        "path", "sources", "revision", "cache_dir", "tokenizer", "tokenizer_revision", "epochs",
        "format", "prompt", "completion", "chosen", "rejected",
        "max_tokens_per_micro_batch", "eval_batch_size", "num_workers", "near_duplicates", "empty_completions",
        "predict_path",
    },
    "lora": set(PEFTS_OWN),
    "optimizer": {"params", "foreach", "fused", "capturable", "differentiable"},
}  # fmt: skip
OF_TRAINER = ("gradient_clip_val", "gradient_clip_algorithm", "precision")
MAY_CHANGE = ("trainer.precision",)  # recorded, and not refused: the ladder changes it, too
ALWAYS_NAMED = ("r", "lora_alpha", "lora_dropout", "target_modules")
SAMPLE_BYTES, SAMPLES = 2**16, 16


@dataclass(frozen=True)
class Change:
    """One difference between the run of a checkpoint and the one that would go on from it.

    Args:
        key: The setting, or the file.
        before: The checkpoint's.
        now: The new one.
        allowed: Whether nobody has to allow it: the run is made longer, or computes in another precision.
    """

    key: str
    before: Any
    now: Any
    allowed: bool = False

    def __str__(self) -> str:
        before, now = (_shown(value) for value in (self.before, self.now))
        return (
            f"{self.key}: the checkpoint was trained with {before}, this run would go on with {now}"
        )


def run_identity(
    settings: Mapping[str, Any], *, model: Any, data: dict[str, Any], num_steps: int
) -> dict[str, Any]:
    """Describe a run by everything that decides its weights, but not by where it runs or what it is called.

    Args:
        settings: The parsed settings of ``fit``.
        model: The module, built and checked, without weights.
        data: What the data module says of its content.
        num_steps: Steps the run takes in all.

    Returns:
        Plain values by key; ``data.files`` is a list of files with their SHA-256.
    """
    weights = model.model_settings
    identity = {
        "model": _class_name(model),
        "model.weights": weights_content(weights.model_name_or_path, weights.revision),
        "seed_everything": settings.get("seed_everything"),
        **{f"trainer.{name}": settings["trainer"].get(name) for name in OF_TRAINER},
        **_given(settings, "model"),
        **_given(settings, "data"),
        **_of_lora(weights.lora),
        **optimizer_settings(model.optimizer, settings["model"]["init_args"].get("optimizer")),
        **data,
        STEPS: num_steps,
    }
    plain = json.loads(json.dumps(identity, default=str))
    return {key: value for key, value in sorted(plain.items()) if value is not None}


def optimizer_settings(
    optimizer: OptimizerCallable, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the optimizer's class and every setting that decides its update.

    Args:
        optimizer: Builds it.
        given: Its section of the settings, for what it does not keep in its parameter groups.
    """
    built = build_optimizer(optimizer, torch.nn.Linear(2, 2).named_parameters(), None)
    values = {**((given or {}).get("init_args") or {}), **built.param_groups[0]}
    settings = {
        f"model.optimizer.{name}": _plain(value)
        for name, value in values.items()
        if name not in FREE["optimizer"]
    }
    return {"model.optimizer": _class_name(built), **settings}


def weights_content(name: str | None, revision: str | None) -> str | None:
    """Identify a model by its config and a sample of its weights, cheaply, wherever its folder lies.

    Args:
        name: Model folder, or a name on the hub, which is identified by its commit; None for random weights.
        revision: Revision on the hub.
    """
    if name is None:
        return None
    source, commit = resolve_source("model.model_name_or_path", name, revision)
    if not Path(source).is_dir():
        return f"{source}@{commit}"
    digest = hashlib.sha256()
    base = adapter_base(source)
    if base is not None:
        digest.update(str(weights_content(base, None)).encode())
    described = "config.json" if base is None else "adapter_config.json"
    for file in [Path(source) / described, *sorted(Path(source).glob("*.safetensors"))]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as handle:
            for i in range(SAMPLES):  # all of a small file
                handle.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()


def is_weights(content: str, name: str | None, revision: str | None) -> bool:
    """Whether weights are the ones that ``weights_content`` identified, by a commit on the hub or in a folder."""
    if name is None or weights_content(name, revision) == content:
        return name is not None
    source, commit = resolve_source("model.model_name_or_path", name, revision)
    if commit is None:
        return holds_commit(Path(source), content.rpartition("@")[2])
    cached = try_to_load_from_cache(source, "config.json", revision=commit)
    return isinstance(cached, str) and weights_content(str(Path(cached).parent), None) == content


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """List what differs between two runs; the rows as such only where no setting or file explains it.

    Args:
        then: The identity of the checkpoint's run.
        now: That of the run that would go on.
    """
    found = _changed_files(then.get(FILES, []), now.get(FILES, []))
    for key in sorted({*then, *now} - {FILES, ROWS}):
        of_newer = key.startswith(("model.optimizer.", *MAY_CHANGE))  # library, or version of ours
        newer_library = of_newer and (key not in then or key not in now)
        if then.get(key) != now.get(key) and not newer_library:
            longer = key == STEPS and now[key] > then.get(key, 0)
            allowed = longer or key in MAY_CHANGE
            found.append(Change(key, then.get(key), now.get(key), allowed=allowed))
    explained = any(c.key.startswith(("data", "model.tokenizer")) and not c.allowed for c in found)
    if then.get(ROWS) != now.get(ROWS) and (not explained or not found):
        found.append(Change(ROWS, then.get(ROWS), now.get(ROWS)))
    return found


def refuse_another_run(changes: list[Change]) -> None:
    """Refuse to go on as another run than the checkpoint's.

    Raises:
        UserError: One line per difference.
    """
    refused = [f"{change}" for change in changes if not change.allowed]
    if refused:
        raise UserError(
            *refused,
            "ckpt_path: set these back; or go on with them, recorded in run.json, by --allow_changes true; or start a "
            "new run from the checkpoint's folder as model.model_name_or_path",
        )


def _changed_files(then: list[dict[str, str]], now: list[dict[str, str]]) -> list[Change]:
    if [(f["split"], f["content"]) for f in then] == [(f["split"], f["content"]) for f in now]:
        return []  # moved or renamed, perhaps
    before, after = ({f["file"]: f["content"] for f in files} for files in (then, now))
    changed = [
        Change(f"data: {file}", before.get(file), after.get(file))
        for file in sorted({*before, *after})
        if before.get(file) != after.get(file)
    ]
    return changed or [Change(FILES, "these files in another order", "this order")]


def _given(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    given = settings[section].get("init_args") or {}
    kept = {name: value for name, value in given.items() if name not in FREE[section]}
    if section == "data" and kept.get("drop_leaked"):
        kept["near_duplicates"] = given.get("near_duplicates")
    return _flat(section, kept)


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(f"{prefix}.{name}", inner)
    return flat


def _of_lora(lora: Any) -> dict[str, Any]:
    if lora is None:
        return {}
    default = LoraConfig()
    named = [p for p in inspect.signature(LoraConfig).parameters if p not in FREE["lora"]]
    return {
        f"model.lora.{name}": _plain(getattr(lora, name))
        for name in named
        if name in ALWAYS_NAMED or getattr(lora, name) != getattr(default, name)
    }


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value)
    is_hash = len(text) == 64 and not text.strip("0123456789abcdef")
    return (
        f"{text[:12]}... (SHA-256)" if is_hash else text if len(text) <= 120 else f"{text[:117]}..."
    )
