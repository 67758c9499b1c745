"""LightningModules, by the names users type."""

from fine_tune.modules.dpo import DPO
from fine_tune.modules.pretrain import Pretrain
from fine_tune.modules.reward import Reward
from fine_tune.modules.sft import SFT

__all__ = ["DPO", "SFT", "Pretrain", "Reward"]
