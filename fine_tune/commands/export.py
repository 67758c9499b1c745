"""``export``: what a run trained as a Hugging Face folder for others: full weights, or the adapter alone."""

import logging
import shutil
from contextlib import chdir
from pathlib import Path

from fine_tune.commands.model_folder import ModelFolder, finish, start_folder
from fine_tune.errors import UserError
from fine_tune.model_config import adapter_base, resolve_source
from fine_tune.printable import printable
from fine_tune.runs.checkpoint import TRAINING_STATE, read_manifest
from fine_tune.runs.find import find_run
from fine_tune.runs.identity import IDENTITY_FILE, MANIFEST
from fine_tune.trained_model import TrainedModel, trained_model

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
    if trained.trains_adapter:
        _check_base(trained)
    target = Path(output) if output is not None else trained.run.path / "exported"
    folder = ModelFolder(trained)
    with start_folder(target) as unfinished:
        for name in read_manifest(trained.checkpoint)["sha256"]:
            file = trained.checkpoint / name
            if name not in OURS and not file.is_symlink():
                shutil.copyfile(file, unfinished / file.name)  # with the permissions of a new file
        finish(unfinished, folder)
    for line in folder.next_commands(target):
        log.info("%s", printable(line))


def _check_base(trained: TrainedModel) -> None:
    """Refuse an adapter that was trained on another one: peft would put it on the base alone.

    Raises:
        UserError: Says what can be done.
    """
    try:
        trained.settings.take_stored(trained.model_config())
        with chdir(trained.directory):
            name = trained.settings.base[0]
            base, _ = resolve_source("model.model_name_or_path", str(name))
    except UserError as error:
        log.info("WARNING: its base is not looked at: %s", "; ".join(error.problems))
        return
    if adapter_base(base) is not None:
        raise UserError(
            f"run: the adapter of {trained.run.name} was trained on a base with another adapter merged into it "
            f"({name}), which peft would leave out; python -m fine_tune merge writes the whole model"
        )
