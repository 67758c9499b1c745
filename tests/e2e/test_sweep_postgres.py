"""Workers on one real PostgreSQL: one of them killed, the server away for a while."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from test_sweep import runs_of, start, sweep_file, wait_for

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BINARIES, reason="needs Debian's package postgresql"),
]


class Server:
    """A PostgreSQL of its own; it does not run as root, so its folder belongs to its own user."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sweep_postgres_"))
        self.user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.user:
            shutil.chown(self.folder, "postgres", "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._do("initdb", "-D", self.data, "-U", "me", "-A", "trust", "--no-sync")

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    @property
    def url(self) -> str:
        return f"postgresql://me@127.0.0.1:{self.port}/postgres"

    def _do(self, program: str, *args: str) -> None:
        command = [*self.user, str(BINARIES[-1] / program), *args]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        log = str(self.folder / "log")
        self._do("pg_ctl", "-D", self.data, "-l", log, "-w", "-o", options, "start")

    def stop(self) -> None:
        self._do("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.folder)


@pytest.mark.timeout(900)
def test_two_workers_one_killed_and_the_server_away(
    server: Server, fit_args: list[str], tmp_path: Path
) -> None:
    file = sweep_file(tmp_path, "[1e-3, 2e-3, 3e-3, 4e-3, 5e-3]")
    args = ["--sweep", str(file), "--storage", server.url, "--grace_seconds", "10", *fit_args]
    args += ["--data.epochs", "20"]
    workers = [start(tmp_path, args) for _ in range(2)]
    wait_for(lambda: len(runs_of(tmp_path)) >= 2)
    workers[0].send_signal(signal.SIGKILL)
    wait_for(lambda: len(runs_of(tmp_path)) >= 3)
    server.stop()
    time.sleep(5)
    server.start()
    out, _ = workers[1].communicate(timeout=800)
    assert workers[1].returncode == 0, out
    assert "Traceback" not in out
    study = optuna.load_study(
        study_name="rates", storage=server.url.replace("postgresql", "postgresql+psycopg")
    )
    done = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert sorted(t.params["model.optimizer.lr"] for t in done) == [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]
    assert len(runs_of(tmp_path)) == 5
    assert all(len(versions) == 1 for versions in runs_of(tmp_path).values())
