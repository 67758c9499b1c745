"""``lineage``: where a run's weights come from, run by run, back to the hashes of the data."""

from pathlib import Path

from rich.console import Console

from fine_tune.printable import printable
from fine_tune.runs.find import find_run
from fine_tune.runs.lineage import ancestry, lines_of


def lineage(run: str, root: str = ".") -> None:
    """Show where a run's weights come from: each run before it, its data, its tokenizer, their hashes.

    A run that is deleted is named, with what its child kept of it.

    Args:
        run: A run folder, a run's name (its newest version), or name/version_N.
        root: Folder that holds ``lightning_logs``.

    Raises:
        UserError: No such run, or its record is damaged.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    found = find_run(run, Path(root))
    for depth, ancestor in ancestry(found.path, found.read()).chain():
        for line in lines_of(ancestor):
            console.print(f"{'  ' * depth}{printable(line)}")
