"""A model's own tokenizer beside the one given for it: the same ids must stand for the same tokens."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fine_tune.errors import UserError
from fine_tune.model_config import resolve_source
from fine_tune.models import load_tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
KEY = "model.tokenizer"


def tokenizer_problems(
    given: PreTrainedTokenizerBase, name: str | None, model: str | None, revision: str | None
) -> list[str]:
    """Say whether a tokenizer is another model's: of the same size, too, all its ids would mean something else.

    Tokens that were added, and special ones under another name, are no difference; nor is a chat template.

    Args:
        given: The tokenizer.
        name: Its folder or hub name, as given.
        model: The same of the model; None for a new one, which takes any tokenizer.
        revision: The model's, on the hub.
    """
    if model is None or name is None or name == model:
        return []
    own = _own(model, revision)
    if own is None:
        return []
    tokens, own_tokens = _by_id(given), _by_id(own)
    shared = sorted(tokens.keys() & own_tokens.keys())
    other = [i for i in shared if tokens[i] != own_tokens[i]]
    if not other:
        return []
    i = other[0]
    return [
        f"{KEY}: '{name}' is another model's tokenizer: {len(other):,} of {len(shared):,} ids stand for another token "
        f"than in the one of '{model}' (id {i} is {tokens[i]!r}, there {own_tokens[i]!r}); allowed is that one, also "
        f"with tokens added or another chat template: leave {KEY} out, or set --{KEY} {model}"
    ]


def _own(model: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    source, commit = resolve_source("model.model_name_or_path", model, revision)
    if commit is None and not any((Path(source) / file).is_file() for file in FILES):
        return None  # transformers would make an empty one
    try:
        return load_tokenizer(KEY, source, commit)
    except UserError:  # it has none that can be read: nothing to compare with
        return None


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder
    return {i: token for token, i in tokenizer.get_vocab().items() if i not in added}
