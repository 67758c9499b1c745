"""How a command ends: exit codes, one line per mistake of the user's, the traceback of ours."""

import sys
from collections.abc import Callable
from typing import Any

from fine_tune.callbacks.stop_signals import Stopped, StopRequest
from fine_tune.errors import RunStopped, UserError, in_brief
from fine_tune.quiet import start_console, stop_tee
from fine_tune.runs.places import is_first_process

LOST = ("Connection closed by peer", "Connection reset by peer")  # gloo's words
LOST_RANK = (
    "another process of this run has ended: its own error says why; if it has none, it was killed"
)


def exit_code(run: Callable[[], Any], stop: StopRequest | None = None) -> int:
    """Run something for the user: 0, or 2 and one line per mistake of theirs; a defect of ours keeps its traceback.

    Args:
        run: What to run.
        stop: Listens for signals meanwhile; 143 or 130 if one ended it.
    """
    start_console()
    try:
        with stop or StopRequest():
            run()
    except Stopped as stopped:
        if is_first_process():
            print(f"stopped by {stopped}", file=sys.stderr)
        return stopped.exit_code
    except Exception as error:
        behind = user_error_behind(error)
        if behind is None and is_lost_rank(error):
            print(f"error: {LOST_RANK} ({in_brief(str(error))[:200]})", file=sys.stderr)
            _print_notes(error)
            return 1
        if behind is None:
            raise
        if isinstance(behind, RunStopped) and behind.on_all_ranks and not is_first_process():
            return 0  # the first one says it; a fault here makes the launcher kill it before it is done
        for problem in behind.problems:
            print(f"error: {problem}", file=sys.stderr)
        _print_notes(error)
        return 2
    finally:
        stop_tee()
    return 0


def _print_notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", []):
        print(note, file=sys.stderr)


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether another process of the run is gone: this one's traceback would only hide that one's error."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistBackendError) or any(w in str(error) for w in LOST)


def user_error_behind(error: BaseException | None) -> UserError | None:
    """Find the user's mistake that jsonargparse wrapped into an error of its own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
