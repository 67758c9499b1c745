"""``chat``: talk to a run's model, or to any, in the terminal; beside its base if asked to."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from fine_tune.errors import UserError
from fine_tune.exits import exit_code
from fine_tune.runs.run_folder import LOGS

TEMPERATURE = 0.6
MAX_NEW_TOKENS = 1_024
HOW_ASKED = {
    "messages": "conversations by the model's chat template",
    "prompt": "each question alone, in the run's prompt template: the model was not trained on conversations",
    "text": "the model goes on with your text: it was trained on plain text",
}


def main(args: list[str]) -> int:
    """Talk to a model; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tune chat", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "run",
        nargs="?",
        default="",
        help="A run folder, <name> or <name>/version_N, a checkpoint, or a model folder or hub name.",
    )
    parser.add_argument("--model", help="A model folder or hub name, instead of a run.")
    parser.add_argument("--ckpt_path", help="best (the default), last, or a checkpoint's folder.")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="Default: 0.6.")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, help="Tokens an answer may have.")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--system", default="", help="A system message.")
    parser.add_argument(
        "--compare", action="store_true", help="Answer each question before and after the run."
    )
    parser.add_argument("--once", metavar="TEXT", help="Answer this, print the answer, and end.")
    parser.add_argument(
        "--root", type=Path, default=Path("."), help=f"The folder that holds {LOGS}."
    )
    own = parser.parse_args(args[1:])
    return exit_code(lambda: chat(own))


def chat(own: argparse.Namespace) -> None:
    """Load the model, and talk.

    Args:
        own: What ``main`` parsed.

    Raises:
        UserError: No such model, settings that cannot be meant, nothing to compare with.
    """
    if bool(own.run) == bool(own.model):
        given = "both" if own.run else "neither"
        raise UserError(
            f"run: give a run (or a model's folder), or --model, {given} given; like: chat quickstart"
        )
    from fine_tune.sampling import Sampling

    values: dict[str, Any] = {
        name: getattr(own, name)
        for name in (
            *("temperature", "top_p", "top_k", "repetition_penalty"),
            *("max_new_tokens", "seed"),
        )
    }
    Sampling(**values)  # refused before anything loads
    with redirect_stdout(sys.stderr):  # a pipe gets answers alone
        from fine_tune.commands.chat_model import load_chat_model

        model = load_chat_model(own.run, own.model, own.ckpt_path, own.root)
        if own.compare:
            model.load_base()
    from fine_tune.commands.chat_session import Session
    from fine_tune.commands.chat_terminal import Terminal

    positions = model.positions
    values["max_new_tokens"] = own.max_new_tokens or min(MAX_NEW_TOKENS, (positions or 2**31) // 2)
    session = Session(model, Sampling(**values))
    if own.system:
        told = session.set_system(own.system)
        if session.system != own.system:
            raise UserError(f"system: {told}")
    terminal = Terminal(session, compare=own.compare)
    if own.once is not None:
        terminal.once(own.once)
        return
    greeting = [f"{model.name}, temperature {own.temperature:g}", HOW_ASKED[model.kind]]
    greeting.append("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat")
    terminal.note(*greeting)
    terminal.run()
