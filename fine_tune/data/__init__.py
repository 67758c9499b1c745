"""Data modules, by the names users type."""

from fine_tune.data.datamodules import PreferenceData, SFTData
from fine_tune.data.text_data import TextData

__all__ = ["PreferenceData", "SFTData", "TextData"]
