"""No run is written through a link inside the run root: it would write where nobody looks for a run."""

import os
from pathlib import Path

from fine_tune.errors import UserError
from fine_tune.runs.run_folder import LOGS, RunFolder


def refuse_links(named: Path, run: RunFolder | None) -> None:
    """Refuse a run of which a folder is a link; ``lightning_logs`` itself may be one, to a large disk.

    Args:
        named: ``lightning_logs/<name>``; of a run copied to elsewhere, whatever it lies in.
        run: The version to go on in; None: a new one.

    Raises:
        UserError: Says which one, and where it leads.
    """
    folders = [run.checkpoints, run.path / "rows"] if run is not None else []
    if named.parent.name == LOGS:
        folders = [named, *([run.path] if run is not None else []), *folders]
    for folder in folders:
        if folder.is_symlink():
            raise UserError(
                f"run folder: '{folder}' is a link to '{os.readlink(folder)}', and no run is written through a link; "
                "put the folder itself there, take another --name, or set trainer.default_root_dir to where runs "
                "shall lie"
            )
