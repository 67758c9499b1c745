"""A run's model for a conversation: its weights, how its prompts are written, and what it can be compared with."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, chdir, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fine_tune.adapters import INITS_THAT_CHANGE_THE_BASE
from fine_tune.callbacks.stop_signals import StopRequest
from fine_tune.data.encode import Encoder
from fine_tune.data.predict_loader import predict_plan
from fine_tune.data.predict_rows import PredictItem, PredictRows
from fine_tune.data.prompts import (
    CHAT_FORMATS,
    asked,
    asked_segments,
    stop_ids,
    trained_format,
)
from fine_tune.data.templates import Templates, template_fields
from fine_tune.errors import UserError
from fine_tune.model_cli import ModelCLI
from fine_tune.modules.decoding import Answer, Decoder
from fine_tune.modules.precision import lowered
from fine_tune.modules.prediction import generation_stops
from fine_tune.modules.weights import load_weights, restore_weights
from fine_tune.runs.find import find_run
from fine_tune.runs.run_folder import RECORD
from fine_tune.sampling import Sampling
from fine_tune.settings_cli import run_cli

log = logging.getLogger("fine_tune")
Kind = Literal["messages", "prompt", "text"]
FROM_NOTHING = (
    "compare: this model was trained from random weights, so there is no base to compare it with; "
    "leave --compare out"
)
NO_BASE = "compare: a model alone has no base to compare it with; give the run that trained it"


class ChatCLI(ModelCLI):
    """Parse a run's config as predict does, and stop before anything is loaded."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        self.model.model_settings.gradient_checkpointing = False
        if not self.model.can_generate:
            raise UserError(
                "run: a reward model scores answers and writes none; score rows with predict"
            )
        self.place = self.find_checkpoint()
        nothing = PredictRows([""], [PredictItem(0, "", [0])], set(), "", is_text=True)
        self.model.check(predict_plan(nothing, 0, None), self.datamodule.tokenizer)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing: the chat loads the weights."""


@dataclass
class ChatModel:
    """What answers.

    Args:
        cli: The run's parsed settings.
        name: What the user reads of it.
        kind: Conversations by the chat template, questions by a prompt template, or text to go on with.
        format_name: How a row of the run is read.
        templates: The run's.
    """

    cli: Any
    name: str
    kind: Kind
    format_name: str
    templates: Templates

    def __post_init__(self) -> None:
        self.tokenizer = self.cli.datamodule.tokenizer
        self.positions: int | None = self.cli.positions
        self.encoder = Encoder(self.tokenizer, max_length=2**31)
        settings = self.cli.model.model_settings
        self.precision = str(self.cli.settings.trainer.precision)
        self.device = _device(str(self.cli.settings.trainer.accelerator))
        checkpoint = self.cli.place.checkpoint
        whole = checkpoint if settings.lora is None else None
        self.model: Any = load_weights(settings, self.tokenizer, self.precision, whole)
        if checkpoint is not None and whole is None:
            restore_weights(self.model, settings, checkpoint)
        self.model = self._ready(self.model)
        self.stop_ids = stop_ids(self.encoder, chat=self.kind == "messages")
        self.stop_ids |= set(generation_stops(self.model))
        self._base: Any = None

    @property
    def fields(self) -> list[str]:
        """The fields of the prompt that the user has to fill."""
        if self.kind != "prompt" or self.templates.prompt is None:
            return ["instruction" if self.format_name == "alpaca" else "prompt"]
        return list(dict.fromkeys(template_fields(self.templates.prompt, "data.prompt")))

    def load_base(self) -> None:
        """Get ready to answer as the model did before this run.

        Raises:
            UserError: There is no such model.
        """
        settings = self.cli.model.model_settings
        if settings.from_config is not None:
            raise UserError(FROM_NOTHING)
        if self.cli.place.checkpoint is None:
            raise UserError(NO_BASE)
        changed = settings.lora is not None and (
            settings.lora.init_lora_weights in INITS_THAT_CHANGE_THE_BASE
            or settings.continued_adapter is not None
        )
        if settings.lora is None or changed:
            plain = replace(settings, lora=settings.lora if settings.quantized else None)
            plain.quantized = settings.quantized
            plain.continued_adapter = settings.continued_adapter
            self._base = self._ready(load_weights(plain, self.tokenizer, self.precision))

    def prompt_ids(self, question: dict[str, str], messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens that are asked: of the conversation, or of the question alone.

        Raises:
            RowError: The template refuses it.
        """
        if self.kind == "messages":
            row: dict[str, Any] = {"messages": messages}
            example = asked(
                self.encoder.guard(row), "messages", replace(self.templates, prompt=None)
            )
        elif self.kind == "prompt":
            example = asked(self.encoder.guard(question), self.format_name, self.templates)
        else:
            example = {"text": self.encoder.guard(question["prompt"])}
        segments = asked_segments(self.encoder, example)
        ((ids, _),) = self.encoder.ids_and_labels([segments], chat=self.kind == "messages")
        return ids

    def stream(
        self, ids: list[int], sampling: Sampling, key: tuple[int, ...], *, base: bool = False
    ) -> Iterator[Answer]:
        """Write an answer; it is given anew with each token.

        Args:
            ids: What is asked.
            sampling: How to answer; ``max_new_tokens`` is set.
            key: Makes this answer's random numbers others than another's.
            base: Answer as the model did before this run.
        """
        assert sampling.max_new_tokens is not None
        answer = Answer(None, ids, sampling.max_new_tokens, sampling.draws(*key))
        model = self._base if base and self._base is not None else self.model
        pad_token_id = int(self.tokenizer.pad_token_id)
        decoder = Decoder(model, self.stop_ids, pad_token_id, sampling, 2**31)
        while answer.ended is None:
            with torch.inference_mode(), self._computing(), self._without_adapter(base):
                if answer.written:
                    decoder.step()
                else:
                    decoder.start([answer])
            yield answer

    def _without_adapter(self, base: bool) -> AbstractContextManager[Any]:
        if not base or self._base is not None:
            return nullcontext()
        without: AbstractContextManager[Any] = self.model.disable_adapter()
        return without

    def _computing(self) -> AbstractContextManager[Any]:
        return lowered(self.precision if self.precision.endswith("mixed") else None, self.device)

    def _ready(self, model: Any) -> Any:
        return model.to(self.device).eval().requires_grad_(False)


def load_chat_model(run: str, model: str | None, ckpt_path: str | None, root: Path) -> ChatModel:
    """Load what the user wants to talk to.

    Args:
        run: A run's name or folder, one of its checkpoints, or a model folder or hub name.
        model: A model folder or hub name, where ``run`` is empty.
        ckpt_path: best, last or a checkpoint's folder.
        root: Folder that holds ``lightning_logs``.

    Raises:
        UserError: There is no such run, model or checkpoint, or it writes no answers.
    """
    checkpoint = _run_of_checkpoint(run)
    if checkpoint is not None and ckpt_path is None:
        run, ckpt_path = str(checkpoint.parent.parent), str(checkpoint)
    name = model or (run if _is_model(run, root) else None)
    if name is not None:
        if ckpt_path is not None:
            raise UserError("ckpt_path: belongs to a run; a model's folder is its checkpoint")
        cli = run_cli(
            ChatCLI, ["predict", *_flags("--model.model_name_or_path", name)], StopRequest()
        )
        chats = bool(cli.datamodule.tokenizer.chat_template)
        kind: Kind = "messages" if chats else "text"
        return ChatModel(cli, name, kind, kind, Templates(None, None, None))
    folder = find_run(run, root)
    config = folder.path.resolve() / "config.yaml"
    if not config.is_file():
        raise UserError(f"run: {folder.path} has no config.yaml")
    if ckpt_path is not None and ckpt_path not in ("best", "last"):
        ckpt_path = str(Path(ckpt_path).resolve())
    with chdir(folder.directory):  # the config's paths start there
        args = _flags("--config", str(config), "--ckpt_path", ckpt_path or "best")
        cli = run_cli(ChatCLI, ["predict", *args], StopRequest())
        kind, format_name, templates = _how_asked(cli.datamodule)
        assert cli.place.checkpoint is not None, "best or last was asked for"
        where = f"{folder.path}, {cli.place.checkpoint.name}"
        for note in cli.place.notes:
            log.info("WARNING: %s", note)
        return ChatModel(cli, where, kind, format_name, templates)


def _flags(*args: str) -> list[str]:
    return [*args, "--data.predict_path", "chat"]


def _run_of_checkpoint(name: str) -> Path | None:
    folder = Path(name or ".").resolve()
    return folder if name and (folder.parent.parent / RECORD).is_file() else None


def _is_model(name: str, root: Path) -> bool:
    folder = Path(name)
    if any(os.path.isfile(folder / file) for file in ("config.json", "adapter_config.json")):
        return True
    if os.path.exists(folder) or name.count("/") != 1 or name.startswith((".", "/")):
        return False
    try:
        find_run(name, root)
    except UserError:
        return True  # a name on the hub, or it says so
    return False


def _device(accelerator: str) -> torch.device:
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _how_asked(data: Any) -> tuple[Kind, str, Templates]:
    """Say how a run's rows ask: by its settings, else by the fields of its first training row."""
    source = data.sources[0]
    templates = source.templates
    format_name = trained_format(source)
    if format_name is None:
        log.info("the run's rows cannot be looked at: how they ask is taken from the tokenizer")
        format_name = "messages" if data.tokenizer.chat_template else "text"
    if format_name in CHAT_FORMATS:
        return "messages", "messages", templates
    return ("text" if format_name == "text" else "prompt"), format_name, templates
