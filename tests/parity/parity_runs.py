"""Small models, rows of uneven lengths, and our side of a comparison: runs of the command line in this process."""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

import fine_tune
from fine_tune import cli
from fine_tune.data.steps import StepSampler

TOKENIZER = Path(fine_tune.__file__).parent / "quickstart" / "tokenizer"
NUM_STEPS, BATCH_SIZE, NUM_ROWS = 20, 8, 48  # rows per step divide the rows: every step is full
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS, CLIP = 1e-3, 0.01, 4, 1.0
_WORDS = [
    "ibu",
    "kota",
    "negara",
    "provinsi",
    "Jerman",
    "Sulawesi",
    "Selatan",
    "Sebutkan",
    "apa",
    "nama",
    "hasil",
    "dari",
    "adalah",
    "7",
    "12",
    "305",
    "antidisestablishmentarianism",
    "x,",
    "kue;",
    "rumah-sakit",
    "sangat",
    "besar",
    "dan",
    "biru",
]
PREFERENCE_LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}


@dataclass(frozen=True)
class Run:
    """What a finished run of ours left behind."""

    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / self.record["last"]

    def column(self, name: str) -> list[float]:
        """Return a column of ``metrics.csv``, one value per optimizer step."""
        with open(self.folder / "metrics.csv", newline="") as handle:
            return [float(row[name]) for row in csv.DictReader(handle) if row[name]]


def write_model(folder: Path, architecture: str) -> Path:
    """Save a random model of two layers with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
    experts = {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.1,
    }
    config: PreTrainedConfig = {
        "llama": lambda: LlamaConfig(**sizes),
        "phi": lambda: PhiConfig(**sizes, **no_dropout),
        "qwen2": lambda: Qwen2Config(**sizes),
        "gpt2": lambda: GPT2Config(**sizes, **no_dropout, attn_pdrop=0.0),
        "qwen3_moe": lambda: Qwen3MoeConfig(**{**sizes, **experts}),
    }[architecture]()
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases start at zero, where a wrong treatment of them could hide
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(num_rows: int, seed: int = 3) -> list[dict[str, str]]:
    """Make prompts of 1 to 60 words with completions of 1 to 30, short ones more often than long ones."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(_WORDS, k=1 + int(most * rng.random() ** 3)))

    return [{"prompt": words(60), "completion": f" {words(30)}"} for _ in range(num_rows)]


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(verb: str, root: Path, model: Path, data: Path, *more: str) -> list[str]:
    """Return a command line; ``more`` comes last, so that it wins."""
    name = f"run{len(list((root / 'lightning_logs').glob('run*')))}"
    given = {
        "name": name,
        "trainer.default_root_dir": root,
        "trainer.accelerator": "cpu",
        "model": "fine_tune.modules.SFT",
        "model.model_name_or_path": model,
        "data": "fine_tune.data.SFTData",
        "data.path": data,
        "data.batch_size": BATCH_SIZE,
        "generations.rows": 0,
        "early_stopping.patience": "null",
        "report": "null",
    }
    if verb == "fit":
        given |= {
            "trainer.max_steps": NUM_STEPS,
            "trainer.log_every_n_steps": 1,
            "trainer.gradient_clip_val": CLIP,
            "model.optimizer": "torch.optim.AdamW",
            "model.optimizer.lr": LEARNING_RATE,
            "model.optimizer.weight_decay": WEIGHT_DECAY,
            "model.lr_scheduler": "cosine",
            "model.warmup_steps": WARMUP_STEPS,
            "data.split": "none",
        }
    return [verb, *(f"--{key}={value}" for key, value in given.items()), *more]


def run_ours(verb: str, root: Path, model: Path, data: Path, *more: str) -> Run:
    """Run our command line in this process."""
    line = arguments(verb, root, model, data, *more)
    assert cli.main(line) == 0
    return run_of(line)


def run_of(line: list[str]) -> Run:
    """Find the folder that a command line of ``arguments`` wrote."""
    given = dict(part.removeprefix("--").split("=", 1) for part in line[1:] if "=" in part)
    versions = Path(given["trainer.default_root_dir"], "lightning_logs", given["name"])
    return Run(next(versions.glob("version_*")))


def rows_in_our_order(data: Any) -> tuple[Dataset, np.ndarray]:
    """Return the encoded training rows of a data module in the order of our steps, and that order."""
    rows = data.rows("train")
    sampler = StepSampler(
        np.ones(len(rows)), batch_size=BATCH_SIZE, num_steps=NUM_STEPS, seed=data.seed
    )
    order = np.concatenate([sampler.rows_of_step(step) for step in range(NUM_STEPS)])
    return rows.select(order), order


def their_rows(file: Path, order: np.ndarray) -> Dataset:
    """Return the rows of a file in our order, for a trainer of TRL."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return Dataset.from_list([rows[i] for i in order])


def their_settings(root: Path, **more: Any) -> dict[str, Any]:
    """Return what every trainer of TRL is given, so that it takes the steps of ``run_ours``."""
    return {
        "output_dir": str(root / "trl"),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH_SIZE,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": CLIP,
        "optim": "adamw_torch",
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP_STEPS,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **more,
    }


def weights_of(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Read the weights of a checkpoint folder the way any Hugging Face tool does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return {name: value.detach() for name, value in model.named_parameters()}


def relative_l2(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return ``|ours - theirs| / |theirs|`` over all parameters together, in float64."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[n].double() - theirs[n].double()).square().sum() for n in theirs)
    size = sum(value.double().square().sum() for value in theirs.values())
    return float((difference / size) ** 0.5)


def max_relative(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference of two curves, step by step."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
