"""``merge``: a run's adapter merged into its base, checked, as a folder that any Hugging Face tool opens."""

import logging
import shlex
from pathlib import Path
from typing import Any, Literal

import torch

from fine_tune import models
from fine_tune.commands.merged_layers import computing_in, computing_merged, merged_model
from fine_tune.commands.model_folder import ModelFolder, finish, start_folder
from fine_tune.commands.probes import largest_difference, logits, probe_rows
from fine_tune.commands.tried import try_installed
from fine_tune.errors import UserError
from fine_tune.model_config import load_config
from fine_tune.modules.precision import DTYPES
from fine_tune.printable import printable
from fine_tune.runs.find import find_run
from fine_tune.trained_model import TrainedModel, trained_model

log = logging.getLogger("fine_tune")
# Of the largest difference of a logit, in float32; layers of 8 bit also round what they multiply.
BOUNDS = {None: 1e-4, "nf4": 5e-3, "fp4": 5e-3, "int8": 5e-2}
SHARD_BYTES = "2GB"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def merge(
    run: str,
    output: str | None = None,
    checkpoint: str = "best",
    dtype: Dtype = "auto",
    base_model: str | None = None,
    root: str = ".",
) -> None:
    """Merge a run's adapter into its base and write the whole model as a Hugging Face folder.

    Each layer is merged in float32, a quantized one dequantized first; the rest of the model stays as it was trained
    or is as it will be written, so that memory for one of the two is enough. The folder appears under its name only
    once the logits of the adapter, the merged model and the model read back agree on probe prompts.

    Args:
        run: A run folder, a run's name (its newest version), or name/version_N.
        output: The folder to write; it must not exist. None: ``merged`` in the run folder.
        checkpoint: ``best`` or ``last``.
        dtype: Type of the written weights. auto: that of the base's own weights.
        base_model: Where the base lies now, if it was moved; another one is refused by the hash of its weights.
        root: Folder that holds ``lightning_logs``.

    Raises:
        UserError: Nothing to merge, a base that is gone or another one, or a merged model that differs too much.
    """
    trained = trained_model(find_run(run, Path(root)), checkpoint, base_model)
    if not trained.trains_adapter:
        raise UserError(
            f"run: {trained.run.name} trained all weights, so there is nothing to merge; "
            f"python -m fine_tune export {shlex.quote(run)} writes them"
        )
    target = Path(output) if output is not None else trained.run.path / "merged"
    ModelFolder(trained, merged=True).card()  # what is wrong with the record shows before the work
    with start_folder(target) as unfinished:
        differences = _merge_into(unfinished, trained, dtype)
        folder = ModelFolder(trained, merged=True, differences=differences)
        finish(unfinished, folder)
    tried = try_installed(target) if trained.settings.head == "lm" else []
    for line in [*folder.next_commands(target), *tried]:
        log.info("%s", printable(line))


def _merge_into(folder: Path, trained: TrainedModel, dtype: Dtype) -> dict[str, float]:
    """Write the merged model; return the largest differences of a logit to the adapter's, by what was compared.

    Raises:
        UserError: A difference is above its bound.
    """
    rows = probe_rows(trained)
    model = trained.load()
    bound = BOUNDS.get(trained.settings.quantized, BOUNDS["nf4"])
    log.info("merging %s, checkpoint %s", trained.run.name, trained.checkpoint.name)
    with computing_in(model, torch.float32):
        expected = logits(model, rows)
    with computing_merged(model):
        found = {"merged": largest_difference(expected, logits(model, rows))}
    _check("merged", found["merged"], bound)
    written = _written_dtype(trained, dtype)
    if written != torch.float32:  # then its weights are rounded, as far as one pass in it rounds
        with computing_in(model, written):
            rounded = largest_difference(expected, logits(model, rows))
        found["the adapter's model in this type"] = rounded
        bound = max(bound, 2 * rounded)
    merged = merged_model(model, written, trained.settings.head)
    del model
    tokenizer = trained.tokenizer
    _set_special_tokens(merged, tokenizer, trained.settings.head)
    merged.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    del merged
    tokenizer.save_pretrained(folder)
    read_back = _read_back(folder, trained, written)
    with computing_in(read_back, torch.float32):
        found["read back"] = largest_difference(expected, logits(read_back, rows))
    _check("read back", found["read back"], bound)
    for name, difference in found.items():
        log.info("  largest difference of a logit, %s: %.2g", name, difference)
    log.info("  allowed: %.2g, on %d probe rows", bound, len(rows))
    return found


def _check(name: str, difference: float, bound: float) -> None:
    if not difference <= bound:
        raise UserError(
            f"merge: the {name} model's logits differ from the adapter's by up to {difference:.2g}, allowed are "
            f"{bound:.2g}; nothing was written. (On an embedding tied to the head, a merged adapter changes both.) "
            "The adapter itself is fine: python -m fine_tune export RUN"
        )


def _written_dtype(trained: TrainedModel, dtype: Dtype) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    own = trained.model_config().dtype
    return own if isinstance(own, torch.dtype) else torch.float32


def _read_back(folder: Path, trained: TrainedModel, dtype: torch.dtype) -> Any:
    config = load_config(str(folder), None, None)
    head = trained.settings.head
    return models.load_model(config, str(folder), dtype=dtype, head=head).eval()


def _set_special_tokens(model: Any, tokenizer: Any, head: models.Head) -> None:
    """Let ``generate`` stop where training taught it to, and a scalar head be read where it was trained."""
    if head == "score":
        tokenizer.pad_token = models.scoring_pad(tokenizer)
        model.config.pad_token_id = tokenizer.pad_token_id
        return
    config = model.generation_config
    stops = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id
    stops = list(dict.fromkeys([int(tokenizer.eos_token_id), *(stops or [])]))
    config.eos_token_id = stops if len(stops) > 1 else stops[0]
    config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample and any(getattr(config, name) is not None for name in SAMPLING):
        config.do_sample = (
            True  # its sampling settings say what was meant; transformers refuses both
        )
