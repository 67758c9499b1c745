"""Where a run's weights come from: its parents and theirs, with the data of each, down to hashes.

A run keeps a copy of what its parents were: the chain stands though one of them is deleted.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_tune.errors import UserError
from fine_tune.runs.identity import IDENTITY_FILE, MANIFEST, identity_hash
from fine_tune.runs.run_folder import RECORD, RunFolder

# In a folder written by export or merge: the run it comes from. Beside a tokenizer: what it was trained on.
ORIGIN_FILE, TOKENIZER_ORIGIN = "fine_tune_origin.json", "tokenizer_origin.json"
TOKENIZER = "tokenizer.json"
SHOWN_HASH, MOST_FILES = 12, 8


@dataclass(frozen=True)
class Ancestor:
    """A run in a chain.

    Args:
        run: Its folder.
        gave: What its child took of it: ``weights`` or ``training state``; empty for the run that was asked for.
        checkpoint: The one that was taken.
        state: ``there``; ``checkpoint gone``; ``gone``; ``damaged``; ``another run``, with other settings.
        origin: What it was: see ``origin_of``.
        parents: Whom it took its weights from.
    """

    run: str
    gave: str
    checkpoint: str
    state: str
    origin: dict[str, Any]
    parents: list["Ancestor"]

    def chain(self, depth: int = 0) -> Iterator[tuple[int, "Ancestor"]]:
        """Give it and all before it, each with its distance."""
        yield depth, self
        for parent in self.parents:
            yield from parent.chain(depth + 1)


def origin_of(record: dict[str, Any], identity: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what is kept of a run by its children: what was trained on what, and its own parents.

    Args:
        record: Its ``run.json``.
        identity: What it was at a checkpoint; None: what its record says.
    """
    found = record.get("identity") if identity is None else identity
    identity = found if isinstance(found, dict) else {}
    return {
        "identity_hash": identity_hash(identity) if identity else None,
        "task": str(identity.get("model", "")).rpartition(".")[2],
        "weights": identity.get("model.weights"),
        "files": identity.get("data.files") or [],
        "training_rows": identity.get("data.training_rows"),
        "tokenizer": identity.get("model.tokenizer"),
        "tokenizer_origin": record.get("tokenizer_origin"),
        "parents": record.get("parents") or [],
    }


def ancestry(folder: Path, record: dict[str, Any]) -> Ancestor:
    """Follow a run back to the first one.

    Args:
        folder: The run's.
        record: Its ``run.json``.
    """
    origin = origin_of(record)
    return Ancestor(str(folder), "", "", "there", origin, _parents(origin, {str(folder)}))


def parent_of(gave: str, path: Path) -> dict[str, Any] | None:
    """Describe the run that a checkpoint, a run's folder or a written model folder belongs to, for its child's record.

    Returns:
        None of a folder that no run is known of.
    """
    place = path.resolve()
    written = _read_json(place / ORIGIN_FILE)
    if written is not None and "run" in written:
        run = (place / str(written["run"])).resolve()
        known = run if (run / RECORD).is_file() else written["run"]  # by name alone, from elsewhere
        return {**written, "gave": gave, "run": str(known)}
    if (place / RECORD).is_file():  # a run's folder stands for its best checkpoint
        place = RunFolder(place).checkpoint("best") or place
    folder = next((p for p in (place, *place.parents) if (p / MANIFEST).is_file()), None)
    if folder is None:
        return None
    run = folder.parent.parent
    origin = origin_of(_record(run), _read_json(folder / IDENTITY_FILE))
    return {
        "gave": gave,
        "run": str(run),
        "checkpoint": folder.name,
        "identity_hash": origin["identity_hash"],
        "origin": origin,
    }


def to_share(parent: dict[str, Any], target: Path) -> dict[str, Any]:
    """Return what ``parent_of`` says for a folder that others may get: names of runs and files, and not their places.

    Where the folder lies beside ``lightning_logs`` or in it, the way from it to the run is kept: it names nothing else.
    """
    run, folder = Path(parent["run"]), target.resolve()
    inside = folder.is_relative_to(run.parents[2])
    place = os.path.relpath(run, folder) if inside else "/".join(run.parts[-2:])
    return {**parent, "run": place, "origin": _without_places(parent["origin"])}


def _without_places(origin: dict[str, Any]) -> dict[str, Any]:
    parents = []
    for parent in _dicts(origin.get("parents")):
        name = "/".join(Path(str(parent.get("run"))).parts[-2:])
        of_parent = parent.get("origin")
        known = {"origin": _without_places(of_parent)} if isinstance(of_parent, dict) else {}
        parents.append({**parent, "run": name, **known})
    files = [{**file, "file": Path(str(file.get("file"))).name} for file in _dicts(origin["files"])]
    return {**origin, "files": files, "parents": parents}


def lines_of(ancestor: Ancestor) -> list[str]:
    """Say in lines what an ancestor was: name and state, then its data, tokenizer and first weights."""
    folder, origin = Path(ancestor.run), ancestor.origin
    name = f"{folder.parent.name}/{folder.name}"
    checkpoint = f", {ancestor.gave} of {ancestor.checkpoint}" if ancestor.gave else ""
    state = "" if ancestor.state == "there" else f" ({ancestor.state}: {ancestor.run})"
    lines = [f"{name}: {origin.get('task') or 'nothing is known of it'}{checkpoint}{state}"]
    files = _dicts(origin.get("files"))
    lines += [f"  data {_file(file)}" for file in files[:MOST_FILES]]
    lines += [f"  data ... and {len(files) - MOST_FILES:,} files more"] * (len(files) > MOST_FILES)
    if origin.get("training_rows"):
        lines.append(f"  training rows {_short(origin['training_rows'])}")
    if origin.get("tokenizer"):
        trained = origin.get("tokenizer_origin")
        trained = trained if isinstance(trained, dict) else {}
        lines.append(f"  tokenizer {_short(origin['tokenizer'])}{_trained_on(trained)}")
    if origin.get("weights") and not ancestor.parents:
        lines.append(f"  from weights {_short(origin['weights'])}")
    return lines


def read_tokenizer_origin(folder: str | None) -> dict[str, Any] | None:
    """Return what a tokenizer's folder says it was trained on, unless another tokenizer lies there by now."""
    if folder is None or not (Path(folder) / TOKENIZER).is_file():
        return None
    origin = _read_json(Path(folder) / TOKENIZER_ORIGIN)
    return (
        origin if origin and origin.get("content") == file_hash(Path(folder) / TOKENIZER) else None
    )


def write_tokenizer_origin(folder: Path, files: list[Path], **facts: Any) -> None:
    """Write beside a tokenizer what it was trained on: names of files and their SHA-256."""
    told = [{"file": file.name, "content": file_hash(file)} for file in files]
    origin = {**facts, "content": file_hash(folder / TOKENIZER), "files": told}
    text = json.dumps(origin, indent=1, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_ORIGIN).write_text(text, "utf-8")


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_json(file: Path) -> dict[str, Any] | None:
    """Return the mapping of a file; None where there is none: where a run comes from stops no run."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _parents(origin: dict[str, Any], seen: set[str]) -> list[Ancestor]:
    known = _dicts(origin.get("parents"))
    return [_parent(parent, seen) for parent in known if str(parent.get("run")) not in seen]


def _dicts(values: Any) -> list[dict[str, Any]]:
    """Return the entries of a record that are of the right type: a report is made of damaged ones, too."""
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _parent(known: dict[str, Any], seen: set[str]) -> Ancestor:
    run, checkpoint = Path(str(known.get("run"))), str(known.get("checkpoint"))
    origin = known["origin"] if isinstance(known.get("origin"), dict) else {}
    folder, state = run / "checkpoints" / checkpoint, "gone"
    if (run / RECORD).is_file():
        record, then = _record(run), _read_json(folder / IDENTITY_FILE)
        now = origin_of(record, then) if record else None
        is_same = now is not None and now["identity_hash"] == known.get("identity_hash")
        state = "there" if folder.is_dir() else "checkpoint gone"
        state = "damaged" if now is None else state if is_same or then is None else "another run"
        origin = now if now is not None and (is_same or not origin) else origin
    parents = _parents(origin, seen | {str(run)})
    return Ancestor(str(run), str(known.get("gave")), checkpoint, state, origin, parents)


def _record(run: Path) -> dict[str, Any]:
    try:
        return RunFolder(run).read()
    except UserError:  # damaged; its child is not to blame
        return {}


def _file(file: dict[str, Any]) -> str:
    split = "" if file.get("split") in (None, "all") else f" ({file['split']})"
    return f"{file.get('file')}{split} {_short(file.get('content'))}"


def _trained_on(trained: dict[str, Any]) -> str:
    shown = ", ".join(_file(file) for file in _dicts(trained.get("files"))[:MOST_FILES])
    return f": {trained.get('kind')} of {trained.get('vocab_size')} from {shown}" if shown else ""


def _short(content: Any) -> str:
    text = str(content)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"SHA-256 {text[:SHOWN_HASH]}" if is_hash else text
