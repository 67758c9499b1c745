"""``python -m fine_tune VERB``: a table of verbs; the standard library only until one is chosen."""

import difflib
import gc
import importlib
import sys
from types import ModuleType

from fine_tune.quiet import quiet_libraries

VERBS = {
    "fit": ("fine_tune.cli:main", "train a model from a YAML, then validate its best weights"),
    "validate": ("fine_tune.cli:main", "measure a checkpoint on the validation split"),
    "test": ("fine_tune.cli:main", "measure a checkpoint on the test split"),
    "predict": (
        "fine_tune.predict_cli:main",
        "answer the rows of a file, or score them by a reward model",
    ),
    "chat": (
        "fine_tune.commands.chat:main",
        "talk to a run's model in the terminal, beside its base if asked to",
    ),
    "analyze": (
        "fine_tune.commands.analyze:main",
        "look at the data before training on it: lengths, truncation, duplicates, leakage",
    ),
    "plan": (
        "fine_tune.commands.plan:main",
        "whether a run fits, what it takes and what would fit",
    ),
    "sweep": (
        "fine_tune.commands.sweep:main",
        "search settings: a study whose trials are runs, on any number of machines",
    ),
    "runs": (
        "fine_tune.commands.runs:main",
        "list all runs: status, model, data, metrics, test openings; filter, sort, compare",
    ),
    "merge": (
        "fine_tune.commands.merge:merge",
        "merge a run's adapter into its base: a checked folder for transformers, vLLM, GGUF",
    ),
    "export": (
        "fine_tune.commands.export:export",
        "write a run's weights or adapter as a folder with its model card",
    ),
    "report": (
        "fine_tune.commands.report:main",
        "write what became of a run, as one page; several runs side by side",
    ),
    "lineage": (
        "fine_tune.commands.lineage:lineage",
        "where a run's weights come from, run by run, back to the hashes of the data",
    ),
    "explain-step": (
        "fine_tune.commands.explain_step:main",
        "show the rows behind one optimizer step of a run",
    ),
    "verify-resume": (
        "fine_tune.commands.verify_resume:main",
        "prove on your own config that a killed run goes on as if it had not been killed",
    ),
    "train-tokenizer": (
        "fine_tune.commands.train_tokenizer:train_tokenizer",
        "train a tokenizer on texts, and measure it on texts it did not see",
    ),
    "make-qa": (
        "fine_tune.commands.make_qa:make_qa",
        "write question-answer rows and their tokenizer from facts",
    ),
    "make-preferences": (
        "fine_tune.commands.make_preferences:make_preferences",
        "write pairs of a right and a worse answer from the same facts",
    ),
}
HELP_FLAGS = ("-h", "--help", "help")


def usage() -> str:
    """Return the list of verbs."""
    width = max(map(len, VERBS))
    lines = [f"  {verb.ljust(width)}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: python -m fine_tune VERB [options]",
            "",
            *lines,
            "",
            "  python -m fine_tune fit --config configs/quickstart.yaml",
            "  python -m fine_tune VERB --help",
        ]
    )


def _imported(name: str) -> ModuleType:
    """Import a module, and spare collections of garbage the half million objects that imports leave for good."""
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def main(args: list[str] | None = None) -> int:
    """Run one verb; return the exit code (2: the user can fix it)."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in HELP_FLAGS:
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        from fine_tune import __version__

        print(__version__)
        return 0
    verb = args[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        print(f"error: unknown verb '{verb}'{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    quiet_libraries()
    name, function = VERBS[verb][0].split(":")
    module = _imported(name)
    if function == "main":  # parses for itself
        return int(module.main(args))
    from fine_tune.commands.run_function import run_function

    return run_function(verb, getattr(module, function), args[1:])


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # output piped into something that stopped reading, like head
        sys.stderr.close()
        code = 141
    except KeyboardInterrupt:  # Ctrl-C while the libraries are imported, or in a verb without a run
        code = 130
    sys.exit(code)
