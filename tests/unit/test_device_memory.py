"""What counts as out of memory, and how much memory there is."""

import re

import pytest
import torch
from harness import REPOSITORY

from fine_tune.device_memory import MEMORY_ERRORS, is_out_of_memory

RAN_OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    MemoryError("Unable to allocate 8.00 GiB for an array"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]
OTHERS = [
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError(),
    ValueError("CUBLAS_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", RAN_OUT, ids=str)
def test_an_error_of_any_library_that_memory_ran_out_is_known(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert isinstance(error, MEMORY_ERRORS)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_whoever_asks_catches_all_types_that_say_it() -> None:
    asking = [
        file
        for file in (REPOSITORY / "fine_tune").rglob("*.py")
        if "is_out_of_memory(error)" in file.read_text() and file.name != "device_memory.py"
    ]
    assert len(asking) >= 5
    for file in asking:
        caught = re.findall(
            r"except (\w+) as error:\n[^\n]*\n?\s+if not is_out_of_memory", file.read_text()
        )
        assert set(caught) <= {"MEMORY_ERRORS"}, file
