"""What a GPU could do: its matrix rate, measured in the same job, and the operations that a token needs."""

import statistics
from typing import Any

from benchmarks.harness import Measured, reached

SIZE, TIMES = 8192, 20


def matmul_rate() -> Measured:
    """Multiply large bf16 matrices and return TFLOP/s."""
    import torch

    on_gpu = torch.cuda.is_available()
    size, device = (SIZE, "cuda") if on_gpu else (512, "cpu")
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))

    def seconds() -> float:
        import time

        start = time.perf_counter()
        for _ in range(TIMES):
            a @ b
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / TIMES

    seconds()
    return {"teraflops": 2 * size**3 / min(seconds() for _ in range(3)) / 1e12}


def gigaflops_per_token(
    config: dict[str, Any], length: int, *, lora: bool, recomputed: bool, supervised: float = 1.0
) -> float:
    """Return the operations of forward and backward for a token, as hardware does them.

    ``6 N + 3 A`` for all weights, ``8 N_l + 6 N_h + 4 A`` with recomputing; for LoRA ``4 N + 3 A`` and
    ``6 N_l + 4 N_h + 4 A``. N_l are the weights of the layers' matrices, N_h those of the head (times the share of
    supervised positions), A = 2 x layers x width x length is causal attention's forward pass.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)  # the latter GPT-2's
    linear = [m for m in model.modules() if isinstance(m, kinds) and m is not head]
    layers, of_head = sum(m.weight.numel() for m in linear), head.weight.numel() * supervised
    attention = 2 * config["num_hidden_layers"] * config["hidden_size"] * length
    passes = (
        (6, 4, 4)
        if lora and recomputed
        else (4, 4, 3)
        if lora
        else (8, 6, 4)
        if recomputed
        else (6, 6, 3)
    )
    return (passes[0] * layers + passes[1] * of_head + passes[2] * attention) / 1e9


def say_rates(bench: Any, rates: dict[str, list[float]]) -> None:
    """Say our tokens per second as a share of the matrix rate of the same job, and beside the target.

    Args:
        bench: A ``TrainingBench``.
        rates: Tokens per second of each side's legs.
    """
    row = bench.row
    possible = bench.leg("benchmarks.gpu:matmul_rate")["teraflops"]
    length, share = row.prompt.mean + row.answer.mean, row.answer.mean / row.prompt.mean
    supervised = 1.0 if row.task == "Pretrain" else share / (1 + share)
    needed = gigaflops_per_token(
        row.config, length, lora=row.lora, recomputed=False, supervised=supervised
    )
    bench.say(
        f"matrices of bf16: {possible:.0f} TFLOP/s; a token needs {needed:.2f} GFLOP without recomputing (the head at "
        f"{supervised:.0%} of the positions)"
    )
    for name in (name for name in rates if name.startswith("ours") and "," not in name):
        rate = statistics.median(rates[name])
        line = f"{name}: {rate:,.0f} tokens/s, {rate * needed / 1e3 / possible:.0%} of that rate"
        if row.rate is not None:
            line += f"; on one H200 {reached(rate, at_least=row.rate)}"
        bench.say(line)
