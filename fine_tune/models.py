"""Load a causal language model and its tokenizer from a folder, a hub name or a config; quantize.

Nothing here executes downloaded code or unpickles weights. Every check that needs no weights runs first.
"""

import copy
import logging
import sys
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fine_tune.errors import UserError
from fine_tune.model_config import (
    adapter_base,
    first_line,
    resolve_source,
    stored_quantization,
)

log = logging.getLogger("fine_tune")
if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()


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
            f"{key}: no tokenizer can be loaded from '{name}': {first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}: the tokenizer of '{name}' has no EOS token, so a model could never learn to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    config: PreTrainedConfig,
    name: str | None,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load weights in safetensors, or initialise them at random when ``name`` is None.

    Args:
        config: The model's config, overrides applied.
        name: Model folder or hub name, or None. A folder with an adapter stands for its base with the adapter merged.
        revision: Revision on the hub.
        dtype: Type of the weights in memory.
        attn_implementation: ``sdpa``, ``eager``, ... or None for the model's default.
        quantization: What ``quantization_config`` made, or None; the weights are quantized shard by shard. Of a
            checkpoint that is quantized already it decides only the type that its weights are multiplied in.

    Raises:
        UserError: Weights that do not fit the config.
    """
    config = copy.deepcopy(config)  # attention and compute type are written into it
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if name is None:
        return AutoModelForCausalLM.from_config(config, **options)
    stored = stored_quantization(config)
    if quantization is not None and stored is None:
        options["quantization_config"] = quantization
    elif quantization is not None:
        compute = str(quantization.bnb_4bit_compute_dtype).removeprefix("torch.")
        config.quantization_config |= {"bnb_4bit_compute_dtype": compute}
    source, commit = resolve_source("model.model_name_or_path", name, revision)
    base = adapter_base(source)
    if base is not None:
        if stored is not None or quantization is not None:
            raise UserError(
                f"model.model_name_or_path: '{name}' holds an adapter, which cannot be merged into quantized weights "
                "without a loss; leave model.quantization out, or give a full model"
            )
        whole = load_model(config, base, dtype=dtype, attn_implementation=attn_implementation)
        merged: Any = PeftModel.from_pretrained(whole, source)
        model = merged.merge_and_unload()
        model.name_or_path = source  # what an adapter trained on it names as its base
        return cast(PreTrainedModel, model)
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
            f"model.model_name_or_path: weights of '{name}': {first_line(error)}"
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
    if stored is not None:
        _cast_unquantized(model, dtype)
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


def _cast_unquantized(model: torch.nn.Module, dtype: torch.dtype) -> None:
    # transformers leaves what a quantized checkpoint holds unquantized in the checkpoint's type, whatever is asked
    for parameter in model.parameters():
        if parameter.is_floating_point() and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(dtype)


def _train_4bit_on_cpu(model: torch.nn.Module) -> None:
    # On CPUs with AVX512-BF16, bitsandbytes re-packs 4-bit weights at the first evaluation, and training then fails.
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            cast(Any, module).support_avx512bf16_for_cpu = False
