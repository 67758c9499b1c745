"""What both sides of a row are given: a random model of some size, a new adapter of it, and rows of random words."""

import json
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
SEED = 42
WORDS = [
    "ibu",
    "kota",
    "negara",
    "provinsi",
    "benua",
    "mata",
    "uang",
    "tahun",
    "merdeka",
    "terletak",
    "adalah",
    "di",
]


def llama(layers: int, width: int, vocabulary: int) -> dict[str, Any]:
    """Return the fields of a Llama with heads of 64."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 11 // 4 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
    }


def save_model(folder: Path, config: dict[str, Any], dtype: str = "float32") -> tuple[str, int]:
    """Save a model with random weights, the quickstart's tokenizer, and a new LoRA adapter; return what it is.

    Returns:
        A description, and the number of weights.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    sys.path.insert(0, str(REPOSITORY / "tests"))
    from small_models import save_small_model

    model = save_small_model(folder, dtype=getattr(torch, dtype), **config)
    weights = int(model.num_parameters())
    lora = LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.save(get_peft_model_state_dict(get_peft_model(model, lora)), folder / "adapter.pt")
    sizes = (config[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    shape = "L{} d{} V{}".format(*sizes)
    return f"{config['model_type']} {shape}, {weights / 1e6:.1f}M weights", weights


@dataclass(frozen=True)
class Length:
    """Tokens of a text: log-normal around a mean, cut at both ends; a spread of 0 gives the mean each time."""

    mean: int
    spread: float
    least: int
    most: int

    def draw(self, draw: random.Random) -> int:
        """Return one length."""
        length = round(self.mean * draw.lognormvariate(-(self.spread**2) / 2, self.spread))
        return min(max(length, self.least), self.most)


def write_rows(
    file: Path, count: int, prompt: Length, answer: Length, answers: tuple[str, ...]
) -> dict[str, Any]:
    """Write rows of a prompt and answers, made of words of one token each.

    Args:
        file: A JSONL.
        count: Rows.
        prompt: Tokens of a prompt.
        answer: Tokens of an answer, without the stop token.
        answers: Their fields: ``("completion",)``, ``("chosen", "rejected")``, or none: texts.

    Returns:
        ``tokens``, those of all rows (a pair's prompt twice), and ``told``, the mean lengths.
    """
    from small_models import TOKENIZER
    from transformers import AutoTokenizer

    tokenizer, draw = AutoTokenizer.from_pretrained(str(TOKENIZER)), random.Random(SEED)
    texts = [text[1:] for text in sorted(tokenizer.get_vocab()) if text[1:].isascii()]
    words = [t for t in texts if t.isalpha() and len(tokenizer(f" {t}")["input_ids"]) == 1]
    firsts = [word for word in words if len(tokenizer(word)["input_ids"]) == 1]
    counts: dict[str, list[int]] = defaultdict(list)
    with open(file, "w") as handle:
        for _ in range(count):
            num_prompt = prompt.draw(draw)
            of_prompt = [*draw.choices(firsts, k=1), *draw.choices(words, k=num_prompt - 1)]
            row: dict[str, Any] = {"prompt": " ".join(of_prompt)}
            num_answers = [answer.draw(draw) for _ in answers]
            for name, num in zip(answers, num_answers, strict=True):
                row[name] = " " + " ".join(draw.choices(words, k=num))
            row["length"] = num_prompt + max(num_answers, default=1) + 1  # the peer groups by it
            handle.write(json.dumps(row) + "\n")
            counts["prompt"].append(num_prompt)
            counts["answer"] += [num + 1 for num in num_answers]  # the stop token
            counts["row"].append(row["length"])
    if not answers:
        counts = {"text": counts["row"]}
    means = {name: statistics.mean(of) for name, of in counts.items()}
    shown = [f"{name} {means[name]:.0f} (up to {max(of)})" for name, of in counts.items()]
    if not answers:
        return {"tokens": sum(counts["text"]), "told": f"mean tokens: {', '.join(shown)}"}
    tokens = len(answers) * sum(counts["prompt"]) + sum(counts["answer"])
    share = sum(counts["answer"]) / tokens
    told = f"mean tokens: {', '.join(shown)}; {share:.0%} of them carry loss"
    return {"tokens": tokens, "told": told}
