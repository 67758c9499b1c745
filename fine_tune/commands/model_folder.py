"""A model folder for others: whole or not there, with a model card written from the run's record."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import psutil

from fine_tune.adapters import INITS_THAT_CHANGE_THE_BASE
from fine_tune.errors import UserError
from fine_tune.model_config import adapter_base
from fine_tune.report.inert import markdown
from fine_tune.report.intervals import wilson
from fine_tune.runs.checkpoint import global_step
from fine_tune.runs.disk import format_bytes, free_bytes, full_reason
from fine_tune.runs.lineage import ORIGIN_FILE, parent_of, to_share
from fine_tune.runs.results import own_results
from fine_tune.runs.run_folder import RECORD
from fine_tune.saved_adapters import saved_lora
from fine_tune.trained_model import TrainedModel

CARD = "README.md"
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # of its --max-lora-rank; 16 if none is given
TEMPLATE = Path(__file__).parent / "model_card.md.j2"


@contextmanager
def start_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside ``target`` to write into; it takes the name once all is done, else it goes.

    Raises:
        UserError: The target exists, or cannot be written.
    """
    place = Path(os.path.abspath(target))  # where . and .. have names
    unfinished = place.parent / f".{place.name}.{os.getpid()}.unfinished"
    try:
        if target.exists() or target.is_symlink():
            raise UserError(
                f"output: '{target}' exists and is not overwritten; give another --output, or remove it"
            )
        for leftover in place.parent.glob(f".{place.name}.*.unfinished"):
            if not psutil.pid_exists(int(leftover.name.split(".")[-2])):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(target)
    except Exception as error:  # safetensors tells of a full disk in an error of its own
        reason = full_reason(error) or (error.strerror if isinstance(error, OSError) else None)
        if reason is None:
            raise
        free = format_bytes(free_bytes(target.parent))
        raise UserError(
            f"output: '{target}' cannot be written: {reason}; {free} are free"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@dataclass(frozen=True)
class ModelFolder:
    """What a written folder holds.

    Args:
        trained: The run and checkpoint it comes from.
        merged: Whether an adapter was merged into its base.
        differences: Largest differences of a logit that were measured, by what was compared.
    """

    trained: TrainedModel
    merged: bool = False
    differences: dict[str, float] = field(default_factory=dict)

    @property
    def holds_adapter(self) -> bool:
        """Whether another model has to be there for it."""
        return self.trained.trains_adapter and not self.merged

    def next_commands(self, target: Path) -> list[str]:
        """Say where it is, and the commands that use it."""
        place = shlex.quote(str(target))
        lines = [f"written: {target}   card: {target / CARD}"]
        head, kind = self.trained.settings.head, "ForCausalLM"
        kind = "ForSequenceClassification" if head == "score" else kind
        if self.holds_adapter:
            labels = ", num_labels=1" if head == "score" else ""
            lines.append(_python(target, f"AutoPeftModel{kind}", "peft", labels))
            init = getattr(self.trained.settings.lora, "init_lora_weights", True)
            if head == "lm" and init not in INITS_THAT_CHANGE_THE_BASE:
                lines += self._vllm_with_adapter(place)
            merge = f"python -m fine_tune merge {shlex.quote(str(self.trained.run.path))}"
            return [*lines, f"merge:        {merge}"]
        if head == "score":
            return [*lines, _python(target, f"AutoModel{kind}")]
        return [
            *lines,
            _python(target, "AutoModelForCausalLM"),
            f"vllm:         vllm serve {place}",
            f"gguf:         python llama.cpp/convert_hf_to_gguf.py {place} --outfile {place}/model.gguf",
        ]

    def _vllm_with_adapter(self, place: str) -> list[str]:
        """Serve it on the base that its own config names, which of a base run is the checkpoint."""
        base = adapter_base(str(self.trained.checkpoint)) or self.base
        there = Path(self.trained.directory, base)
        base = str(there) if there.exists() else base
        lora = saved_lora(self.trained.checkpoint)
        if lora.use_dora or lora.rank_pattern or lora.alpha_pattern:
            return []  # vLLM serves no such adapter; merged, it does
        room = next((rank for rank in VLLM_RANKS if rank >= lora.r), None)
        if room is None:
            return []
        more = f" --max-lora-rank {room}" if room > VLLM_RANKS[0] else ""
        served = f"{shlex.quote(base)} --enable-lora{more} --lora-modules tuned={place}"
        return [f"vllm:         vllm serve {served}"]

    @property
    def base(self) -> str:
        """The name or folder of the model it started from."""
        return str(self.trained.settings.base[0] or "")

    @property
    def base_on_the_hub(self) -> str | None:
        """The base's name, if it is one of the hub: where it lay here says nothing to others."""
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", self.base)
        is_there = Path(self.trained.directory, self.base).exists()
        return self.base if is_name and not is_there else None

    def card(self) -> str:
        """Write the model card from the run's record.

        Raises:
            UserError: The record is damaged.
        """
        run, record = self.trained.run, self.trained.run.read()
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
        )
        environment.filters["shown"], environment.globals["interval"] = _shown, _interval
        try:
            return environment.from_string(TEMPLATE.read_text("utf-8")).render(
                name=run.name,
                folder=self,
                record=record,
                identity=record.get("identity") or {},
                rows=record.get("num_rows") or {},
                tokens=record.get("num_tokens") or {},
                results=own_results(record),
                purpose=self.trained.config.get("purpose"),
                licences=self.trained.config.get("licences") or {},
                parents=record.get("parents") or [],
                packages=(record.get("environment") or {}).get("packages") or {},
                checkpoint=self.trained.checkpoint.name,
                step=global_step(self.trained.checkpoint),
                version=metadata.version("fine-tune"),
            )
        except (jinja2.UndefinedError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{run.path / RECORD}: the run's record is damaged: {error}") from error


def finish(unfinished: Path, folder: ModelFolder) -> None:
    """Add the model card, and where the weights come from, for the lineage of what is trained from them."""
    (unfinished / CARD).write_text(folder.card(), "utf-8")
    origin = parent_of("weights", folder.trained.checkpoint)
    if origin is not None:
        shared = json.dumps(to_share(origin, unfinished), indent=1, ensure_ascii=False)
        (unfinished / ORIGIN_FILE).write_text(shared, "utf-8")


def _python(target: Path, kind: str, package: str = "transformers", more: str = "") -> str:
    opened = f"{kind}.from_pretrained({str(target)!r}{more})"
    return f"python:       from {package} import {kind}; model = {opened}"


def _shown(value: Any) -> str:
    return markdown(f"{value:.6g}" if isinstance(value, float) else value)


def _interval(result: dict[str, Any], metric: str) -> str:
    counted = (result.get("counted") or {}).get(metric)
    ends = wilson(counted[0] / counted[1], counted[1]) if counted and counted[1] else None
    ends = ends or (result.get("intervals") or {}).get(metric)
    return " – ".join(map(_shown, ends)) if ends else ""
