"""What a job of SLURM is told and asks for: its id, whether it was started again, and to be started again."""

import logging
import os
import subprocess
from typing import Any

log = logging.getLogger("fine_tune")


def job_id() -> str | None:
    """Return the id that stays the same when SLURM starts a job again (of an array: with its task)."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def was_requeued() -> bool:
    """Whether this is not the first start of the job."""
    return job_id() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def requeue(trainer: Any) -> None:
    """Ask SLURM to start this job again, where Lightning would: under ``srun``, unless ``auto_requeue`` is off."""
    from lightning.fabric.plugins.environments import SLURMEnvironment  # a second to import

    environment, job = trainer._accelerator_connector.cluster_environment, job_id()
    if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue and job):
        return
    try:
        answer = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False
        )
        told = answer.stderr.strip() if answer.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        told = str(error)
    log.info("SLURM: job %s is queued again" if not told else f"SLURM: %s: {told}", job)
