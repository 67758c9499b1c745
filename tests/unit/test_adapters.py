"""LoRA by the model's size and architecture, its mistakes told, and how stored weights are recognised."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    HunYuanMoEV1Config,
    JetMoeConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from fine_tune.adapters import add_lora, auto_lora, check_lora, keep_trained_in_float32
from fine_tune.errors import UserError
from fine_tune.model_config import stored_quantization
from fine_tune.modules.checks import lora_problems, stored_quantization_problems

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}


def llama(**sizes: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=32000, num_attention_heads=16, **sizes)


def on_meta(config: PreTrainedConfig, lora: Any = None) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        return model if lora is None else add_lora(model, lora)


@pytest.mark.parametrize(
    ("config", "billions", "rank", "rslora"),
    [
        (llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=31), 0.59, 8, False),
        (llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=33), 0.62, 16, False),
        (PhiConfig(vocab_size=51200, hidden_size=2560, intermediate_size=10240,
                   num_hidden_layers=32, num_attention_heads=32), 2.78, 16, False),
        (llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=42), 2.95, 16, False),
        (llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=44), 3.08, 16, True),
        (llama(hidden_size=4096, intermediate_size=11008, num_hidden_layers=28), 5.93, 16, True),
        (llama(hidden_size=4096, intermediate_size=11008, num_hidden_layers=29), 6.13, 32, True),
    ],
    ids=["0.59B", "0.62B", "phi-2", "2.95B", "3.08B", "5.93B", "6.13B"],
)  # fmt: skip
def test_rank_and_scaling_follow_the_size(
    config: PreTrainedConfig, billions: float, rank: int, rslora: bool
) -> None:
    num_weights = sum(p.numel() for p in on_meta(config).parameters())
    assert num_weights / 1e9 == pytest.approx(billions, abs=0.005)
    lora = auto_lora(config)
    assert (lora.r, lora.lora_alpha, lora.use_rslora) == (rank, 2 * rank, rslora)
    assert lora.lora_dropout == 0


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (Qwen3MoeConfig(**TINY, num_experts=4, moe_intermediate_size=32, head_dim=16), ATTENTION),
        (Qwen3MoeConfig(**TINY, num_experts=4, moe_intermediate_size=32, intermediate_size=32, head_dim=16,
                        mlp_only_layers=[0]), ATTENTION),
        (MixtralConfig(**TINY, num_local_experts=4, intermediate_size=32), ATTENTION),
        (Qwen2MoeConfig(**TINY, num_experts=4, moe_intermediate_size=32,
                        shared_expert_intermediate_size=32),
         ATTENTION | {"gate_proj", "up_proj", "down_proj"}),
        (DeepseekV3Config(**TINY, n_routed_experts=4, n_group=1, topk_group=1,
                          num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=32,
                          first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
                          qk_rope_head_dim=16, v_head_dim=16, qk_nope_head_dim=16),
         {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        (JetMoeConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_local_experts=4,
                      num_key_value_heads=4, kv_channels=8, intermediate_size=32), {"kv_proj"}),
        (HunYuanMoEV1Config(**TINY, num_experts=4, moe_topk=1, intermediate_size=32, head_dim=16),
         ATTENTION),
    ],
    ids=["qwen3_moe", "qwen3_moe-dense-layer", "mixtral", "qwen2_moe", "deepseek_v3", "jetmoe", "hunyuan"],
)  # fmt: skip
def test_auto_never_adapts_experts_or_routers(config: PreTrainedConfig, targets: set[str]) -> None:
    lora = auto_lora(config)
    assert set(lora.target_modules or []) == targets
    adapted = [name for name, _ in on_meta(config, lora).named_parameters() if "lora_" in name]
    assert adapted
    assert not [n for n in adapted if ".experts" in n or ".gate." in n or ".router." in n]
    assert not [n for n in adapted if "shared_expert_gate" in n]


def test_gpt2s_conv1d_layers_are_found() -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4)
    lora = auto_lora(config)
    assert set(lora.target_modules or []) == {"c_attn", "c_proj", "c_fc"}
    names = {
        n.split(".lora_A")[0] for n, _ in on_meta(config, lora).named_parameters() if "lora_A" in n
    }
    base = "base_model.model.transformer.h.0."
    assert names == {base + n for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4),
         {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        (MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1), {"in_proj", "x_proj", "dt_proj"}),
    ],
    ids=["falcon", "mamba"],
)  # fmt: skip
def test_linear_layers_of_a_kind_of_their_own_are_found(
    config: PreTrainedConfig, targets: set[str]
) -> None:
    lora = auto_lora(config)
    assert set(lora.target_modules or []) == targets
    check_lora(config, lora)


def test_a_dense_model_excludes_nothing_so_that_peft_does_not_warn() -> None:
    assert auto_lora(LlamaConfig(**TINY)).exclude_modules is None


def test_one_unknown_target_among_known_ones_is_told() -> None:
    with pytest.raises(UserError, match=r"\['v_prj'\] are not in this .*did you mean 'v_proj'"):
        check_lora(LlamaConfig(**TINY), LoraConfig(target_modules=["q_proj", "v_prj"]))
    check_lora(LlamaConfig(**TINY), LoraConfig(target_modules=["self_attn.q_proj"]))


def test_unknown_targets_are_told_with_the_names_there_are() -> None:
    with pytest.raises(UserError) as caught:
        check_lora(
            GPT2Config(n_embd=64, n_layer=1, n_head=4), LoraConfig(target_modules=["q_proj"])
        )
    assert caught.value.problems == (
        "model.lora.target_modules: ['q_proj'] are not in this GPT2LMHeadModel; did you mean 'c_proj'?; "
        "its linear layers are named: c_attn, c_fc, c_proj",
    )


def test_a_stored_quantization_changes_nothing_of_the_choice() -> None:
    plain, stored = LlamaConfig(**TINY), LlamaConfig(**TINY, quantization_config=NF4)
    assert auto_lora(stored) == auto_lora(plain)
    check_lora(stored, auto_lora(stored))
    assert stored.quantization_config == NF4


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (None, None),
        (NF4, "nf4"),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        (INT8, "int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_how_weights_are_stored(fields: Any, kind: str | None) -> None:
    config = LlamaConfig(**TINY)
    if fields is not None:
        config.quantization_config = fields
    assert stored_quantization(config) == kind


@pytest.mark.parametrize(
    ("fields", "asked", "lora", "problem"),
    [
        (None, "nf4", "auto", None),
        (NF4, None, "auto", None),
        (NF4, "nf4", "auto", None),
        (INT8, "int8", "auto", None),
        (NF4, None, None, "its weights are stored in nf4, and quantized weights are frozen; set model.lora"),
        (INT8, "nf4", "auto", "model.quantization: nf4 asked, but the checkpoint's weights are stored in int8"),
        ({"quant_method": "awq"}, None, "auto", "quantized by 'awq', which cannot be trained here; bitsandbytes nf4"),
        (NF4, None, LoraConfig(init_lora_weights="pissa"), "pissa changes the base's weights, and nf4 weights stay"),
    ],
)  # fmt: skip
def test_what_a_quantized_checkpoint_allows(
    fields: Any, asked: str | None, lora: Any, problem: str | None
) -> None:
    config = LlamaConfig(**TINY)
    if fields is not None:
        config.quantization_config = fields
    problems = stored_quantization_problems(config, asked, lora)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.parametrize(
    ("lora", "ratio", "quantization", "problem"),
    [
        ("auto", 16.0, "nf4", None),
        (LoraConfig(init_lora_weights="pissa"), None, None, None),
        (LoraConfig(init_lora_weights="olora"), None, None, None),
        ("auto", 0.0, None, "model.lora_plus_ratio: must be above 0 and finite, got 0.0"),
        ("auto", float("nan"), None, "model.lora_plus_ratio: must be above 0 and finite, got nan"),
        (None, 16.0, None, "model.lora_plus_ratio: there are no B matrices; set model.lora"),
        (LoraConfig(init_lora_weights="olora"), None, "int8", "olora changes the base's weights, and int8 weights"),
        (LoraConfig(init_lora_weights="eva"), None, None, "init_lora_weights: eva is not possible: it needs a pass"),
        (LoraConfig(init_lora_weights="corda"), None, None, "corda is not possible: it needs a pass over the data"),
        (LoraConfig(init_lora_weights="pissa_niter_4"), None, None,  # type: ignore[arg-type]
         "pissa_niter_4 is not possible: it draws random numbers"),
    ],
)  # fmt: skip
def test_loras_own_settings(
    lora: Any, ratio: float | None, quantization: str | None, problem: str | None
) -> None:
    problems = lora_problems(lora, ratio, quantization)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_what_is_trained_is_float32_beside_a_base_of_16_bit() -> None:
    base = AutoModelForCausalLM.from_config(LlamaConfig(**TINY), dtype=torch.bfloat16)
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True)
    model = add_lora(base, lora)
    keep_trained_in_float32(model)
    types = {p.requires_grad: set[torch.dtype]() for p in model.parameters()}
    for parameter in model.parameters():
        types[parameter.requires_grad].add(parameter.dtype)
    assert types == {True: {torch.float32}, False: {torch.bfloat16}}


def test_a_norm_with_a_trained_bias_stays_of_one_type() -> None:
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = add_lora(base, LoraConfig(target_modules=["c_attn"], bias="all"))
    keep_trained_in_float32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_olora_is_refused_where_peft_transposes_it() -> None:
    config, lora = GPT2Config(n_embd=64, n_layer=1, n_head=4), LoraConfig(init_lora_weights="olora")
    with pytest.raises(UserError, match="olora is not possible on Conv1D layers"):
        check_lora(config, lora)
