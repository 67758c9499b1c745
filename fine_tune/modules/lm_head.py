"""The LM head, run only where a token is predicted that counts; in chunks where its logits would fill the device.

Shape letters: B rows, T tokens, N predicted tokens, V vocabulary, D model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from fine_tune.losses import nll_per_token

SHARE_FOR_LOGITS = (
    16  # of a device's memory: logits that take more than one part in so many are chunked
)
AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@contextmanager
def head_at(model: Any, positions_N: Tensor) -> Iterator[None]:
    """Run the LM head only at these positions of the flattened ``[B * T]`` hidden states.

    The model's logits then have shape ``[1, N, V]``; whatever it does to them after the head is elementwise and stays.
    """

    def gather(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = inputs
        return (hidden_BTD.flatten(0, 1)[positions_N].unsqueeze(0), *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def nll_in_chunks(
    model: Any, inputs: dict[str, Any], positions_N: Tensor, targets_N: Tensor, at_once: int
) -> Tensor:
    """Return the negative log-likelihood of each target, ``[N]``, with the logits of ``at_once`` of them in memory.

    The backward pass computes them again. Only for models whose logits are what their head gives (``is_last``).
    """
    seen: list[Tensor] = []

    def keep(_: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = given
        seen.append(hidden_BTD.flatten(0, 1)[positions_N])
        return (hidden_BTD[:1, :1], *rest)

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(keep)
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()

    def nll(hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return nll_per_token(head(hidden_ND), targets_N)

    chunks = zip(seen[0].split(at_once), targets_N.split(at_once), strict=True)
    return torch.cat([checkpoint(nll, *chunk, use_reentrant=False) for chunk in chunks])


class LogitChunks:
    """Of how many tokens the logits may lie in memory.

    Args:
        config: The model's; some change their logits behind the head, and cannot be chunked. None for no limit.
        memory: Bytes of the device; None for no limit.
        checked: Whether nobody needs to try the model itself.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        memory: int | None = None,
        *,
        checked: bool = False,
    ) -> None:
        self.most: int | None = None
        self._checked = checked
        if config is None or memory is None:
            return
        text = config.get_text_config()
        if all(getattr(text, name, None) in (None, 1, 1.0) for name in AFTER_THE_HEAD):
            self.most = max(1, memory // SHARE_FOR_LOGITS // (4 * text.vocab_size))

    def at_once(self, model: Any, num_targets: int) -> int | None:
        """Return the tokens of a chunk; None where the logits of all ``num_targets`` fit, or cannot be chunked."""
        if self.most is None or num_targets <= self.most:
            return None
        if not self._checked:
            self._checked = True
            self.most = self.most if is_last(model) else None
        return self.most


def is_last(model: Any) -> bool:
    """Whether a model's logits are what its head gives: tried on two tokens."""
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, given: seen.append(given))
    try:
        with torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return len(seen) == 1 and torch.equal(seen[0].to(logits.dtype), logits)
