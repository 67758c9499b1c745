"""What a run was set up to do, as its saved settings and its record say."""

import re
from typing import Any

from fine_tune.report.blocks import Block, Facts, Section
from fine_tune.report.record import RunRecord
from fine_tune.report.words import Words
from fine_tune.runs.lineage import ancestry, lines_of
from fine_tune.runs.run_folder import lowered_precision

DTYPES = {"32": "float32", "16": "float16", "bf": "bfloat16", "64": "float64"}
PATH_PARTS = 3


def purpose(run: RunRecord, words: Words) -> str:
    """Return what the run is for: as given, or what its settings do."""
    given = run.setting("purpose")
    if given:
        return str(given)
    if not run.config:
        return words("purpose_unknown")
    module = str(run.setting("model.class_path", "?")).rsplit(".", 1)[-1]
    kind = words.known(f"module_{module.lower()}", module)
    return words("purpose_made", kind=kind, model=model_name(run, words), data=data_name(run))


def setup(run: RunRecord, words: Words) -> Section:
    """List model, schedule, batch, precision, adapters and environment."""
    blocks: list[Block] = [
        Facts([*_schedule(run, words), *_optimization(run, words), *_numerics(run, words)])
    ]
    blocks.append(Facts(_adapter(run, words)))
    blocks.append(Facts(environment(run, words)))
    history = _history(run, words)
    blocks += [Facts(history)] if history else []
    return Section("setup", words("setup"), blocks)


def model_name(run: RunRecord, words: Words) -> str:
    """Return the model's name, or what a new one is."""
    new = run.setting("model.from_config")
    if isinstance(new, dict):
        return words("new_model", kind=str(new.get("model_type") or new.get("class") or "?"))
    return short_path(str(run.setting("model.model_name_or_path", words("unknown"))))


def data_name(run: RunRecord) -> str:
    """Return the name of the data, shortened: of files per split, that of the first."""
    firsts = {id(settings): path for path, settings in reversed(sources(run))}
    return ", ".join(short_path(path) for path in reversed(firsts.values())) or "?"


def sources(run: RunRecord) -> list[tuple[str, dict[str, Any]]]:
    """List where the rows come from, each with its settings."""
    listed = run.setting("data.sources")
    if not isinstance(listed, list):
        listed = [{"path": run.setting("data.path")}]
    found = []
    for source in (item for item in listed if isinstance(item, dict)):
        path = source.get("path")
        for part in path.values() if isinstance(path, dict) else [path]:
            if part is not None:
                found.append((str(part), source))
    return found


def short_path(path: str) -> str:
    """Return the end of a long path."""
    parts = path.rstrip("/").split("/")
    return path if len(parts) <= PATH_PARTS else "…/" + "/".join(parts[-PATH_PARTS:])


def precision(run: RunRecord) -> str:
    """Return the trainer's precision."""
    return str(run.setting("trainer.precision", ""))


def _schedule(run: RunRecord, words: Words) -> list[tuple[str, str]]:
    per_epoch = run.record.get("steps_per_epoch")
    epochs = run.setting("data.epochs")
    if epochs is None and per_epoch and run.num_steps:
        epochs = words.number(run.num_steps / per_epoch, 3)
    rows = run.record.get("num_rows", {})
    counts = ", ".join(
        f"{words.known(f'split_{n}', str(n))} {words.number(c)}" for n, c in rows.items()
    )
    batch, tokens = run.setting("data.batch_size"), run.setting("data.max_tokens_per_micro_batch")
    accumulation = words("unknown")
    if isinstance(batch, int):
        accumulation = words("batch_whole", rows=batch)
        if isinstance(tokens, int):
            accumulation = words("batch_of", rows=batch, tokens=tokens)
    return [
        (words("model"), model_name(run, words)),
        (words("epochs"), _shown(epochs, words)),
        (words("total_steps"), words.number(run.num_steps) if run.num_steps else words("unknown")),
        (words("rows_per_split"), counts or words("unknown")),
        (words("batch_accumulation"), accumulation),
        (words("max_length"), _shown(run.setting("data.max_length"), words)),
    ]


def _optimization(run: RunRecord, words: Words) -> list[tuple[str, str]]:
    rate, clip = run.number("model.optimizer.lr"), run.number("trainer.gradient_clip_val")
    ratio, decay = run.number("model.warmup_ratio"), run.number("model.optimizer.weight_decay")
    warm = words("warmup_steps", steps=run.setting("model.warmup_steps", 0))
    if ratio is not None:
        warm = words("warmup_ratio", share=words.share(ratio, 0))
    optimizer = str(run.setting("model.optimizer.class_path", "torch.optim.AdamW"))
    about = [words("decay", value=float(decay))] if decay is not None else []
    about += [words("clipped_at", value=float(clip))] if clip else []
    return [
        (words("learning_rate"), words.rate(rate) if rate is not None else words("unknown")),
        (words("scheduler"), f"{_shown(run.setting('model.lr_scheduler'), words)}, {warm}"),
        (words("optimizer"), ", ".join([optimizer.rsplit(".", 1)[-1], *about])),
        (words("validation_interval"), _validated(run, words)),
        (words("seed"), _shown(run.setting("seed_everything"), words)),
    ]


def _validated(run: RunRecord, words: Words) -> str:
    interval = run.number("trainer.val_check_interval")
    if interval is not None:
        is_share = isinstance(interval, float) and interval <= 1
        return _share(interval, run, words) if is_share else words("every_steps", steps=interval)
    per_epoch = run.record.get("steps_per_epoch")
    if run.config and run.setting("trainer.val_check_interval") is None and per_epoch:
        return words("every_epoch", steps=per_epoch)
    return words("unknown")


def _share(of_epoch: float, run: RunRecord, words: Words) -> str:
    share, per_epoch = f"{words.number(100 * of_epoch)} %", run.record.get("steps_per_epoch")
    if not per_epoch:
        return words("share_of_epoch", share=share)
    steps = max(1, round(of_epoch * per_epoch))  # as trainer_settings.validation_steps
    return words("share_of_epoch_steps", share=share, steps=steps)


def _numerics(run: RunRecord, words: Words) -> list[tuple[str, str]]:
    lowered = lowered_precision(run.record)
    told = [*filter(None, [precision(run)])]
    told += [words("lowered_to", precision=lowered)] if lowered else []
    in_force = lowered or precision(run)
    return [
        (words("precision"), ", ".join(told) or words("unknown")),
        (words("quantization"), _shown(run.setting("model.quantization"), words, "none")),
        (words("compute_dtype"), DTYPES.get(in_force[:2], words("unknown"))),
        (words("checkpointing"), _shown(run.setting("model.gradient_checkpointing"), words, "no")),
    ]


def _adapter(run: RunRecord, words: Words) -> list[tuple[str, str]]:
    pairs = []
    if run.setting("model.lora") is None:
        pairs.append((words("lora"), words("lora_none")))
    else:
        targets = _of_lora(run, "target_modules") or words("lora_default_targets")
        shown = ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets)
        pairs += [
            (words("lora_r"), _shown(_of_lora(run, "r"), words)),
            (words("lora_alpha"), _shown(_of_lora(run, "lora_alpha"), words)),
            (words("lora_dropout"), _shown(_of_lora(run, "lora_dropout"), words)),
            (words("lora_targets"), shown),
        ]
    model = run.record.get("model", {})
    total, trained = model.get("parameters"), model.get("trained")
    known = isinstance(total, int) and isinstance(trained, int) and total > 0
    share = words("unknown")
    if known:
        share = words(
            "trained_of", trained=trained, total=total, share=words.share(trained / total, 2)
        )
    return [*pairs, (words("trainable"), share)]


def _of_lora(run: RunRecord, name: str) -> Any:
    """Return a setting of LoRA: as given, or as the last checkpoint has it, chosen by rule or by peft."""
    return run.setting(f"model.lora.{name}", run.adapter.get(name))


def _history(run: RunRecord, words: Words) -> list[tuple[str, str]]:
    pairs = []
    for depth, ancestor in ancestry(run.path, run.record).chain():
        if depth:
            told = "; ".join(line.strip() for line in lines_of(ancestor))
            pairs.append((words("came_from"), told))
    for change in run.record.get("changes", []):
        values = {"before": str(change.get("from")), "after": str(change.get("to"))}
        where = {"key": str(change.get("key")), "step": str(change.get("step"))}
        pairs.append((words("changed"), words("changed_at", **where, **values)))
    return pairs


def environment(run: RunRecord, words: Words) -> list[tuple[str, str]]:
    """List device, versions and commit."""
    env = run.record.get("environment", {})
    versions = env.get("packages") if isinstance(env.get("packages"), dict) else {}
    devices = env.get("devices") if isinstance(env.get("devices"), list) else []
    names = [_device(str(name), words) for name in devices]
    pairs = [
        (words("device"), ", ".join(names) or _shown(run.setting("trainer.accelerator"), words)),
        (words("strategy"), f"{_shown(run.setting('trainer.strategy'), words)}, {words('devices')} "
         f"{_shown(env.get('num_devices', run.setting('trainer.devices')), words)}"),
        (words("python"), _shown(env.get("python"), words)),
        (words("platform"), _shown(env.get("platform"), words)),
        (words("packages"), ", ".join(f"{n} {v}" for n, v in versions.items()) or words("unknown")),
        (words("commit"), _commit(env, words)),
    ]  # fmt: skip
    return pairs


def _commit(env: dict[str, Any], words: Words) -> str:
    shown = _shown(env.get("git_commit"), words)
    return words("commit_dirty", commit=shown) if env.get("git_dirty") else shown


def _device(name: str, words: Words) -> str:
    """Write a CPU's cores, which the record has in English, in the page's language."""
    return re.sub(r"(\d+) cores(?= \(\d+ GiB\)$)", words("cores", count=r"\1"), name)


def _shown(value: Any, words: Words, without: str = "unknown") -> str:
    if value is None:
        return words(without)
    if isinstance(value, bool | int | float):
        return words.number(value)
    return str(value)
