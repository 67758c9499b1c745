"""How much memory a container or a batch job may use: the limits of Linux's control groups, both versions."""

from dataclasses import dataclass
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Files:
    """What one version of control groups calls things."""

    limit: str
    used: str
    reclaimable: str  # of memory.stat: of the files cached, what the system gives back when asked


V2 = Files("memory.max", "memory.current", "inactive_file")
V1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True)
class Limit:
    """Memory that processes share, in bytes.

    Args:
        total: What they may use.
        used: What they use of it, caches the system can give back not counted.
    """

    total: int
    used: int


def memory_limits() -> list[Limit]:
    """Return the limits that hold for this process: its group's, and those of the groups around it."""
    return [limit for folder, files in _groups() if (limit := _limit(folder, files)) is not None]


def _groups() -> list[tuple[Path, Files]]:
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # no Linux
        return []
    found: list[tuple[Path, Files]] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, files = ROOT, V2
        elif "memory" in controllers.split(","):
            root, files = ROOT / "memory", V1
        else:
            continue
        # inside a container the path may be the host's, and only the root is there
        group = root / path.lstrip("/")
        found += [(g, files) for g in (group, *group.parents) if g == root or root in g.parents]
    return found


def _limit(folder: Path, files: Files) -> Limit | None:
    try:
        total = int((folder / files.limit).read_text())  # "max" is no number
        used = int((folder / files.used).read_text())
    except (OSError, ValueError):
        return None
    return Limit(total, max(0, used - _reclaimable(folder, files.reclaimable)))


def _reclaimable(folder: Path, name: str) -> int:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(stat.get(name, 0))
    except (OSError, ValueError):
        return 0
