"""A file of results that appears whole: what is done is kept beside it meanwhile, and a killed command goes on there.

Beside ``out.jsonl`` lie ``out.jsonl.record.json`` (what the results are made from, compared before going on) and, until
all rows are done, ``out.jsonl.unfinished`` (a line per row, in the order they ended).
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from fine_tune.errors import UserError

KEY = "output"


class OutputFile:
    """Results of rows, kept one by one.

    Args:
        path: The file that all results come to lie in.
        identity: What they are made from, as plain values; results of another identity are never mixed in.
        overwrite: Replace what lies there, but go on with what such a command left unfinished.

    Raises:
        UserError: The folder is missing, another process writes there, or something else than this command's own
            results lies there.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        self.path = path
        self.record = path.with_name(f"{path.name}.record.json")
        self.unfinished = path.with_name(f"{path.name}.unfinished")
        self.identity = json.loads(json.dumps(identity))
        self.results: dict[int, dict[str, Any]] = {}
        self._handle: IO[str] | None = None
        self.is_finished = False
        self._was_there = path.exists()
        if not overwrite or self._goes_on():
            self._look_at_what_is_there()
        else:
            self._lock()  # nobody else is at it
            self.close()
            for file in (self.unfinished, self.record):
                file.unlink(missing_ok=True)

    def _goes_on(self) -> bool:
        record = self._read_record() if self.unfinished.exists() else None
        return record is not None and record["identity"] == self.identity

    def _look_at_what_is_there(self) -> None:
        there = [file for file in (self.path, self.unfinished) if file.exists()]
        if not there:
            return
        how = "give another --output, or replace it by --overwrite true"
        record = self._read_record()
        if record is None and there == [self.unfinished] and not self.unfinished.stat().st_size:
            return  # of a process that was killed before it said what it makes
        if record is None:
            raise UserError(
                f"{KEY}: '{there[0]}' is there already, and nothing says what it is made from; {how}"
            )
        then = record["identity"]
        changed = [k for k in {**then, **self.identity} if then.get(k) != self.identity.get(k)]
        if changed:
            listed = [
                f"{KEY}: {key}: what lies there was made with {_shown(then.get(key))}, now it is "
                f"{_shown(self.identity.get(key))}"
                for key in changed
            ]
            raise UserError(*listed, f"{KEY}: '{there[0]}' holds other results; {how}")
        self.is_finished = self.unfinished not in there
        if not self.is_finished:
            self._lock()
            self.results = self._read_unfinished()

    def open(self) -> None:
        """Say what the results are made from, and get ready to keep them.

        Raises:
            UserError: Another process writes there or did meanwhile, or it cannot be written.
        """
        try:
            if self._handle is None:
                self._lock(create=True)
            assert self._handle is not None
            if self.path.exists() and not self._was_there:
                self.unfinished.unlink(missing_ok=True)
                self.close()
                raise UserError(
                    f"{KEY}: '{self.path}' was written meanwhile by another process; give another --output"
                )
            _write_whole(self.record, [json.dumps({"identity": self.identity}, indent=1) + "\n"])
            end = self._handle.seek(0, os.SEEK_END)
            if end and not self.unfinished.read_bytes().endswith(b"\n"):
                self._handle.write("\n")  # what a kill cut off stays alone on its line
        except OSError as error:
            raise UserError(
                f"{KEY}: '{self.path}' cannot be written: {error.strerror}; give another file"
            ) from error

    def keep(self, row: int, result: dict[str, Any]) -> None:
        """Keep the result of a row, so that it outlives this process.

        Raises:
            UserError: It cannot be written.
        """
        assert self._handle is not None, "open() comes first"
        self.results[row] = result
        try:
            self._handle.write(json.dumps({"row": row, **result}, ensure_ascii=False) + "\n")
            self._handle.flush()
        except OSError as error:
            raise UserError(
                f"{KEY}: '{self.unfinished}' cannot be written: {error.strerror}; the {len(self.results) - 1:,} rows "
                "before are kept: once there is room, the same command goes on"
            ) from error

    def finish(self, num_rows: int, line: Callable[[int, dict[str, Any]], str]) -> None:
        """Put all results in order into the file, which appears whole.

        Args:
            num_rows: How many there have to be.
            line: Writes a row with its result.
        """
        assert len(self.results) == num_rows, "every row has its result"
        try:
            lines = (line(row, self.results[row]) + "\n" for row in range(num_rows))
            _write_whole(self.path, lines)
        except OSError as error:
            raise UserError(
                f"{KEY}: '{self.path}' cannot be written: {error.strerror}; all rows are kept in '{self.unfinished}': "
                "the same command goes on"
            ) from error
        self.unfinished.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let others write there."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _lock(self, *, create: bool = False) -> None:
        if not create and not self.unfinished.exists():
            return
        handle = open(self.unfinished, "a+", encoding="utf-8")  # noqa: SIM115  (held until close)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise UserError(
                f"{KEY}: another process is writing '{self.unfinished}'; wait for it, or give another --output"
            ) from None
        self._handle = handle

    def _read_record(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self.record.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and "identity" in record else None

    def _read_unfinished(self) -> dict[int, dict[str, Any]]:
        results = {}
        for line in self.unfinished.read_bytes().splitlines():
            try:
                result = json.loads(line)
                results[int(result.pop("row"))] = result
            except (ValueError, AttributeError, KeyError):  # cut off by a kill
                continue
        return results


def output_problems(output: str | None, rows: str | None) -> list[str]:
    """Say what is wrong with where results are to go.

    Args:
        output: What the user gave.
        rows: The file that is read, if one is named.
    """
    if output is None:
        return [f"{KEY}: none given; say where the results go, like --output predictions.jsonl"]
    path = Path(output)
    if path.suffix != ".jsonl":
        return [f"{KEY}: '{output}': results are written as .jsonl; give a file of that name"]
    if path.is_dir():
        return [f"{KEY}: '{output}' is a folder; give a file"]
    if not path.absolute().parent.is_dir():
        return [f"{KEY}: the folder '{path.parent}' does not exist; make it, or give another file"]
    if not os.access(path.absolute().parent, os.W_OK):
        return [f"{KEY}: the folder '{path.parent}' cannot be written; give another file"]
    if rows is not None and Path(rows).exists() and path.resolve() == Path(rows).resolve():
        return [f"{KEY}: '{output}' is the file that is read; give another"]
    return []


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    unwhole = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        _write_lines(unwhole, lines)
        unwhole.replace(path)
    finally:
        unwhole.unlink(missing_ok=True)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as handle:
        handle.writelines(lines)
        handle.flush()
        os.fsync(handle.fileno())


def _shown(value: Any) -> str:
    text = str(value)
    return "nothing" if value is None else text if len(text) <= 120 else f"{text[:117]}..."
