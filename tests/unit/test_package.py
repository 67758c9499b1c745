"""What is installed is what is in the repository."""

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_file_that_is_no_code_is_installed_with_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "fine_tune"
    installed = {
        path for glob in settings["package-data"]["fine_tune"] for path in package.glob(glob)
    }
    listed = subprocess.run(
        ["git", "ls-files", "fine_tune"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {ROOT / name for name in listed.stdout.splitlines() if not name.endswith(".py")}
    assert wanted
    assert wanted - installed == set()
