"""All tests of this folder measure a CUDA device."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("measures a CUDA device, and there is none")
