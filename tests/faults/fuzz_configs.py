"""Mutations of configs and flags, and an independent look at what became of what was given."""

import json
import math
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml
from small_models import save_small_model

Base = dict[str, Any]
VALUES: list[Any] = [
    *(None, "", -1, 0, 1, 2, 3.0, 0.5, 1e400, float("nan"), True, False, [], {}, [1], {"a": 1}),
    *(
        {"a": {"b": [{"c": None}]}},
        [[[]]],
        "x" * 5000,
        "ünïcödé ☃ \U0001f600",
        "a\x1b[31mb",
        "a\0b",
    ),
    *(
        "7",
        "1e-3",
        "1_0",
        "0x1F",
        "2024-01-01",
        "yes",
        "null",
        "~",
        "{question}",
        "{}",
        "{",
        "../x",
    ),
    *(
        "/proc/nowhere/at/all",
        "auto",
        "none",
        "all",
        "torch.optim.SGD",
        "os.system",
        10**30,
        -0.0,
        2**63,
    ),
]
SNIPPETS = [
    "2024-01-01", "2024-99-99", "!!python/object/apply:os.system ['true']", "!!int abc", "!!float x",
    "!!binary x", "0x_", "&a {b: *a}", "&a [*a]", "*unknown", "{a: 1, a: 2}", "[{a: 1, a: 2}]",
    "? [a]\n: b", "{? [a]: 1}", "[" * 400, "{a: " * 400, "[" * 400 + "]" * 400, "1e3", ".inf", "-.nan",
    "0o17", "017", "1:30:00", "|\n   a\n", "\"\\x00\"", "'unclosed", "{<<: {a: 1}}", "!x y", "@a", "`a",
    "\"\\ud800\"", "{a: 1}: b", "- a", "%a", "\ta: 1", "null: 1", "true: 1", "1: 2", "!!set {a}",
    "!!str 7", "!!omap [a: 1]", "!!timestamp x", "!!null x", "!!bool x", "{path: a, path: b}",
]  # fmt: skip


def _rows(folder: Path) -> Path:
    rows = folder / "rows"
    rows.mkdir(exist_ok=True)
    asked = [{"question": f"Berapa {i} + {i % 7}?", "answer": str(i + i % 7)} for i in range(16)]
    turns = [
        [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]
        for r in asked
    ]
    lines = {"qa": asked, "chat": [{"messages": m} for m in turns]}
    for name, of_kind in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in of_kind)
        (rows / f"{name}.jsonl").write_text(text, "utf-8")
    (rows / "lines.txt").write_text("".join(f"Baris ke-{i} dari teks.\n" for i in range(8)))
    return rows


def _quickstart(folder: Path, tokenizer: Path) -> Base:
    rows = _rows(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 128}
    optimizer = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 2.0e-3, "betas": [0.9, 0.9]},
    }
    return {
        "name": "fuzz",
        "seed_everything": 42,
        "model": {
            "class_path": "fine_tune.modules.SFT",
            "init_args": {
                "from_config": {"model_type": "llama", **sizes},
                "tokenizer": str(tokenizer),
                "optimizer": optimizer,
                "lr_scheduler": "cosine",
                "warmup_ratio": 0.1,
            },
        },
        "data": {
            "class_path": "fine_tune.data.SFTData",
            "init_args": {
                "path": str(rows / "qa.jsonl"),
                "prompt": "{question}",
                "completion": " {answer}",
                "split": {"train": 0.5, "validation": 0.5},
                "batch_size": 4,
                "epochs": 2,
            },
        },
        "trainer": {"accelerator": "cpu", "gradient_clip_val": 1.0, "log_every_n_steps": 4},
        "checkpoint": {"every": 5, "keep": 1},
        "generations": {"rows": 0},
    }


def _lora(folder: Path, tokenizer: Path) -> Base:
    model = folder / "base"
    if not model.exists():
        save_small_model(model, num_hidden_layers=1)
    base = _quickstart(folder, tokenizer)
    base["model"]["init_args"] = {
        "model_name_or_path": str(model),
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj"]},
        "lora_plus_ratio": 4.0,
        "gradient_checkpointing": False,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    }
    return base


def _mixture(folder: Path, tokenizer: Path) -> Base:
    base, rows = _quickstart(folder, tokenizer), _rows(folder)
    qa = {"path": str(rows / "qa.jsonl"), "prompt": "{question}", "completion": " {answer}"}
    base["data"]["init_args"] = {
        "sources": [{**qa, "weight": 0.5}, {"path": str(rows / "lines.txt"), "format": "text"}],
        "split": "none",
        "batch_size": 4,
        "max_rows": {"train": 12},
        "seed": 3,
    }
    return base


def _chat(folder: Path, tokenizer: Path) -> Base:
    base, rows = _quickstart(folder, tokenizer), _rows(folder)
    base["data"]["init_args"] = {
        "path": {"train": str(rows / "chat.jsonl")},
        "assistant_turns": "last",
        "truncation": "drop",
        "max_length": 128,
        "near_duplicates": 0.9,
        "num_workers": 0,
        "eval_batch_size": 2,
    }
    return base


BASES: dict[str, Callable[[Path, Path], Base]] = {
    "quickstart": _quickstart,
    "lora": _lora,
    "mixture": _mixture,
    "chat": _chat,
}
MORE_KEYS = [
    *("data.init_args.max_rows", "data.init_args.seed", "data.init_args.tokenizer", "targets"),
    *("data.init_args.group_by", "data.init_args.stratify_by", "data.init_args.max_length"),
    *("data.init_args.cache_dir", "data.init_args.drop_leaked", "data.init_args.revision"),
    *("data.init_args.tokenizer_revision", "model.init_args.config", "model.init_args.dtype"),
    *("model.init_args.attn_implementation", "model.init_args.quantization", "test_at_end"),
    *("model.init_args.warmup_steps", "model.init_args.lora", "early_stopping.patience"),
    *("early_stopping.min_delta", "early_stopping.monitor", "allow_changes", "ckpt_path"),
    *("trainer.max_steps", "trainer.precision", "trainer.devices", "trainer.callbacks"),
    *("trainer.logger", "trainer.plugins", "trainer.strategy", "trainer.max_time"),
    *(
        "trainer.limit_val_batches",
        "trainer.deterministic",
        "trainer.profiler",
        "trainer.num_nodes",
    ),
    *(
        "trainer.enable_progress_bar",
        "trainer.val_check_interval",
        "trainer.gradient_clip_algorithm",
    ),
    *(
        "generations.max_new_tokens",
        "generations.test_rows",
        "checkpoint.monitor",
        "trainer.min_steps",
    ),
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    )
    return [p for k in keys for p in [(*path, k), *_places(value[k], (*path, k))]]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _typo(word: str, rng: random.Random) -> str:
    at = rng.randrange(max(1, len(word)))
    letter = rng.choice(string.ascii_lowercase + "_.- ")
    return rng.choice([word[:at] + word[at + 1 :], word[:at] + letter + word[at:], word + letter])


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def mutated_config(base: Base, rng: random.Random) -> tuple[bytes, list[str], str]:
    """Return the bytes of a mutated YAML, the flags that give it, and what was done."""
    config = json.loads(json.dumps(base))
    path = rng.choice(_places(config))
    parent, key = _at(config, path[:-1]), path[-1]
    value = rng.choice(VALUES)
    hows = "delete rename value value value add add move snippet snippet double indent bytes bytes"
    done = f"{rng.choice(hows.split())} {path}"
    text = _dump(config)
    match done.split()[0]:
        case "delete":
            del parent[key]
        case "rename" if isinstance(parent, dict):
            name = _typo(str(key), rng)
            done += f" {name!r}"
            items = [(name if k == key else k, v) for k, v in parent.items()]
            parent.clear()
            parent.update(items)
        case "value":
            done += f" {value!r:.60}"
            parent[key] = value
        case "add":
            *sections, name = rng.choice(MORE_KEYS).split(".")
            target = config
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
            done = f"add {sections} {name} {value!r:.60}"
        case "move" if isinstance(parent, dict):
            others = [p for p in _places(config) if isinstance(_at(config, p), dict)]
            other = rng.choice([(), *others])
            moved = parent.pop(key)
            if other[: len(path)] != path:
                _at(config, other)[key] = moved
            done += f" to {other}"
        case "snippet":
            snippet = rng.choice(SNIPPETS)
            parent[key] = "SNIPPET"
            text = _dump(config).replace("SNIPPET", snippet)
            return (
                text.encode("utf-8", "surrogatepass"),
                ["--config", "CONFIG"],
                f"{done} {snippet[:40]!r}",
            )
        case "double":
            lines = text.splitlines(keepends=True)
            line = rng.choice(lines)
            lines.insert(rng.randrange(len(lines) + 1), line)
            return "".join(lines).encode(), ["--config", "CONFIG"], f"double {line!r}"
        case "indent":
            lines = text.splitlines(keepends=True)
            at = rng.randrange(len(lines))
            lines[at] = rng.choice([" ", "\t", "  ", "", "- "]) + lines[at].lstrip()
            return "".join(lines).encode(), ["--config", "CONFIG"], f"indent {lines[at]!r}"
        case "bytes":
            raw, how = mutated_bytes(text.encode(), rng)
            return raw, ["--config", "CONFIG"], how
    return _dump(config).encode(), ["--config", "CONFIG"], done


def mutated_bytes(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Cut, flip, insert or remove bytes."""
    at = rng.randrange(max(1, len(raw)))
    how = rng.choice(["cut", "flip", "insert", "remove", "letter"])
    if how == "cut":
        raw = raw[:at]
    elif how == "flip":
        raw = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
    elif how == "insert":
        odd = [b"\0", b"\xff", b"\x1b[31m", b"\t", b"\r", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"#"]
        odd += [
            b"\n",
            b'"',
            b"'",
            b"{",
            b"}",
            b":",
            b"\xc2\x85",
            b"\xe2\x80\xa8",
            b",",
            b"\\",
            b"0",
        ]
        more = rng.choice(odd)
        how += f" {more!r}"
        raw = raw[:at] + more + raw[at:]
    elif how == "remove":
        raw = raw[:at] + raw[at + rng.randrange(1, 9) :]
    else:
        raw = raw[:at] + rng.choice(string.printable).encode() + raw[at + 1 :]
    return raw, f"{how} at {at}"


def mutated_flags(base: Base, rng: random.Random) -> tuple[bytes, list[str], str]:
    """Return a valid YAML, and flags with it of which one or two are mutated."""
    names = [
        f"--{'.'.join(map(str, path))}".replace(".init_args", "", 1)
        for path in _places(base)
        if not any(isinstance(part, int) for part in path) and path[-1] != "init_args"
    ] + ["--" + name.replace(".init_args", "") for name in MORE_KEYS]
    flags = ["--config", "CONFIG"]
    for _ in range(rng.choice([1, 1, 2])):
        name, value = rng.choice(names), rng.choice([*VALUES, *SNIPPETS])
        shown = value if isinstance(value, str) else json.dumps(value)
        how = rng.choice(["pair", "pair", "equals", "equals", "missing", "unknown", "twice", "odd"])
        if how == "pair":
            flags += [name, shown]
        elif how == "equals":
            flags += [f"{name}={shown}"]
        elif how == "missing":
            flags.insert(rng.choice([0, len(flags)]), name)
        elif how == "unknown":
            flags += [_typo(name, rng), shown]
        elif how == "twice":
            flags += [name, shown, name, json.dumps(rng.choice(VALUES))]
        else:
            odd: list[list[str]] = [["--config", "/nowhere.yaml"], ["--config", "."], ["--config="]]
            odd += [
                ["--config", "CONFIG"],
                ["-x"],
                ["--"],
                ["-"],
                ["---"],
                ["--="],
                ["--.=1"],
                [""],
            ]
            odd += [
                ["=", "1"],
                ["stray"],
                ["--data.", "1"],
                ["--data..path", "1"],
                ["--data"],
                ["-c"],
            ]
            odd += [["--name", "help"], [f"{name}+", shown], [f"{name}+={shown}"], ["--data+=1"]]
            odd += [["--help=1"], ["--name=--help"], ["--no-such=help"], ["--trainer", "{}"]]
            odd += [
                ["--trainer", "null"],
                ["--model", "null"],
                ["--data", "{}"],
                ["--checkpoint", "[]"],
            ]
            odd += [
                [f"{name}.more", shown],
                ["--data.init_args.batch_size", "2"],
                ["--trainer=CONFIG"],
            ]
            flags += rng.choice(odd)
    raw = _dump(base).encode()
    return raw, [a[:4000] for a in flags], f"flags {[a[:80] for a in flags[2:]]}"


# ---- what became of what was given


class Reader(yaml.SafeLoader):
    """A plain reader, to which a date is the text it is written with."""

    yaml_implicit_resolvers: ClassVar = {
        letter: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def unfaithful_settings(text: bytes, args: list[str], run: Any) -> list[str]:
    """Compare every key of a YAML that was accepted with the settings of the run it made."""
    if args.count("--config") != 1 or len(args) > 2:
        return _unfaithful_flags(args, run)
    try:
        root = yaml.compose(text.decode("utf-8-sig"), yaml.SafeLoader)
        given = yaml.load(text.decode("utf-8-sig"), Reader)
    except Exception as error:  # whatever the independent reader cannot read
        return [f"accepted, but the plain reader says {type(error).__name__}"]
    wrong = [f"duplicate key accepted: {key}" for key in _duplicates(root)]
    if not isinstance(given, dict):
        return [*wrong, f"accepted: {given!r:.80}"]
    chosen = {"data.cache_dir", "trainer.precision", *run.chosen}
    return wrong + _differences(given, run.settings.as_dict(), "", chosen)


def _unfaithful_flags(args: list[str], run: Any) -> list[str]:
    given: dict[str, str] = {}
    i = 0
    while i < len(args):
        name, equals, value = args[i].partition("=")
        if not equals and i + 1 < len(args):
            value, i = args[i + 1], i + 1
        i += 1
        if name not in ("--config", "-c"):
            given[name.lstrip("-")] = value
    wrong = []
    for name, value in given.items():
        if value == "" and name.endswith("help"):
            continue
        path = name.replace(".init_args", "").split(".")
        found: Any = run.settings.as_dict()
        for part in path:
            if not isinstance(found, dict):
                break
            inner = found.get("init_args")
            found = (
                inner[part]
                if isinstance(inner, dict) and part in inner
                else found.get(part, KeyError)
            )
        if found is KeyError:
            if not name.endswith("+"):
                wrong.append(f"--{name}={value:.60} is nowhere in the settings")
            continue
        try:
            zeros = re.fullmatch(r"[+-]?0\d+", value)  # a flag is no YAML 1.1: 017 is seventeen
            read = int(value) if zeros else yaml.load(value, Reader)
        except Exception:
            read = value
        chosen = {"data.cache_dir", "trainer.precision", *run.chosen}
        key = ".".join(path)
        if value != found and _differences(read, found, key, chosen):
            wrong.append(f"--{name}={value:.60} became {found!r:.80}")
    return wrong


def _duplicates(node: Any, seen: tuple[int, ...] = ()) -> list[str]:
    if id(node) in seen:
        return []
    seen = (*seen, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [d for item in node.value for d in _duplicates(item, seen)]
    if not isinstance(node, yaml.MappingNode):
        return []
    keys = [str(key.value) for key, _ in node.value]
    own = sorted({key for key in keys if keys.count(key) > 1})
    return own + [d for _, value in node.value for d in _duplicates(value, seen)]


def _differences(given: Any, got: Any, key: str, chosen: set[str]) -> list[str]:
    if isinstance(given, dict) and isinstance(got, dict):
        wrong = []
        if isinstance(got.get("init_args"), dict) and "class_path" not in given:
            got = got["init_args"]
        for name, value in given.items():
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            if name not in got:
                wrong.append(f"{inner}: given, but nowhere in the settings")
            else:
                wrong += _differences(value, got[name], inner, chosen)
        return wrong
    if isinstance(given, list) and isinstance(got, list | tuple):
        if len(given) != len(got):
            return [f"{key}: {given!r:.80} became {got!r:.80}"]
        pairs = enumerate(zip(given, got, strict=True))
        return [w for i, (a, b) in pairs for w in _differences(a, b, f"{key}.{i}", chosen)]
    if key == "seed_everything" and given is True:  # Lightning chooses a seed and notes it
        return []
    if given is None and (got is None or key in chosen):
        return []
    return [] if _same(given, got) else [f"{key}: {given!r:.80} became {got!r:.80}"]


def _same(given: Any, got: Any) -> bool:
    if isinstance(got, dict) and isinstance(given, str):  # a class by its name alone
        return str(got.get("class_path", "")).endswith(given)
    if isinstance(given, bool) or isinstance(got, bool):
        return given is got or str(given) == str(got)
    if isinstance(got, int | float) and isinstance(given, int | float | str):
        try:
            number = int(given, 16) if str(given).startswith("0x") else float(given)
        except (ValueError, OverflowError):
            return given == got
        return number == float(got) or (math.isnan(number) and math.isnan(got))
    return bool(given == got) or (
        isinstance(given, str) and str(getattr(got, "value", got)) == given
    )
