"""Data workers end with the run, whatever ended it."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import sys
    from fine_tune.data.row_loader import RowLoader

    def row(batch):
        if sys.argv[1] == "worker" and batch == [5]:
            raise ValueError("row 5 is broken")
        return batch

    def iterate():
        batches = iter(RowLoader(range(100), batch_size=1, collate_fn=row, num_workers=2))
        for batch in batches:
            if sys.argv[1] == "process" and batch == [5]:
                raise ValueError("row 5 is broken")  # the traceback holds ``batches``

    iterate()
"""


@pytest.mark.parametrize("where", ["worker", "process"])
def test_an_error_ends_the_process_although_its_workers_ignore_sigterm(where: str) -> None:
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), where]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "ValueError: row 5 is broken" in ended.stderr
