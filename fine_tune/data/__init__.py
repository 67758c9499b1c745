"""Data modules, by the names users type."""

from fine_tune.data.datamodules import PreferenceData, SFTData

__all__ = ["PreferenceData", "SFTData"]
