"""Mixture of experts: how evenly its routers spread tokens, as a loss and as figures.

Shape letters: P tokens, E experts, L layers with experts.
"""

from typing import Any

import torch
from torch import Tensor

from fine_tune.ranks import sum_over_ranks

ROUTER_NAMES = {"gate", "router"}  # a part of the path of their weights


class Routers:
    """The routers of a model: what they chose since ``restart``, and the loss that holds them in balance.

    ``coefficient`` of it is added to the loss: the config's ``router_aux_loss_coef`` where routers are trained, else 0.

    Args:
        model: A mixture of experts; see ``routers_of``.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.num_experts, self.top_k = _num_experts(config), int(config.num_experts_per_tok)
        trained = {
            part for n, p in model.named_parameters() if p.requires_grad for part in n.split(".")
        }
        self.coefficient = float(config.router_aux_loss_coef) if trained & ROUTER_NAMES else 0.0
        self._given: tuple[Tensor, ...] = ()  # [P, E] of each layer, of the forward pass at hand
        self._counted_LF: Tensor | None = None  # tokens of each expert, entropies, tokens
        _decoder(model).register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._given = tuple(output.router_logits or ())

    def restart(self) -> None:
        """Forget what was counted, and the forward pass that was not."""
        self._given, self._counted_LF = (), None

    def balance_loss(self, real_P: Tensor | None) -> Tensor:
        """Count the forward pass at hand, and return its balance loss: 1 where experts are chosen evenly.

        ``E sum_e f_e p_e``, f the tokens per expert over all tokens, p the mean of its probability, both over all
        layers (Switch Transformer, arXiv 2101.03961, eq. 4 to 6, as transformers computes it).

        Args:
            real_P: 1 for a token, 0 for padding, whose choices do not count; None where there is none.
        """
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        given, self._given = self._given, ()
        with torch.no_grad():
            self._count(given, real_P)
        loss = load_balancing_loss_func(given, self.num_experts, self.top_k, real_P)  # type: ignore[arg-type]
        assert isinstance(loss, Tensor)  # it is a number only where nothing is given
        return loss

    def _count(self, given: tuple[Tensor, ...], real_P: Tensor | None) -> None:
        logits_LPE = torch.stack([logits.float() for logits in given])
        real_P = torch.ones_like(logits_LPE[0, :, 0]) if real_P is None else real_P.float()
        logps_LPE = logits_LPE.log_softmax(-1)
        entropy_L = (-(logps_LPE.exp() * logps_LPE).sum(-1) * real_P).sum(-1)
        chosen_LPK = logits_LPE.topk(self.top_k, dim=-1).indices
        counts_LE = torch.zeros(len(given), self.num_experts, device=real_P.device)
        weights_LPK = real_P[None, :, None].expand(chosen_LPK.shape)
        counts_LE.scatter_add_(1, chosen_LPK.flatten(1), weights_LPK.flatten(1))
        num_tokens_L = real_P.sum().expand(len(given))
        counted_LF = torch.cat([counts_LE, torch.stack([entropy_L, num_tokens_L], 1)], 1)
        before_LF = self._counted_LF
        self._counted_LF = counted_LF if before_LF is None else before_LF + counted_LF

    def figures(self, world_size: int) -> dict[str, Tensor]:
        """Return what was counted since ``restart``, over all ranks, per layer.

        Args:
            world_size: Number of ranks.

        Returns:
            ``load_00``: tokens of the expert that got most over the mean, from 1 (even) up to the number of experts.
            ``load``: the same of all layers together, which is what the balance loss evens out.
            ``entropy_00``: of a token's choice, the mean, in nats, from 0 (sure) to the log of that number.
        """
        if self._counted_LF is None:
            return {}
        counted_LF = sum_over_ranks(self._counted_LF, self._counted_LF.device, world_size).cpu()
        counts_LE, entropy_L, num_tokens_L = (
            counted_LF[:, :-2],
            counted_LF[:, -2],
            counted_LF[:, -1],
        )
        figures = {
            "load": counts_LE.max(1).values / counts_LE.mean(1),
            "entropy": entropy_L / num_tokens_L,
        }
        counts_E = counts_LE.sum(0)
        return {"load": counts_E.max() / counts_E.mean()} | {
            f"{name}_{layer:02d}": value
            for name, values_L in figures.items()
            for layer, value in enumerate(values_L)
        }


def routers_of(model: Any) -> Routers | None:
    """Return the routers of a mixture of experts whose scores transformers can give; None of any other model."""
    config = model.config.get_text_config()
    known = hasattr(config, "router_aux_loss_coef") and hasattr(config, "num_experts_per_tok")
    gives = "router_logits" in (getattr(_decoder(model), "_can_record_outputs", None) or {})
    return Routers(model) if known and gives and _num_experts(config) > 1 else None


def _decoder(model: Any) -> Any:
    # peft calls the model it wraps without that one's hooks, but not the decoder in it
    return getattr(model, "get_base_model", lambda: model)().base_model


def _num_experts(config: Any) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)
