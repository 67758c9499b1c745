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
        coefficient: Of the balance loss, in the loss.
    """

    def __init__(self, model: Any, coefficient: float) -> None:
        config = model.config.get_text_config()
        self.num_experts, self.top_k = _num_experts(config), int(config.num_experts_per_tok)
        self.coefficient, self.num_layers = coefficient, 0
        self._given: tuple[Tensor, ...] = ()  # [P, E] of each layer, of the forward pass at hand
        self._counted_LF: Tensor | None = None  # tokens of each expert, entropies, tokens
        # of the decoder: peft calls the model it wraps without that one's hooks, but not the decoder in it
        decoder = getattr(model, "get_base_model", lambda: model)().base_model
        self._hook = decoder.register_forward_hook(self._keep)

    def watches(self, model: Any) -> bool:
        """Whether the model gives scores of as many experts as it says: tried on two tokens; else it is left alone."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
                model(input_ids=ids, use_cache=False, output_router_logits=True)
        except (TypeError, ValueError, RuntimeError, IndexError):
            self._given = ()
        finally:
            model.train(was_training)
        self.num_layers = len(self._given)
        known = self.num_layers > 0 and all(g.shape == (2, self.num_experts) for g in self._given)
        self.restart()
        if not known:
            self._hook.remove()
        return known

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._given = tuple(getattr(output, "router_logits", None) or ())

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

        given = self._given
        self.add(self.chosen(real_P))
        with torch.set_grad_enabled(self.coefficient != 0 and torch.is_grad_enabled()):
            loss = load_balancing_loss_func(given, self.num_experts, self.top_k, real_P)  # type: ignore[arg-type]
        assert isinstance(loss, Tensor)  # it is a number only where nothing is given
        return loss

    @torch.no_grad()
    def chosen(self, real_P: Tensor | None) -> Tensor:
        """Return what the forward pass at hand chose, for ``add``; see ``balance_loss``."""
        given, self._given = self._given, ()
        real_P = torch.ones_like(given[0][:, 0]) if real_P is None else real_P
        weights_P, layers = real_P.float(), []
        for logits_PE in given:  # one after the other: all at once would be many copies of them
            logps_PE = logits_PE.float().log_softmax(-1)
            entropy = (-(logps_PE.exp() * logps_PE).sum(-1) * weights_P).sum()
            chosen = logits_PE.topk(self.top_k, dim=-1).indices.flatten()
            counts_E = torch.zeros(self.num_experts, device=weights_P.device)
            counts_E.scatter_add_(0, chosen, weights_P.repeat_interleave(self.top_k))
            layers.append(torch.cat([counts_E, torch.stack([entropy, weights_P.sum()])]))
        return torch.stack(layers)

    def add(self, chosen_LF: Tensor) -> None:
        """Count what a forward pass chose; takes no memory."""
        if self._counted_LF is None:
            self._counted_LF = chosen_LF
        else:
            self._counted_LF += chosen_LF

    def figures(self, device: torch.device, world_size: int) -> dict[str, Tensor]:
        """Return what was counted since ``restart``, over all ranks, per layer; to be asked for on every rank.

        Args:
            device: Where ranks meet; a rank may have had no rows.
            world_size: Number of ranks.

        Returns:
            ``load_00``: tokens of the expert that got most over the mean, from 1 (even) up to the number of experts.
            ``load``: the same of all layers together, which is what the balance loss evens out.
            ``entropy_00``: of a token's choice, the mean, in nats, from 0 (sure) to the log of that number.
        """
        counted_LF = self._counted_LF
        if counted_LF is None:
            counted_LF = torch.zeros(self.num_layers, self.num_experts + 2, device=device)
        counted_LF = sum_over_ranks(counted_LF, device, world_size).cpu()
        counts_LE, entropy_L, num_tokens_L = counted_LF.split([self.num_experts, 1, 1], dim=1)
        figures = {
            "load": counts_LE.max(1).values / counts_LE.mean(1),
            "entropy": (entropy_L / num_tokens_L).squeeze(1),
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
    if not known or _num_experts(config) < 2:
        return None
    parts = {part for n, p in model.named_parameters() if p.requires_grad for part in n.split(".")}
    coefficient = float(config.router_aux_loss_coef or 0.0) if parts & ROUTER_NAMES else 0.0
    routers = Routers(model, coefficient)
    return routers if routers.watches(model) else None


def _num_experts(config: Any) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)
