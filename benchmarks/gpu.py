"""What a GPU could do: its matrix rate, measured in the same job, and the operations that a token needs."""

from typing import Any

from benchmarks.harness import Measured

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

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
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
