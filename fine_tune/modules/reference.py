"""The reference: the model as it was before the run's first step, without dropout and without a second one in memory.

New adapters are switched off; any other trained weights are put back to where they began, for as long as it takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor

from fine_tune import saved_adapters
from fine_tune.batches import PreferenceBatch
from fine_tune.modules.pair_logps import pair_logps
from fine_tune.modules.seeding import seed_all
from fine_tune.modules.weights import load_weights
from fine_tune.shards import is_sharded, own_part, sharded_like

if TYPE_CHECKING:
    from fine_tune.modules.dpo import DPO


class Reference(Protocol):
    """Where the log-probabilities of answers under the reference come from."""

    def prepare(self, split: str) -> None:
        """Be ready for the pairs of a split."""

    def of(self, batch: PreferenceBatch, ld_alpha: float) -> Tensor:
        """Return the log-probabilities of both answers of each pair, ``[B, 2]``."""


class LiveReference:
    """Compute the reference's log-probabilities at every step; trained weights are held twice, adapters are not.

    Args:
        module: The policy.
    """

    def __init__(self, module: "DPO") -> None:
        self.module = module
        self._start = None if starts_as_base(module) else starting_weights(module)

    def prepare(self, split: str) -> None:
        """Nothing is computed beforehand."""

    def of(self, batch: PreferenceBatch, ld_alpha: float) -> Tensor:
        """Return the log-probabilities of both answers of each pair, ``[B, 2]``."""
        module = self.module
        with torch.no_grad(), reference_model(module, self._start) as model:
            return pair_logps(model, batch, shared=module.shares_prefix).weighted(ld_alpha)


@contextmanager
def reference_model(module: "DPO", start: dict[str, Tensor] | None = None) -> Iterator[Any]:
    """Give the model as it was before the run's first step, in evaluation mode.

    Args:
        module: The policy; it is as before afterwards.
        start: What ``starting_weights`` gave, where it is at hand.
    """
    policy: Any = module.model
    modes = {part: part.training for part in policy.modules()}
    policy.eval()
    try:
        if starts_as_base(module):
            with policy.disable_adapter():
                yield policy
        elif start is None and _is_at_start(module):
            yield policy
        else:
            with _put_in(policy, start or starting_weights(module)):
                yield policy
    finally:
        for part, training in modes.items():
            part.training = training


def starting_weights(module: "DPO") -> dict[str, Tensor]:
    """Return what is trained, as it was before the run's first step, by name.

    Args:
        module: The policy, wherever it stands; of a resumed run the weights it began with are read again.
    """
    policy: Any = module.model
    settings = module.model_settings
    if is_sharded(policy):
        policy.reshard()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if _is_at_start(module):
        return _copies(trained)
    if settings.continued_adapter is not None:
        now = _copies(trained)
        saved_adapters.go_on_with_adapter(policy, Path(settings.continued_adapter))
        start = _copies(trained)
        for name, parameter in trained.items():
            parameter.data.copy_(now[name])
        return start
    seed_all(module.seed, "weights")
    whole = load_weights(settings, module.tokenizer, str(module.trainer.precision))
    started = dict(whole.named_parameters())
    return {name: started[name].detach().to(module.device) for name in trained}


def _is_at_start(module: "DPO") -> bool:
    trainer = module.trainer
    return trainer.state.fn == "fit" and trainer.ckpt_path is None and trainer.global_step == 0


def starts_as_base(module: "DPO") -> bool:
    """Whether the policy began as its base: by new adapters whose B is zero, and not by PiSSA, LoftQ and the like."""
    settings = module.model_settings
    if not isinstance(module.model, PeftModel) or settings.continued_adapter is not None:
        return False
    return str(getattr(settings.lora, "init_lora_weights", True)).lower() in ("true", "gaussian")


@contextmanager
def _put_in(model: torch.nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    if is_sharded(model):
        with _copied_in(model, weights):
            yield
        return
    now = {n: (p, p.data) for n, p in model.named_parameters() if p.requires_grad}
    for name, (parameter, data) in now.items():
        parameter.data = weights[name].to(data.dtype)
    try:
        yield
    finally:
        for parameter, data in now.values():
            parameter.data = data


@contextmanager
def _copied_in(model: Any, weights: dict[str, Tensor]) -> Iterator[None]:
    """The same where a rank has but a part of each weight, in memory that FSDP2 knows."""
    model.reshard()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    now = {name: own_part(p.detach()).clone() for name, p in trained.items()}
    for name, parameter in trained.items():
        own_part(parameter.detach()).copy_(own_part(sharded_like(weights[name], parameter)))
    try:
        yield
    finally:
        model.reshard()  # what lies outside the blocks stays whole after a pass
        for name, parameter in trained.items():
            own_part(parameter.detach()).copy_(now[name])


def _copies(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
