"""What a checkpoint says of the run that wrote it, and the name of that."""

import hashlib
import json
from pathlib import Path
from typing import Any

# In every checkpoint folder: the names and hashes of its files, and what the run is.
MANIFEST, IDENTITY_FILE = "manifest.json", "run_identity.json"


def read_identity(checkpoint: Path) -> dict[str, Any] | None:
    """Return what a checkpoint's run was, or None if it keeps no record of it."""
    file = checkpoint / IDENTITY_FILE
    return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else None


def write_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Keep what the run is in a checkpoint's folder."""
    text = json.dumps(identity, indent=1, ensure_ascii=False)
    (checkpoint / IDENTITY_FILE).write_text(text, "utf-8")


def identity_hash(identity: dict[str, Any]) -> str:
    """Name a run's identity in 16 characters."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
