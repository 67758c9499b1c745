"""``--trainer.strategy fsdp2``: weights, gradients and optimizer state cut over the devices, by PyTorch's FSDP2."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

from fine_tune.shards import is_sharded, shard, sharded_optimizer_state, whole_state

log = logging.getLogger("fine_tune")
FSDP2 = "fsdp2"


class FullyShard(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with everything else as under any other strategy.

    The module loads its weights, a checkpoint's too, before they are cut; checkpoints are gathered, and go through the
    same plugin, so that any number of devices reads them.
    """

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup(self, trainer: Trainer) -> None:
        module: Any = self.lightning_module
        if self.world_size > 1 and not is_sharded(module.model):  # one device has all there is
            shard(module.model, module.blocks, self.device_mesh["data_parallel"])
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the sharded state: the module chooses of it, and ``whole`` makes that whole."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return dict(whole_state(optimizer.state_dict(), keep=self.is_global_zero))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(sharded_optimizer_state(optimizer, state))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)


def strategy_problems(strategy: Any, precision: Any, model: Any, optimizer: str) -> list[str]:
    """Say what a strategy cannot do, before anything loads.

    Args:
        strategy: The trainer's.
        precision: The trainer's.
        model: The module.
        optimizer: The class path of its optimizer.
    """
    name = str(strategy)
    if name.startswith("deepspeed"):
        log.info(
            "WARNING: trainer.strategy %s is handed to Lightning as it is, and not tested", name
        )
    if name != FSDP2:
        return []
    problems = []
    if model.model_settings.quantized:
        problems.append(
            f"trainer.strategy: {FSDP2} cannot cut quantized weights; use ddp, under which each device holds them all"
        )
    if str(precision).startswith("16"):
        problems.append(
            f"trainer.precision: {precision} is not for {FSDP2}; use bf16-mixed or 32-true"
        )
    if optimizer.startswith("bitsandbytes"):
        problems.append(
            f"model.optimizer: {optimizer} cannot keep its state in parts, and {FSDP2} spreads that of any other; use "
            "torch.optim.AdamW"
        )
    return problems


def register() -> None:
    """Let ``--trainer.strategy`` know the name."""
    if FSDP2 not in StrategyRegistry:
        StrategyRegistry.register(FSDP2, FullyShard, description=FullyShard.__doc__)
