"""Small real models for tests and benchmarks: built from a config with random weights, saved as any user's would be."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

TOKENIZER = Path(__file__).parent.parent / "fine_tune" / "quickstart" / "tokenizer"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def small_config(model_type: str = "llama", **fields: Any) -> PreTrainedConfig:
    """Return a config of the quickstart's vocabulary; ``fields`` replace or add to its small sizes."""
    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZER))
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {**SIZES, **fields}
    if model_type != "gpt2":
        sizes.setdefault("intermediate_size", 2 * sizes["hidden_size"])
    return AutoConfig.for_model(model_type, **{**ids, **sizes})


def save_small_model(
    folder: Path, model_type: str = "llama", *, dtype: torch.dtype = torch.float32, **fields: Any
) -> PreTrainedModel:
    """Save a model and the quickstart's tokenizer, the same weights each time, and return the model."""
    torch.manual_seed(0)
    config = small_config(model_type, **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(TOKENIZER)).save_pretrained(folder)
    return model
