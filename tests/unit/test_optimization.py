"""Parameter groups and learning rates, LoRA+ among them, against literals and against peft's own optimizer."""

from functools import partial
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM, LlamaConfig

from fine_tune.adapters import add_lora
from fine_tune.errors import UserError
from fine_tune.modules.optimization import build_optimizer, parameter_groups, schedule

TARGETS = ["q_proj", "embed_tokens"]


def adapted_llama(**fields: Any) -> Any:
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=False)  # fmt: skip
    lora = LoraConfig(r=4, **{"target_modules": TARGETS, **fields})
    return add_lora(AutoModelForCausalLM.from_config(config), lora)


def rates(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, float]:
    """The learning rate of every parameter, by its name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_matrices_decay_and_vectors_do_not() -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3), layer.named_parameters(), None
    )
    seen = [(g["params"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups]
    assert seen == [([layer.weight], 0.3, 0.1), ([layer.bias], 0.0, 0.1)]


def test_lora_plus_groups_by_name() -> None:
    model = adapted_llama(use_dora=True, target_modules=["q_proj"])
    optimizer = build_optimizer(
        partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.3), model.named_parameters(), 16.0
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        (
            [names[p].split("q_proj.")[1] for p in group["params"]],
            group["lr"],
            group["weight_decay"],
        )
        for group in optimizer.param_groups
    ]
    assert groups == [
        (["lora_A.default.weight"], 1e-3, 0.3),
        (["lora_B.default.weight"], 16e-3, 0.3),
        (["lora_magnitude_vector.default.weight"], 16e-3, 0.0),
    ]
    assert all("lora_b" not in group for group in optimizer.param_groups)


def test_the_schedule_scales_all_groups() -> None:
    model = adapted_llama(target_modules=["q_proj"])
    optimizer = build_optimizer(partial(torch.optim.SGD, lr=0.1), model.named_parameters(), 4.0)
    scheduler = schedule(optimizer, "linear", num_warmup_steps=2, num_steps=6)
    seen = []
    for _ in range(6):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    shares = [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert seen == [pytest.approx([0.1 * share, 0.4 * share]) for share in shares]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        {"lora_bias": True, "bias": "all", "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ],
    ids=["embedding", "dora", "biases", "head"],
)
def test_rates_are_those_of_peft(fields: dict[str, Any]) -> None:
    model = adapted_llama(**fields)
    ours = build_optimizer(partial(torch.optim.AdamW, lr=1e-3), model.named_parameters(), 8.0)
    theirs = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=8.0,
        loraplus_weight_decay=0.01,
        loraplus_lr_embedding=1e-3,  # theirs is 1e-6 unless told; ours leaves an embedding the base rate
    )
    assert rates(ours, model) == rates(theirs, model)
    assert set(rates(ours, model).values()) == {1e-3, 8e-3}


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_bitsandbytes_steps_by_the_ratio(name: str) -> None:
    model = adapted_llama(target_modules=["q_proj"])
    optimizer = build_optimizer(
        partial(getattr(bitsandbytes.optim, name), lr=1e-3, weight_decay=0.0),
        model.named_parameters(),
        4.0,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {n: (before[n] - p).mean() for n, p in model.named_parameters() if n in before}
    # Adam's first step is the learning rate itself, whatever the gradient.
    assert [float(v) for n, v in moved.items() if "lora_A" in n] == pytest.approx([1e-3], rel=1e-3)
    assert [float(v) for n, v in moved.items() if "lora_B" in n] == pytest.approx([4e-3], rel=1e-3)


def test_without_a_ratio_the_groups_are_as_before() -> None:
    model = adapted_llama(target_modules=["q_proj"])
    (group,) = parameter_groups(model.named_parameters())
    assert [p.shape for p in group["params"]] == [(4, 16), (16, 4)]
    assert group.keys() == {"params"}


class OwnGroups(torch.optim.AdamW):
    """An optimizer that makes parameter groups of its own."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__([p for group in params for p in group["params"]], lr=lr)


class StrictGroups(torch.optim.SGD):
    """An optimizer that refuses group keys it does not know."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        known = {"params", "lr", "weight_decay"}
        assert all(set(group) <= known for group in params)
        super().__init__(params, lr=lr)


def test_lora_plus_says_when_an_optimizer_cannot_have_it() -> None:
    model = adapted_llama()
    with pytest.raises(UserError, match="OwnGroups makes parameter groups of its own"):
        build_optimizer(OwnGroups, model.named_parameters(), 16.0)
    strict = build_optimizer(StrictGroups, model.named_parameters(), 16.0)
    assert {rate for name, rate in rates(strict, model).items() if ".lora_B." in name} == {0.016}


def _three_steps(optimizer: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    built = build_optimizer(optimizer, model.named_parameters(), None)
    for step in range(3):
        model(torch.full((4, 8), float(step))).sum().backward()
        built.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_fused_update_is_the_plain_one(kind: Any) -> None:
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    ours = _three_steps(partial(kind, **settings))
    theirs = _three_steps(partial(kind, **settings, foreach=False))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_fused_is_used_unless_the_user_chose() -> None:
    def chosen(**settings: Any) -> Any:
        model = torch.nn.Linear(2, 2)
        optimizer = partial(torch.optim.AdamW, lr=1e-2, **settings)
        return build_optimizer(optimizer, model.named_parameters(), None).param_groups[0]["fused"]

    assert chosen() is True
    assert not chosen(foreach=True) and not chosen(foreach=False) and chosen(fused=False) is False
