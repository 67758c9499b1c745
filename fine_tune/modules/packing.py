"""Rows of a micro-batch one behind the other, without padding: no token sees another row's.

Shape letters: B rows, T tokens of the longest, P tokens of all rows, H heads, D of a head.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fine_tune.batches import SFTBatch, on_device
from fine_tune.losses import IGNORE_INDEX

VARLEN, CAUSAL = "varlen", "causal"
UNKNOWN = ("s_aux", "sliding_window", "position_bias")  # to torch's kernel, or to us of it
NEEDED_OF_VARLEN = {"scale", "window_size", "enable_gqa"}  # arguments that not every torch has
PROBE_LENGTHS = [9, 5, 3]


def packed(batch: SFTBatch) -> tuple[dict[str, Any], Tensor]:
    """Put the rows of a micro-batch behind one another.

    Args:
        batch: Rows, longest first, padded on the right.

    Returns:
        The model's inputs, and ``labels_1P``: a row's first token carries no loss, for nothing of its row predicts it.
    """
    lengths, device = np.asarray(batch["lengths"]), batch["input_ids_BT"].device
    starts = np.cumsum(lengths) - lengths
    position_ids = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    width = batch["input_ids_BT"].shape[1]
    places = position_ids + np.repeat(np.arange(len(lengths)) * width, lengths)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    places_P, position_ids_P, ends_B = (
        on_device(values, device) for values in (places, position_ids, ends)
    )
    labels_P = batch["labels_BT"].flatten()[places_P]
    labels_P = labels_P.masked_fill(position_ids_P == 0, IGNORE_INDEX)
    longest = int(lengths.max())
    inputs = {
        "input_ids": batch["input_ids_BT"].flatten()[places_P][None],
        "position_ids": position_ids_P[None],
        "cu_seq_lens_q": ends_B,
        "cu_seq_lens_k": ends_B,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return inputs, labels_P[None]


def varlen_attention(
    module: torch.nn.Module,
    query_1HPD: Tensor,
    key_1HPD: Tensor,
    value_1HPD: Tensor,
    _: Tensor | None,  # the mask: there is none
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each row of a packed micro-batch by torch's own kernel, as transformers calls attention.

    Raises:
        ValueError: The kernel cannot do what the model asks for.
    """
    from torch.nn.attention.varlen import varlen_attn

    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(f"{type(module).__name__} does not hand on where rows end")
    if softcap is not None or dropout or any(kwargs.get(n) is not None for n in UNKNOWN):
        raise ValueError(f"{type(module).__name__} asks for more than softmax of causal scores")
    q_PHD, k_PHD, v_PHD = (
        _of_attention(x.squeeze(0).transpose(0, 1)) for x in (query_1HPD, key_1HPD, value_1HPD)
    )
    ends_B, longest = cu_seq_lens_q, max_length_q
    grouped = {"enable_gqa": True} if q_PHD.shape[1] != k_PHD.shape[1] else {}
    attended_PHD = varlen_attn(
        *(q_PHD, k_PHD, v_PHD, ends_B, ends_B, longest, longest),
        scale=scaling,
        window_size=(-1, 0),  # causal
        **grouped,  # type: ignore[arg-type]
    )
    return attended_PHD[None], None  # type: ignore[call-overload]


def _of_attention(x: Tensor) -> Tensor:
    """Return what autocast would compute attention in; it does not know torch's new kernel."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# transformers makes no mask for attention that it has none for, and does not look whether rows are packed, either: on a
# GPU it would wait for the answer at every forward pass.
ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
ALL_ATTENTION_FUNCTIONS.register(CAUSAL, sdpa_attention_forward)


@contextmanager
def attending_by(model: Any, attention: str | None) -> Iterator[None]:
    """Let a model attend by another implementation, its backward pass included; None changes nothing.

    Args:
        model: Any model of transformers.
        attention: A name that transformers knows; ``varlen`` for packed rows, ``causal`` for rows padded on the right.
    """
    if attention is None:
        yield
        return
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = attention
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def attention_without_masks(model: Any, computes_in: torch.dtype) -> Iterator[str]:
    """Give the attentions that could take a model's rows without any mask, the best first: ``varlen``, ``causal``.

    None on a CPU: nobody waits there for the answer whether rows are packed, and trying one takes longer than that.

    Args:
        model: A causal language model.
        computes_in: The type it computes in; torch's kernel for packed rows takes 16 bit, on a GPU.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or _windowed(config) or model.device.type == "cpu":
        return
    if why_padded(model, computes_in) is None:
        yield VARLEN
    yield CAUSAL


def why_padded(model: Any, computes_in: torch.dtype) -> str | None:
    """Say why torch's kernel for packed rows is not even tried on a GPU; None where it is, and on a CPU.

    Args:
        model: A causal language model.
        computes_in: The type it computes in.
    """
    config, kind = model.config.get_text_config(), model.device.type
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"torch's kernel for packed rows is not there for {kind}"
    if config._attn_implementation != "sdpa":
        return f"torch's kernel for packed rows stands in for sdpa, not for {config._attn_implementation}"
    if _windowed(config):
        return "torch's kernel for packed rows is not used for a model that attends within windows"
    if computes_in == torch.float32:
        return "torch's kernel for packed rows takes 16 bit, and this computes in float32"
    return _lacking_of_varlen()


def _windowed(config: Any) -> bool:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers != {"full_attention"} or getattr(config, "sliding_window", None) is not None


def _lacking_of_varlen() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return (
            f"torch {torch.__version__} has no kernel for packed rows (torch.nn.attention.varlen)"
        )
    lacking = sorted(NEEDED_OF_VARLEN - set(inspect.signature(varlen_attn).parameters))
    if not lacking:
        return None
    return f"varlen_attn of torch {torch.__version__} takes no {', '.join(lacking)}"


def same_logits(model: Any, attention: str | None, *, pack: bool) -> bool:
    """Whether a model gives a few rows the logits that it gives them as it is.

    Args:
        model: A causal language model; where gradients are on, its backward pass is tried, too.
        attention: By which they are attended; None for the model's own.
        pack: Whether they stand behind one another instead of being padded.
    """
    device, vocabulary = model.device, model.config.get_text_config().vocab_size
    rows, longest = len(PROBE_LENGTHS), max(PROBE_LENGTHS)
    ids_BT = torch.arange(rows * longest, device=device).view(rows, longest) % (vocabulary - 1) + 1
    batch = SFTBatch(
        input_ids_BT=ids_BT,
        labels_BT=ids_BT,
        lengths=PROBE_LENGTHS,
        num_supervised=[length - 1 for length in PROBE_LENGTHS],
        row_ids=list(range(rows)),
    )
    was_training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        with torch.no_grad():
            wanted_BTV = model(input_ids=ids_BT, use_cache=False).logits
        with attending_by(model, attention):
            inputs = packed(batch)[0] if pack else {"input_ids": ids_BT}
            found_BTV = model(**inputs, use_cache=False).logits
            if torch.is_grad_enabled() and trained:
                torch.autograd.grad(found_BTV.sum(), trained[0])
    except (TypeError, ValueError, RuntimeError, KeyError):
        return False  # it takes no such inputs, or its attention no such rows
    finally:
        model.train(was_training)
    wanted_PV = torch.cat([wanted_BTV[i, :length] for i, length in enumerate(PROBE_LENGTHS)])
    found_PV = found_BTV.detach()[0]
    if not pack:
        found_PV = torch.cat([found_BTV.detach()[i, :n] for i, n in enumerate(PROBE_LENGTHS)])
    tolerance = 1e-4 if found_PV.dtype == torch.float32 == model.dtype else 5e-2
    apart, size = (torch.linalg.norm(x.float()) for x in (found_PV - wanted_PV, wanted_PV))
    return bool(apart <= tolerance * size)
