"""Run many command lines, each in a process of its own that may kill itself, and pay the imports once.

Reads a list of argument lists as JSON from the standard input; prints the exit codes (-9: killed) as JSON.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path


def run_all(command_lines: list[list[str]], timeout: float = 1000) -> list[int]:
    """Run these in order, in forks of one fresh process; return their exit codes."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(command_lines),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def _run_in_fork(args: list[str]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(2, 1)
            from fine_tune.__main__ import main

            code = main(args)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import fine_tune.cli  # noqa: F401  the imports that all forks share

    print(json.dumps([_run_in_fork(args) for args in json.loads(sys.stdin.read())]))
