"""The exception for the user's mistakes (text, exit code 2, no traceback), and the one that sends a run back."""

from fine_tune.printable import printable


class UserError(Exception):
    """One or more problems the user can fix.

    Everything else that escapes is a defect of ours and keeps its traceback.

    Args:
        problems: Each reads ``where: what was given, what is allowed; how to fix it``.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(in_brief(problem) for problem in problems)
        super().__init__("\n".join(self.problems))


def in_brief(text: str) -> str:
    """Return a message as it may reach a terminal: control characters spelled out, and no screens of one value."""
    shown = text if len(text) <= 2_000 else f"{text[:2_000]} ..."
    return printable(shown, keep="\n\t")


def nearest(word: str, known: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    from difflib import get_close_matches

    matches = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


class RunStopped(UserError):
    """A run cannot go on as it is, but its state is good: it is saved.

    ``on_all_ranks`` says whether every process of the run raises it at the same place: only then can they save
    together. One that does not know of it would be waited for, and would wait, for ever.
    """

    on_all_ranks = False


class RanksApart(UserError):
    """A rank failed in passes that all take together: none of them can go on, or save, but from a checkpoint."""


class DamagedCheckpoint(UserError):
    """A checkpoint is not what its manifest says; an earlier one may be."""


class GoBack(Exception):
    """The run has to go on from its newest whole checkpoint.

    Args:
        reason: What happened, for the user.
        precision: The trainer's precision to go on with; None for the same.
    """

    def __init__(self, reason: str, precision: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.precision = reason, precision
