"""``python fit_until_fault.py N VERB ...``: the command line, killed at the N-th file operation of its saves."""

import sys
from typing import Any

from file_faults import fault_at, kill

from fine_tune.runs import checkpoint_io

if __name__ == "__main__":
    write = checkpoint_io.FolderCheckpointIO._write
    with fault_at(int(sys.argv[1]), kill) as countdown:
        left, countdown.left = countdown.left, 0  # counts nothing but while a save is written

        def counted_write(*args: Any, **kwargs: Any) -> None:
            global left
            countdown.left = left
            write(*args, **kwargs)
            left, countdown.left = countdown.left, 0

        checkpoint_io.FolderCheckpointIO._write = counted_write  # type: ignore[method-assign]
        from fine_tune.__main__ import main

        sys.exit(main(sys.argv[2:]))
