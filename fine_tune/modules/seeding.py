"""Random numbers as a function of the step."""

import hashlib
import random

import numpy as np
import torch


def seed_all(*parts: object) -> None:
    """Seed python, numpy and torch from the given values, the same way on every machine.

    Called at every step with (seed, step, rank), random numbers are a function of the step, so nothing of a generator
    has to be saved and nothing that runs in between (validation, generation) disturbs them.
    """
    value = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
