"""The reference's log-probabilities of every pair: computed once, without dropout, and kept on disk.

Kept by the weights, the precision and each pair's own tokens, and by nothing else: another beta, seed, learning rate
or a restart finds them again.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fine_tune.adapters import changed_fields
from fine_tune.batches import PreferenceBatch, data_of, on_device
from fine_tune.modules.evaluation import in_parts
from fine_tune.modules.pair_logps import pair_logps
from fine_tune.modules.precision import weights_dtype
from fine_tune.modules.reference import reference_model, starts_as_base
from fine_tune.modules.run_identity import weights_content
from fine_tune.ranks import from_all_ranks

if TYPE_CHECKING:
    from fine_tune.modules.dpo import DPO

log = logging.getLogger("fine_tune")
PAIRS_AT_ONCE = 64


class CachedReference:
    """Log-probabilities of the pairs of a run under the model it started from.

    Args:
        module: The policy.
        folder: Where they are kept, for all runs.
    """

    def __init__(self, module: "DPO", folder: Path) -> None:
        self.module = module
        self.file = folder / "reference" / f"{_key(module)}.npz"
        self._known = _read(self.file)
        self._of_row: dict[int, np.ndarray] = {}

    def prepare(self, split: str) -> None:
        """Have the log-probabilities of all pairs of a split: known, or computed now, and kept."""
        rows = data_of(self.module.trainer).encoded(split)
        keys = [_row_key(row) for row in rows]
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        if missing:
            log.info("reference: %s pairs of %s to compute", f"{len(missing):,}", split)
            self._compute(rows, keys, missing)
        for row, key in zip(rows, keys, strict=True):
            self._of_row[int(row["row_id"])] = self._known[key]

    def of(self, batch: PreferenceBatch, ld_alpha: float) -> Tensor:
        """Return the log-probabilities of both answers of each pair, ``[B, 2]``."""
        values = np.stack([self._of_row[row_id] for row_id in batch["row_ids"]])
        device = batch["input_ids_BT"].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        head_B2, tail_B2 = on_device(values, device, wide).unbind(1)
        return head_B2 + ld_alpha * tail_B2

    def _compute(self, rows: Any, keys: list[str], missing: list[int]) -> None:
        module, trainer = self.module, self.module.trainer
        mine = sorted(missing, key=lambda i: -len(rows[i]["input_ids"]))
        mine = mine[trainer.global_rank :: trainer.world_size]
        collate = data_of(trainer).make_batch
        found: dict[str, list[Any]] = {}
        with reference_model(module) as model:

            def add(batch: PreferenceBatch) -> None:
                logps = pair_logps(model, batch, shared=module.shares_prefix)
                for row_id, head, tail in zip(
                    batch["row_ids"], logps.head_B2.tolist(), logps.tail_B2.tolist(), strict=True
                ):
                    found[by_id[row_id]] = [head, tail]

            by_id = {int(rows[i]["row_id"]): keys[i] for i in mine}
            most = -(-len(missing) // trainer.world_size)  # of a rank: all take as many batches
            for start in range(0, most, PAIRS_AT_ONCE):
                batch = collate([rows[i] for i in mine[start : start + PAIRS_AT_ONCE]])
                batch = trainer.strategy.batch_to_device(batch, device=module.device)
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    in_parts(module, batch, add)
        for of_rank in from_all_ranks(found, trainer.world_size):
            self._known |= {key: np.asarray(value) for key, value in of_rank.items()}
        if trainer.is_global_zero:
            _write(self.file, self._known)


def _key(module: "DPO") -> str:
    settings, precision = module.model_settings, str(module.trainer.precision)
    parts = {
        "weights": weights_content(settings.model_name_or_path, settings.revision),
        "new": [settings.from_config, module.seed] if settings.from_config else None,
        "config": settings.config,
        "dtype": str(weights_dtype(settings.dtype, precision, frozen=settings.lora is not None)),
        "quantized": settings.quantized,
        "precision": precision,
    }
    lora: Any = settings.lora
    if lora is not None and not starts_as_base(module) and settings.continued_adapter is None:
        parts["adapter"] = [changed_fields(lora), module.seed]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _row_key(row: dict[str, Any]) -> str:
    digest = hashlib.sha256(np.asarray(row["input_ids"], dtype="<i4").tobytes())
    digest.update((np.asarray(row["labels"]) >= 0).tobytes())
    digest.update(f"{row['num_prompt']} {row['num_chosen']}".encode())
    return digest.hexdigest()[:32]


def _read(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        return {}
    try:
        with np.load(file, allow_pickle=False) as kept:
            return dict(zip(kept["keys"].tolist(), kept["logps"], strict=True))
    except (OSError, ValueError, KeyError, EOFError) as error:
        log.info("WARNING: %s cannot be read (%s); the reference is computed again", file, error)
        return {}


def _write(file: Path, known: dict[str, np.ndarray]) -> None:
    unfinished = file.with_name(f".{file.stem}.{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(unfinished, keys=np.array(list(known)), logps=np.stack(list(known.values())))
        unfinished.replace(file)
    except OSError as error:
        log.info("WARNING: the reference is not kept in %s (%s); training goes on", file, error)
