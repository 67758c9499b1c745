"""Kill a save at its n-th file operation, for n = 1, 2 ... until one passes; one line of JSON per kill.

Run as ``python killed_saves.py FOLDER``. Each save happens in a fork, so that libraries are imported once.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from file_faults import fault_at, kill
from small_saves import save, step_of

from fine_tune.runs.checkpoint import remove_leftovers
from fine_tune.runs.run_folder import RunFolder
from fine_tune.runs.stored_checkpoints import newest_whole


def main(root: Path) -> None:
    save(RunFolder(root / "old"), 1)
    n, passed = 0, False
    while not passed:
        n += 1
        run = RunFolder(root / str(n))
        shutil.copytree(root / "old", run.path)
        child = os.fork()
        if child == 0:
            with fault_at(n, kill):
                save(run, 2)
            os._exit(0)
        passed = os.waitpid(child, 0)[1] == 0
        last, *_ = newest_whole(run, "last")
        best, *_ = newest_whole(run, "best")
        line = {"n": n, "passed": passed, "last": step_of(last), "best": step_of(best)}
        remove_leftovers(run.checkpoints)
        save(run, 3)  # the next start goes on
        line["then"] = step_of(newest_whole(run, "last")[0])
        line["hidden"] = [p.name for p in run.checkpoints.glob(".*")]
        print(json.dumps(line))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
