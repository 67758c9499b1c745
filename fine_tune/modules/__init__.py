"""LightningModules, by the names users type."""

from fine_tune.modules.sft import SFT

__all__ = ["SFT"]
