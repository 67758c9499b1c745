"""Load a model (a causal language model, or one with a scalar head) and its tokenizer from a folder, a hub name or a
config; quantize.

Nothing here executes downloaded code or unpickles weights. Every check that needs no weights runs first.
"""

import copy
import logging
import sys
from typing import Any, Literal, cast

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
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
Head = Literal["lm", "score"]  # next-token logits, or one number per sequence
AUTO_CLASSES: dict[str, Any] = {
    "lm": AutoModelForCausalLM,
    "score": AutoModelForSequenceClassification,
}
if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()


def load_tokenizer(key: str, name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a pad token pads with its EOS (labels are masked by position, so it is safe).

    Raises:
        UserError: It cannot be found or read, or it has no EOS token.
    """
    source, commit = resolve_source(key, name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=commit or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
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
    head: Head = "lm",
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
        head: A scalar head (``score``) that the weights do not have starts at random.

    Raises:
        UserError: Weights that do not fit the config.
    """
    config = copy.deepcopy(config)  # attention and compute type are written into it
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if name is None:
        try:
            return cast(PreTrainedModel, AUTO_CLASSES[head].from_config(config, **options))
        except (
            ValueError,
            ImportError,
        ) as error:  # an attention that is not installed, or not for this model
            raise UserError(f"model.from_config: {first_line(error)}") from error
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
        whole: Any = load_model(
            config, base, dtype=dtype, attn_implementation=attn_implementation, head=head
        )
        kind = PeftConfig.from_pretrained(source)
        if head == "lm" and kind.task_type == "SEQ_CLS":
            log.info(
                "WARNING: '%s' holds the adapter of a reward model; its head is left out", name
            )
        kind.task_type = None  # of any kind of head
        merged: Any = PeftModel.from_pretrained(whole, source, config=kind)
        model = merged.merge_and_unload().requires_grad_(True)  # peft froze it
        model.name_or_path = source  # what an adapter trained on it names as its base
        return cast(PreTrainedModel, model)
    try:
        loaded: Any = AUTO_CLASSES[head].from_pretrained(
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
    if _new_head(head) & set(info["missing_keys"]):
        log.info("a new scalar head: '%s' has none, so its weights start at random", name)
    missing = sorted(set(info["missing_keys"]) - _new_head(head))
    if missing:
        raise UserError(
            f"model.model_name_or_path: '{name}' lacks {len(missing)} of the weights its config asks for "
            f"(first: {missing[0]}); they would have been random"
        )
    unused = sorted(info["unexpected_keys"])
    if unused and not (head == "score" and all(key.startswith("lm_head") for key in unused)):
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


def scoring_pad(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Choose the pad token of a saved model with a scalar head.

    transformers reads the score at the last token that is not the pad token. A pad that is the stop token, too, would
    make it read one token early.

    Returns:
        The tokenizer's pad token, or another special token if that is its EOS; None if there is none: such a model can
        be asked for one row at a time only.
    """
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    wanted = [tokenizer.pad_token, tokenizer.unk_token, *specials]
    return next((t for t in wanted if t is not None and t != tokenizer.eos_token), None)


def quantization_config(
    kind: str, compute_dtype: torch.dtype, head: Head = "lm"
) -> BitsAndBytesConfig:
    """Describe how to quantize the linear layers; embeddings and head keep the model's dtype.

    Args:
        kind: ``nf4`` or ``fp4`` (4 bit, with the scales quantized once more, QLoRA, arXiv 2305.14314), or ``int8``.
        compute_dtype: Type that 4-bit weights are multiplied in.
        head: The model's.
    """
    kept = ["score"] if head == "score" else None  # None: what the model's class says is its head
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=kept,
    )


def _new_head(head: Head) -> set[str]:
    return {"score.weight"} if head == "score" else set()


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
