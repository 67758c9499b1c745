"""``export``: what a run trained as a Hugging Face folder for others: full weights, or the adapter alone."""

import logging
import shutil
from pathlib import Path

from fine_tune.commands.model_folder import ModelFolder, finish, start_folder
from fine_tune.modules.run_identity import IDENTITY_FILE
from fine_tune.runs.checkpoint import MANIFEST, TRAINING_STATE
from fine_tune.runs.find import find_run
from fine_tune.trained_model import trained_model

log = logging.getLogger("fine_tune")
OURS = (TRAINING_STATE, MANIFEST, IDENTITY_FILE)


def export(run: str, output: str | None = None, checkpoint: str = "best", root: str = ".") -> None:
    """Write what a run trained as a Hugging Face folder: weights or adapter, tokenizer, template, model card.

    Args:
        run: A run folder, a run's name (its newest version), or name/version_N.
        output: The folder to write; it must not exist. None: ``exported`` in the run folder.
        checkpoint: ``best`` or ``last``.
        root: Folder that holds ``lightning_logs``.

    Raises:
        UserError: No such run or whole checkpoint, or the folder exists.
    """
    trained = trained_model(find_run(run, Path(root)), checkpoint)
    target = Path(output) if output is not None else trained.run.path / "exported"
    folder = ModelFolder(trained)
    with start_folder(target) as unfinished:
        for file in trained.checkpoint.iterdir():
            if file.name not in OURS and file.is_file():
                shutil.copyfile(file, unfinished / file.name)  # with the permissions of a new file
        finish(unfinished, folder)
    for line in folder.next_commands(target):
        log.info(line)
