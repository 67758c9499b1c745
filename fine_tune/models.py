"""Load a causal language model and its tokenizer from a folder, a hub name or a config; quantize.

Nothing here executes downloaded code or unpickles weights. Every check that needs no weights runs first.
"""

import copy
import inspect
import json
import logging
import sys
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fine_tune.errors import UserError, nearest

log = logging.getLogger("fine_tune")
if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()


def resolve_source(key: str, name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Find where a model or tokenizer comes from, without loading it.

    Args:
        key: The config key that named it, for the error.
        name: A local folder, or ``owner/name`` on the hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        The folder or hub name, and the exact commit on the hub (None for a folder).

    Raises:
        UserError: Not a folder, and not to be had from the hub or its cache.
    """
    if Path(name).is_dir():
        return name, None
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise UserError(
            f"{key}: folder '{name}' does not exist; give a model folder or a hub name like 'owner/name'"
        )
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
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


def load_tokenizer(key: str, name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a pad token pads with its EOS (labels are masked by position, so it is safe).

    Raises:
        UserError: It cannot be found or read, or it has no EOS token.
    """
    source, commit = resolve_source(key, name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=commit or "main")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{key}: no tokenizer can be loaded from '{name}': {_first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}: the tokenizer of '{name}' has no EOS token, so a model could never learn to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
        return _config_from_fields(from_config)
    assert name is not None
    source, commit = resolve_source("model.model_name_or_path", name, revision)
    if Path(source).is_dir():
        check_model_folder(Path(source))
    try:
        return AutoConfig.from_pretrained(
            source, revision=commit or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.model_name_or_path: config of '{name}': {_first_line(error)}"
        ) from error


def check_model_folder(folder: Path) -> None:
    """Refuse, before anything loads, a folder whose weights are absent, incomplete or pickled.

    Raises:
        UserError: Says which file is missing or not accepted, and how to convert it.
    """
    where = f"model.model_name_or_path: '{folder}'"
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{where} holds a LoRA adapter, not a model; merge it into its base first"
            )
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
    unknown = [key for key in overrides if key not in known]
    if unknown:
        raise UserError(
            *(_unknown_field("model.config", key, type(config), known) for key in unknown)
        )
    for key, value in overrides.items():
        setattr(config, key, value)
    return config


def load_model(
    config: PreTrainedConfig,
    name: str | None,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load weights in safetensors, or initialise them at random when ``name`` is None.

    Args:
        config: The model's config, overrides applied.
        name: Model folder or hub name, or None.
        revision: Revision on the hub.
        dtype: Type of the weights in memory.
        attn_implementation: ``sdpa``, ``eager``, ... or None for the model's default.
        quantization: What ``quantization_config`` made, or None; the weights are quantized shard by shard.

    Raises:
        UserError: Weights that do not fit the config.
    """
    config = copy.deepcopy(config)  # the attention implementation is written into it
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if name is None:
        return AutoModelForCausalLM.from_config(config, **options)
    if quantization is not None:
        options["quantization_config"] = quantization
    source, commit = resolve_source("model.model_name_or_path", name, revision)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=commit or "main",
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"model.model_name_or_path: weights of '{name}': {_first_line(error)}"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"model.model_name_or_path: '{name}' lacks {len(missing)} of the weights its config asks for "
            f"(first: {missing[0]}); they would have been random"
        )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        log.info(
            "WARNING: %d weights of '%s' are not used by its config (first: %s)",
            len(unused),
            name,
            unused[0],
        )
    _train_4bit_on_cpu(model)
    return cast(PreTrainedModel, model)


def quantization_config(kind: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Describe how to quantize the linear layers; embeddings and head keep the model's dtype.

    Args:
        kind: ``nf4`` or ``fp4`` (4 bit, with the scales quantized once more, QLoRA, arXiv 2305.14314), or ``int8``.
        compute_dtype: Type that 4-bit weights are multiplied in.
    """
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _train_4bit_on_cpu(model: torch.nn.Module) -> None:
    # On CPUs with AVX512-BF16, bitsandbytes re-packs 4-bit weights at the first evaluation, and training then fails.
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            cast(Any, module).support_avx512bf16_for_cpu = False


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
    unknown = [key for key in fields if key not in known]
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


def _unknown_field(where: str, key: str, config_class: type, known: list[str]) -> str:
    return f"{where}: {config_class.__name__} has no field '{key}'{nearest(key, known)}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
