"""The training rows of the design's tables, and their sizes for a try on a CPU."""

from dataclasses import replace

from benchmarks.inputs import Length, llama
from benchmarks.training import Row

SHORT = {"prompt": Length(90, 0.5, 16, 400), "answer": Length(59, 0.6, 8, 250)}
PAIR = {"prompt": Length(256, 0.35, 64, 640), "answer": Length(63, 0.45, 8, 255)}
WHOLE = {"prompt": Length(512, 0, 1, 1024), "answer": Length(511, 0, 1, 1024)}

PHI_2 = {
    "model_type": "phi",
    "vocab_size": 51_200,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "max_position_embeddings": 2048,
}
GPT_2 = {
    "model_type": "gpt2",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "n_inner": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "max_position_embeddings": 1024,
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
}
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "max_position_embeddings": 2048,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN_05B = {
    **QWEN,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}
QWEN_15B = {
    **QWEN,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}

# C4's vocabulary is small: TRL's head runs at every position on a CPU, and a pair of legs would take half an hour.
ROWS = {
    "C1": Row(
        "SFT",
        llama(8, 256, 32_000),
        **SHORT,
        batch_size=16,
        targets={"best": (1.5, 2.0), "defaults": (2.5, 3.5), "memory": (0.8, 0.7)},
    ),
    "C2": Row(
        "SFT",
        llama(12, 384, 32_000),
        **SHORT,
        batch_size=16,
        lora=True,
        targets={"best": (1.25, 1.8), "defaults": (2.2, 3.0)},
    ),
    "C3": Row(
        "DPO",
        llama(12, 384, 32_000),
        **PAIR,
        batch_size=4,
        lora=True,
        targets={"best": (1.6, 2.0), "defaults": (2.5, 3.5)},
    ),
    "C4": Row(
        "DPO",
        llama(6, 256, 4096),
        **PAIR,
        batch_size=8,
        steps=6,
        epochs=3,
        targets={"best": (1.4, 1.8)},
    ),
    "C8": Row(
        "Pretrain",
        llama(6, 384, 32_000),
        prompt=Length(510, 0, 1, 1024),
        answer=Length(1, 0, 1, 1),
        batch_size=4,
        steps=13,
        warmup=3,
        targets={"best": (1.1, 1.3)},
    ),
    "G1": Row(
        "SFT",
        PHI_2,
        **WHOLE,
        batch_size=16,
        steps=30,
        pairs=2,
        lora=True,
        device="cuda",
        targets={"best": (1.15, 1.3), "defaults": (1.5, 1.5)},
        rate=45_000,
    ),
    "G2": Row(
        "SFT",
        PHI_2,
        **WHOLE,
        batch_size=16,
        steps=30,
        pairs=2,
        lora=True,
        quantization="nf4",
        device="cuda",
    ),
    "G3": Row(
        "Pretrain",
        GPT_2,
        prompt=Length(1022, 0, 1, 1024),
        answer=Length(1, 0, 1, 1),
        batch_size=512,
        steps=13,
        pairs=2,
        warmup=3,
        device="cuda",
        targets={"best": (1.3, 1.3)},
        rate=350_000,
    ),
    "G4": Row(
        "SFT",
        QWEN_05B,
        prompt=Length(300, 0.5, 16, 1024),
        answer=Length(299, 0.5, 8, 1023),
        batch_size=32,
        steps=30,
        pairs=2,
        device="cuda",
        targets={"best": (1.3, 1.3)},
        rate=130_000,
    ),
    "G5": Row(
        "DPO",
        QWEN_15B,
        prompt=Length(300, 0.3, 64, 640),
        answer=Length(119, 0.4, 8, 383),
        batch_size=16,
        steps=30,
        pairs=2,
        lora=True,
        device="cuda",
        targets={"best": (1.6, 1.6)},
    ),
}
ROWS["G4-1.5B"] = replace(ROWS["G4"], config=QWEN_15B, rate=43_000)


def toy(row: Row) -> Row:
    """Return a row small enough for a minute on a CPU: the same code, no figure worth keeping."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096}
    spread = 0.0 if row.task == "Pretrain" else 0.3
    short = {name: Length(12, spread, 4, 40) for name in ("prompt", "answer")}
    config = {**row.config, **sizes, **heads}
    changes = {
        "batch_size": 4,
        "steps": 3 + row.warmup,
        "pairs": 1,
        "device": "cpu",
        "config": config,
    }
    return replace(row, **changes, **short)  # type: ignore[arg-type]
