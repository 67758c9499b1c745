"""The weights of a module: loaded as its settings say, and what of them a checkpoint keeps."""

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fine_tune import adapters, models, saved_adapters
from fine_tune.errors import UserError
from fine_tune.modules.model_settings import ModelSettings
from fine_tune.modules.precision import precision_dtype, weights_dtype
from fine_tune.modules.recomputing import recompute
from fine_tune.modules.run_identity import is_weights
from fine_tune.runs.identity import read_identity

if TYPE_CHECKING:
    from fine_tune.modules.huggingface import HuggingFaceModule

log = logging.getLogger("fine_tune")


def load_weights(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    checkpoint: Path | None = None,
) -> Any:
    """Load or initialise the model, quantized and adapted as the settings say, ready to train.

    Args:
        settings: Which model, and how.
        tokenizer: Its tokenizer.
        precision: The trainer's.
        checkpoint: Folder of a checkpoint whose full weights are loaded in place of the model's.

    Raises:
        UserError: The weights do not fit the config, or the checkpoint holds an adapter.
    """
    dtype = weights_dtype(settings.dtype, precision, frozen=settings.lora is not None)
    quantization = None
    if settings.quantized:
        compute_dtype = precision_dtype(precision) or dtype
        quantization = models.quantization_config(settings.quantized, compute_dtype, settings.head)
    name, revision = settings.base
    if checkpoint is not None:
        saved_adapters.check_kind(checkpoint, trains_adapter=False)
        name, revision = str(checkpoint), None
    model: Any = models.load_model(
        settings.resolved_config(tokenizer),
        name,
        revision=revision,
        dtype=dtype,
        attn_implementation=settings.attn_implementation,
        quantization=quantization,
        head=settings.head,
    )
    model = adapted(model, settings, precision, name)
    if settings.lora is not None and settings.continued_adapter is not None:
        saved_adapters.go_on_with_adapter(model, Path(settings.continued_adapter))
    if settings.head == "score" and models.scoring_pad(tokenizer) is None:
        log.info(
            "WARNING: the tokenizer has no special token but its EOS to pad with: transformers will score the saved "
            "model's rows one at a time only"
        )
    model.train()
    return model


def adapted(model: Any, settings: ModelSettings, precision: str, weights: str | None = None) -> Any:
    """Add what training adds to a loaded model: recomputed activations, adapters, trained weights in their type.

    Args:
        model: As ``models.load_model`` returns it.
        settings: Which adapters, and whether activations are recomputed.
        precision: The trainer's.
        weights: Folder or hub name of the unquantized weights; LoftQ compares with them.
    """
    recompute(model, settings.gradient_checkpointing or False)
    if settings.lora is not None:
        model = adapters.add_lora(model, settings.lora, weights, settings.head)
        if precision.endswith("mixed"):
            adapters.keep_trained_in_float32(model)
    return model


def own_trained(model: Any) -> None:
    """Copy the trained weights out of the file that safetensors maps into memory.

    On a CPU the first update would fault each page in alone: 0.57 s for 200 MB, where the copy takes 0.09 s.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def restore_weights(model: Any, settings: ModelSettings, folder: Path) -> None:
    """Put the weights of a checkpoint into the model; an adapter's only on the base it was trained on.

    Raises:
        UserError: The folder holds another kind of weights, or an adapter of another base or shape.
    """
    then = (read_identity(folder) or {}).get("model.weights")
    name, revision = settings.model_name_or_path, settings.revision
    if isinstance(model, PeftModel) and then is not None and not is_weights(then, name, revision):
        raise UserError(
            f"ckpt_path: the adapter in '{folder}' was trained on other weights than those of "
            f"'{name}'; set model.model_name_or_path to its base"
        )
    saved_adapters.restore_weights(model, folder, same_base=then is not None)


def weights_to_keep(
    module: "HuggingFaceModule", state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Keep what was trained and whole adapters, under the Hugging Face model's own names."""
    adapters_only = isinstance(module.model, PeftModel)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return {
        name.removeprefix("model."): value
        for name, value in state_dict.items()
        if name.startswith("model.") and (not adapters_only or name in trained or ".lora_" in name)
    }


def export(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: dict[str, Tensor],
    head: models.Head = "lm",
) -> None:
    """Write weights, config and tokenizer as a folder that any Hugging Face tool opens."""
    options: dict[str, Any] = {"state_dict": state_dict}
    if head == "score":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = models.scoring_pad(tokenizer)
        model.config.pad_token_id = tokenizer.pad_token_id
    if isinstance(model, PeftModel):
        options["save_embedding_layers"] = False
    model.save_pretrained(str(folder), **options)
    tokenizer.save_pretrained(str(folder))
