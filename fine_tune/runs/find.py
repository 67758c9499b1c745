"""Find a run by what a user types: its folder, its name (the newest version), or name and version."""

import difflib
import os
from pathlib import Path

from fine_tune.errors import UserError
from fine_tune.runs.run_folder import LOGS, RECORD, RunFolder, versions


def find_run(name: str, root: Path) -> RunFolder:
    """Find a run by its folder, its name (the newest version) or its name and version.

    Args:
        name: What the user typed.
        root: Folder that holds ``lightning_logs``.

    Raises:
        UserError: There is none; the nearest names, or the versions there are.
    """
    logs = root / LOGS
    for folder in (Path(name), logs / name):
        if os.path.isfile(folder / RECORD):  # Path.is_file() raises of a name too long for one
            return RunFolder(folder)
    base, _, version = name.strip("/").removeprefix(f"{LOGS}/").partition("/")
    found = versions(root, base) if os.path.isdir(logs / base) else []
    of_version = [run for run in found if run.path.name in (version, f"version_{version}")]
    if found and (of_version or not version):
        return (of_version or found)[-1]
    if found:
        raise UserError(
            f"run: '{base}' has {', '.join(run.path.name for run in found)}, not {version}"
        )
    names = sorted(p.name for p in logs.glob("*") if list(p.glob(f"version_*/{RECORD}")))
    close = difflib.get_close_matches(base, names, n=3, cutoff=0.5) or names[:5]
    there = f"; there are {', '.join(close)}" if close else f"; there are no runs under {logs}"
    raise UserError(f"run: no run '{name}'{there}")
