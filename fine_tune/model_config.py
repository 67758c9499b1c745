"""Where a model comes from, and its config: from a folder, the hub, or its fields. No weights are read here."""

import copy
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from fine_tune.errors import UserError, nearest
from fine_tune.runs.run_folder import RECORD, RunFolder


def resolve_source(key: str, name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Find where a model or tokenizer comes from, without loading it.

    Args:
        key: The config key that named it, for the error.
        name: A local folder, a run's folder (its best checkpoint is meant), or ``owner/name`` on the hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        The folder or hub name, and the exact commit on the hub (None for a folder).

    Raises:
        UserError: Not a folder, and not to be had from the hub or its cache.
    """
    try:
        exists, is_folder = Path(name).exists(), Path(name).is_dir()
    except OSError as error:
        raise UserError(f"{key}: '{name[:60]}' cannot be read: {error.strerror}") from error
    if is_folder:
        return _folder_of_run(key, Path(name)) if (Path(name) / RECORD).is_file() else name, None
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or exists:
        raise UserError(
            f"{key}: folder '{name}' does not exist; give a model folder or a hub name like 'owner/name'"
            f"{_how_to_make(Path(name))}"
        )
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError as error:  # huggingface_hub's rules for names
        raise UserError(f"{key}: '{name[:60]}' is no folder, and no hub name: {error}") from error
    if isinstance(cached, str):
        return name, Path(cached).parent.name
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{key}: '{name}' is not a folder and not in the hub's cache, and HF_HUB_OFFLINE is set"
        )
    try:
        return name, HfApi().model_info(name, revision=revision, timeout=5).sha
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{key}: '{name}' is neither a folder here nor to be had from the hub ({type(error).__name__}: {reason}); "
            "check the name, the connection and, for gated models, the login"
        ) from error


def holds_commit(folder: Path, commit: str) -> bool:
    """Whether a folder holds the weights of a commit on the hub.

    Args:
        folder: A snapshot in the hub's cache, or what ``hf download --local-dir`` wrote and nobody changed since.
        commit: 40 hexadecimal digits.
    """
    if folder.resolve().parent.name == "snapshots":
        return folder.resolve().name == commit
    files = [folder / "config.json", *folder.glob("*.safetensors")]
    return all(_downloaded_commit(file) == commit for file in files)


def _downloaded_commit(file: Path) -> str | None:
    """Read what a download noted of a file; the hub's own reader writes into the folder, which may be read-only."""
    noted = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    try:
        commit, _, seconds = noted.read_text("utf-8").split()
        is_unchanged = file.stat().st_mtime - 1 <= float(seconds)
    except (OSError, ValueError):
        return None
    return commit if is_unchanged else None


def load_config(
    name: str | None, revision: str | None, from_config: dict[str, Any] | None
) -> PreTrainedConfig:
    """Read a model's config from a folder or the hub, or build one from its fields.

    Args:
        name: Model folder or hub name; exactly one of ``name`` and ``from_config`` is given.
        revision: Revision on the hub.
        from_config: ``{model_type: llama, hidden_size: 64, ...}`` or ``{class: LlamaConfig, ...}``.

    Raises:
        UserError: Unknown model type or field, a value of the wrong type, or a model that needs hub code.
    """
    if from_config is not None:
        return _without_router_scores(_config_from_fields(from_config))
    assert name is not None
    source, commit = resolve_source("model.model_name_or_path", name, revision)
    base = adapter_base(source)
    if base is not None:
        try:
            return load_config(base, None, None)
        except UserError as error:
            file = Path(source) / "adapter_config.json"
            hint = f"'{base}' is what {file} names as its base (base_model_name_or_path)"
            raise UserError(*error.problems, f"model.model_name_or_path: {hint}") from error
    if Path(source).is_dir():
        check_model_folder(Path(source))
    try:
        return _without_router_scores(
            AutoConfig.from_pretrained(source, revision=commit or "main", trust_remote_code=False)
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.model_name_or_path: config of '{name}': {first_line(error)}"
        ) from error


def _without_router_scores(config: PreTrainedConfig) -> PreTrainedConfig:
    # transformers' generate fails on a mixture of experts that gives them; training steps ask for them by themselves
    for part in (config, config.get_text_config()):
        if hasattr(part, "output_router_logits"):
            part.output_router_logits = False
    return config


def adapter_base(source: str) -> str | None:
    """Return what a folder's adapter was trained on, or None where it holds no adapter but a model."""
    file = Path(source) / "adapter_config.json"
    if not file.is_file() or (Path(source) / "config.json").is_file():
        return None
    return str(json.loads(file.read_text("utf-8"))["base_model_name_or_path"])


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """Return how a checkpoint's weights are stored: nf4, fp4, int8, another method's name, or None: unquantized."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    if fields.get("load_in_4bit"):
        return str(fields.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if fields.get("load_in_8bit") else str(fields.get("quant_method", "unknown"))


def check_model_folder(folder: Path) -> None:
    """Refuse, before anything loads, a folder whose weights are absent, incomplete or pickled.

    Raises:
        UserError: Says which file is missing or not accepted, and how to convert it.
    """
    where = f"model.model_name_or_path: '{folder}'"
    if not (folder / "config.json").is_file():
        raise UserError(f"{where} has no config.json; give the folder that save_pretrained() wrote")
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map")
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if auto_map and model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{where} needs code from the hub (auto_map), which is never executed; use a built-in model"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise UserError(
                f"{where}: shard(s) missing: {', '.join(missing)}; copy the folder again"
            )
    elif not list(folder.glob("*.safetensors")):
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
            raise UserError(
                f"{where} has only pickled weights, which can execute code on load; convert them where you trust them: "
                "model.save_pretrained(folder) writes safetensors"
            )
        raise UserError(f"{where} has no weights (*.safetensors)")


def override_config(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Return a copy of the config with the given fields replaced.

    Raises:
        UserError: A field the model's config does not have.
    """
    config = copy.deepcopy(config)
    known = _config_fields(type(config))
    unknown = [key for key in overrides if key not in known and not _is_read(key, type(config))]
    if unknown:
        raise UserError(
            *(_unknown_field("model.config", key, type(config), known) for key in unknown)
        )
    for key, value in overrides.items():
        setattr(config, key, value)
    return _without_router_scores(config)


def _config_from_fields(fields: dict[str, Any]) -> PreTrainedConfig:
    fields = dict(fields)
    model_type, class_name = fields.pop("model_type", None), fields.pop("class", None)
    where = "model.from_config"
    if (model_type is None) == (class_name is None):
        raise UserError(f"{where}: give either model_type (like llama) or class (like LlamaConfig)")
    if class_name is not None:
        config_class = getattr(transformers, str(class_name).removeprefix("transformers."), None)
        if not (inspect.isclass(config_class) and issubclass(config_class, PreTrainedConfig)):
            raise UserError(f"{where}.class: transformers has no config class '{class_name}'")
    else:
        known_types = sorted(
            transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        )
        if model_type not in known_types:
            raise UserError(
                f"{where}.model_type: transformers has no causal language model '{model_type}'"
                f"{nearest(str(model_type), known_types) or '; for example llama, gpt2, phi, qwen2, qwen3_moe'}"
            )
        config_class = transformers.CONFIG_MAPPING[model_type]
    known = _config_fields(config_class)
    unknown = [key for key in fields if key not in known and not _is_read(key, config_class)]
    if unknown:
        raise UserError(*(_unknown_field(where, key, config_class, known) for key in unknown))
    try:
        return config_class(**fields)
    except Exception as error:  # the config classes raise errors of several libraries
        told = " ".join(str(error).split())
        raise UserError(f"{where}: {config_class.__name__} refuses {fields}: {told}") from error


def _config_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    own = [
        p
        for p in inspect.signature(config_class.__init__).parameters
        if p not in ("self", "kwargs")
    ]
    return sorted({*own, *config_class.attribute_map, "rope_theta", "rope_scaling"})


def _is_read(key: Any, config_class: type[PreTrainedConfig]) -> bool:
    """Whether a model's code asks for a field that its config class does not declare, like Qwen3Moe's ``head_dim``."""
    if not isinstance(key, str) or key.startswith("_"):
        return False
    model_class: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    if model_class is None:
        return False
    code = Path(inspect.getfile(model_class)).read_text("utf-8")
    return re.search(rf'config\.{re.escape(key)}\b|config, "{re.escape(key)}"', code) is not None


def _unknown_field(where: str, key: Any, config_class: type, known: list[str]) -> str:
    return f"{where}: {config_class.__name__} has no field '{key}'{nearest(str(key), known)}"


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _how_to_make(folder: Path) -> str:
    config = Path("configs") / f"{folder.parent.name}.yaml"  # runs/<name>/version_N
    if not folder.name.startswith("version_") or not config.is_file():
        return ""
    return f"; it would be a run, make it first: python -m fine_tune fit --config {config}"


def _folder_of_run(key: str, folder: Path) -> str:
    best = RunFolder(folder).checkpoint("best")
    if best is None:
        command = f"python -m fine_tune fit --config {shlex.quote(str(folder / 'config.yaml'))}"
        raise UserError(f"{key}: the run '{folder}' has no checkpoint yet; make one by {command}")
    return str(best)
