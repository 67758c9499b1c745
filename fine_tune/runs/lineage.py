"""Where a run's weights come from: its parents and theirs, with the data of each, down to hashes.

A run keeps a copy of what its parents were: the chain stands though one of them is deleted.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_tune.errors import UserError
from fine_tune.runs.checkpoint import MANIFEST
from fine_tune.runs.run_folder import RECORD, RunFolder

# In a folder written by export or merge: the run it comes from. Beside a tokenizer: what it was trained on.
ORIGIN_FILE, TOKENIZER_ORIGIN = "fine_tune_origin.json", "tokenizer_origin.json"
SHOWN_HASH, MOST_FILES = 12, 8


@dataclass(frozen=True)
class Ancestor:
    """A run in a chain.

    Args:
        run: Its folder.
        gave: What its child took of it: ``weights`` or ``training state``; empty for the run that was asked for.
        checkpoint: The one that was taken.
        state: ``there``; ``checkpoint gone``; ``gone``; ``damaged``; ``changed since``: its settings are others now.
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


def origin_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a run by its children: what was trained on what, and its own parents."""
    identity = record.get("identity")
    identity = identity if isinstance(identity, dict) else {}
    return {
        "identity_hash": record.get("identity_hash"),
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
    if (place / ORIGIN_FILE).is_file():
        known = json.loads((place / ORIGIN_FILE).read_text("utf-8"))
        return {**known, "gave": gave, "run": str((place / known["run"]).resolve())}
    if (place / RECORD).is_file():  # a run's folder stands for its best checkpoint
        place = RunFolder(place).checkpoint("best") or place
    folder = next((p for p in (place, *place.parents) if (p / MANIFEST).is_file()), None)
    if folder is None:
        return None
    run = folder.parent.parent
    origin = _origin_now(run) or origin_of({})
    return {
        "gave": gave,
        "run": str(run),
        "checkpoint": folder.name,
        "identity_hash": origin["identity_hash"],
        "origin": origin,
    }


def to_share(parent: dict[str, Any], target: Path) -> dict[str, Any]:
    """Return what ``parent_of`` says without the places of this machine: the run's from the target, names of files."""
    run = os.path.relpath(parent["run"], target.resolve())
    return {**parent, "run": run, "origin": _without_places(parent["origin"])}


def _without_places(origin: dict[str, Any]) -> dict[str, Any]:
    def names(files: Any) -> list[Any]:
        return [{**file, "file": Path(str(file.get("file"))).name} for file in files or []]

    trained = origin.get("tokenizer_origin")
    parents = [
        {**p, "run": "/".join(Path(p["run"]).parts[-2:]), "origin": _without_places(p["origin"])}
        for p in origin["parents"]
        if "origin" in p
    ]
    shared = {**origin, "files": names(origin["files"]), "parents": parents}
    if trained:
        shared["tokenizer_origin"] = {**trained, "files": names(trained.get("files"))}
    return shared


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
    """Return what a tokenizer's folder says it was trained on."""
    file = Path(folder or "") / TOKENIZER_ORIGIN
    return dict(json.loads(file.read_text("utf-8"))) if folder and file.is_file() else None


def _parents(origin: dict[str, Any], seen: set[str]) -> list[Ancestor]:
    known = _dicts(origin.get("parents"))
    return [_parent(parent, seen) for parent in known if str(parent.get("run")) not in seen]


def _dicts(values: Any) -> list[dict[str, Any]]:
    """Return the entries of a record that are of the right type: a report is made of damaged ones, too."""
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _parent(known: dict[str, Any], seen: set[str]) -> Ancestor:
    run, checkpoint = Path(str(known.get("run"))), str(known.get("checkpoint"))
    origin = known["origin"] if isinstance(known.get("origin"), dict) else {}
    now, state = _origin_now(run), "damaged" if (run / RECORD).is_file() else "gone"
    if now is not None:
        is_same = now["identity_hash"] == known.get("identity_hash")
        is_there = (run / "checkpoints" / checkpoint).is_dir()
        state = "changed since" if not is_same else "there" if is_there else "checkpoint gone"
        origin = now if is_same or not origin else origin
    parents = _parents(origin, seen | {str(run)})
    return Ancestor(str(run), str(known.get("gave")), checkpoint, state, origin, parents)


def _origin_now(run: Path) -> dict[str, Any] | None:
    try:
        return origin_of(RunFolder(run).read()) if (run / RECORD).is_file() else None
    except UserError:  # its record is damaged; its child is not to blame
        return None


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
