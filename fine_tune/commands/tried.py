"""Other people's tools tried on a merged model, where they are installed: does it convert, does it load."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import torch

CONVERTER = "convert_hf_to_gguf.py"  # of llama.cpp
SECONDS = 1200
VLLM = (
    "import sys; from vllm import LLM, SamplingParams; "
    "LLM(sys.argv[1], enforce_eager=True, max_model_len=64).generate(['a'], SamplingParams(max_tokens=4))"
)


def try_installed(folder: Path) -> list[str]:
    """Convert a model folder to GGUF and load it in vLLM, each where it is installed; say what came of it."""
    lines = []
    converter = shutil.which(CONVERTER)
    if converter is not None:
        target = folder / "model.gguf"
        command = [sys.executable, converter, str(folder), "--outfile", str(target)]
        failure = _failure(command)
        lines.append(f"gguf, tried:  {failure or f'{target} has {target.stat().st_size:,} bytes'}")
    if importlib.util.find_spec("vllm") is not None and torch.cuda.is_available():
        failure = _failure([sys.executable, "-c", VLLM, str(folder)])
        lines.append(f"vllm, tried:  {failure or 'it loads and answers'}")
    return lines


def _failure(command: list[str]) -> str | None:
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    told = ended.stderr.strip().splitlines() or ["it says nothing"]
    return f"failed: {told[-1]}" if ended.returncode else None
