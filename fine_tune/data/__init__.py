"""Data modules, by the names users type."""

from fine_tune.data.datamodules import SFTData

__all__ = ["SFTData"]
