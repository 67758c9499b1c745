"""The repeated blocks of a model, compiled once for all of them and for rows of any length."""

import os
import shutil

import torch
from torch import nn

from fine_tune.errors import UserError

SHAPES = 16  # graphs per kind of block at most: with and without gradients, one row or several, training or not


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that most of a model's weights lie in: the longest list of modules of one class.

    Args:
        model: Any model of transformers, adapters included.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    alike = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    weights = [sum(p.numel() for p in blocks.parameters()) for blocks in alike]
    return list(alike[weights.index(max(weights))]) if alike else []


def compile_blocks(model: nn.Module) -> int:
    """Let torch compile the repeated blocks at their first use, and return how many they are.

    What is computed stays the same up to rounding: sums are taken in another order. The blocks share their code, so
    that each of their shapes is compiled once; lengths are left open.

    Raises:
        UserError: torch finds no C++ compiler.
    """
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if not any(shutil.which(name) for name in compilers):
        raise UserError(
            f"model.compile: torch needs a C++ compiler ({' or '.join(compilers)}), and there is none; install one "
            "(Debian: apt install g++), or leave model.compile out"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    blocks = repeated_blocks(model)
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)
