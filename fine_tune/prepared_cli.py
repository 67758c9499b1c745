"""The settings of fit taken as far as its data, for verbs that look at data and train nothing."""

from typing import Any

from fine_tune.batches import Choice
from fine_tune.callbacks.stop_signals import StopRequest
from fine_tune.settings_cli import SettingsCLI, run_cli
from fine_tune.trainer_settings import check_trainer


class PreparedCLI(SettingsCLI):
    """Parse, check and prepare the data as ``fit`` does, and stop before anything is claimed or loaded."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        check_trainer(self.settings.trainer)
        self.check_before_weights()

    def _take_what_fits(self) -> dict[str, Choice]:
        return {}  # ``plan`` says it for any memory

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing: the caller looks at ``plan``, ``datamodule``, ``model`` and ``chosen``."""


def prepare_as_fit(args: list[str]) -> PreparedCLI:
    """Take fit's flags as far as its data and its settings, without weights and without a run folder.

    Raises:
        UserError: What ``fit`` would refuse.
    """
    return run_cli(PreparedCLI, ["fit", *args], StopRequest())
