"""Mutations of data files, and a plain reader of them to hold against what was prepared."""

import codecs
import csv
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_configs import mutated_bytes

QA = {"prompt": "{question}", "completion": " {answer}"}
DATA_KINDS = ("qa.jsonl", "qa.jsonl", "qa.csv", "qa.json", "qa.parquet", "lines.txt", "chat.jsonl")
DATA_KINDS += ("share.jsonl", "alpaca.json")
ODD: list[Any] = [
    *(
        None,
        "",
        " ",
        0,
        -1,
        1.5,
        True,
        [],
        {},
        [1],
        {"a": None},
        "a\0b",
        "\ud800",
        "a\udc80",
        "\ufeff",
    ),
    *(
        "x" * 3000,
        "\x1b[31mred",
        "<script>",
        "=cmd()",
        "\u2028",
        "\r",
        "\n",
        10**20,
        1e300,
        "NaN",
        "007",
    ),
    *(
        "<|endoftext|>",
        "\ue000ff\ue001",
        "\U0001f600",
        "{question}",
        "%s",
        "\\",
        '"',
        "'",
        "e\u0301",
    ),
]
LITERALS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "1" * 5000,
    "-0",
    "1.50",
    "[" * 2000,
    "01",
    "1E5",
]
LITERALS += [
    "[" * 2000 + "]" * 2000,
    '{"a":' * 1500 + "1" + "}" * 1500,
    '"\\ud83d\\ude00"',
    "'a'",
    "",
]
LITERALS += [
    '"\\u0000"',
    '"a\tb"',
    "tru",
    "1,",
    '"a" "b"',
    "/**/1",
    '"\\x"',
    "-",
    '"\\ud800"',
    "9" * 400,
]


def _rows(kind: str, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for i in range(rng.choice([1, 6, 6, 6])):
        asked, answer = f"Berapa {i} + {rng.randrange(1000)}?", str(i)
        turns = [("user", asked), ("assistant", answer)]
        match kind.split(".")[0]:
            case "qa":
                rows.append({"question": asked, "answer": answer})
            case "lines":
                rows.append({"text": f"{asked} {answer}"})
            case "chat":
                rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
            case "share":
                names = {"user": "human", "assistant": "gpt"}
                rows.append({"conversations": [{"from": names[r], "value": c} for r, c in turns]})
            case "alpaca":
                rows.append({"instruction": asked, "input": "", "output": answer})
    return rows


def _write(rows: list[dict[str, Any]], kind: str, rng: random.Random) -> bytes:
    suffix = kind.split(".")[1]
    if suffix == "json":
        return json.dumps(rows).encode()
    if suffix == "csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names, lineterminator=rng.choice(["\n", "\r\n"]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    if suffix == "txt":
        return "".join(f"{row.get('text')}\n" for row in rows).encode("utf-8", "surrogatepass")
    if suffix == "parquet":
        out = io.BytesIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns: list[Any] = []
        for name in names:
            values = [row.get(name) for row in rows]
            try:
                column = pa.array(values)
                pq.write_table(pa.table({"x": column}), io.BytesIO())
            except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
                column = pa.array([repr(value) for value in values])
            columns.append(column)
        pq.write_table(pa.Table.from_arrays(columns, names=names), out)
        return out.getvalue()
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    return "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")


def _leaf(row: Any, rng: random.Random) -> tuple[Any, Any]:
    """Find a place in a row: a container and its key."""
    while True:
        key = rng.choice(list(row) if isinstance(row, dict) else range(len(row)))
        if not isinstance(row[key], dict | list) or not row[key] or rng.random() < 0.2:
            return row, key
        row = row[key]


def mutated_data(folder: Path, kind: str, rng: random.Random) -> tuple[Path, dict[str, Any], str]:
    """Write a mutated data file or folder; return its path, the settings that read it, and what was done."""
    home = folder / "mutated"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    rows, options = _rows(kind, rng), dict(QA) if kind.startswith("qa") else {}
    how = rng.choice(
        ["bytes", "bytes", "field", "field", "field", "rename", "literal", "place", "ends"]
    )
    done = how
    raw = _write(rows, kind, rng)
    if how == "bytes":
        raw, done = mutated_bytes(raw, rng)
    elif how == "field":
        value = rng.choice(ODD)
        row, key = _leaf(rng.choice(rows), rng)
        row[key] = value
        done = f"field {key} {value!r:.60}"
        raw = _write(rows, kind, rng)
    elif how == "rename":
        row, key = _leaf(rng.choice(rows), rng)
        name = rng.choice(["Question", "json_row", "", "a b", "\x1b[31m", "text", "prompt", "id"])
        if isinstance(row, dict):
            value = row.pop(key)
            if rng.random() < 0.7:
                row[name] = value
        done = f"rename {key} {name!r}"
        raw = _write(rows, kind, rng)
    elif how == "literal":
        literal = rng.choice(LITERALS)
        row, key = _leaf(rng.choice(rows), rng)
        row[key] = "LITERAL"
        whole = rng.random() < 0.8
        raw = _write(rows, kind, rng).replace(
            b'"LITERAL"' if whole else b"LITERAL", literal.encode()
        )
        done = f"literal {key} {literal:.30}"
        if rng.random() < 0.2:
            name = f'"{key}": '.encode()
            raw = raw.replace(name, name + b'"twice", ' + name, 1)
            done += " twice"
    elif how == "ends":
        done = rng.choice(
            ["bom", "crlf", "cr", "mixed", "blank", "empty", "spaces", "long", "no rows"]
        )
        raw = {
            "bom": codecs.BOM_UTF8 * rng.choice([1, 2]) + raw,
            "crlf": raw.replace(b"\n", b"\r\n"),
            "cr": raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r"),
            "mixed": raw.replace(b"\n", b"\r\n", 1) + b"\n\r\n \n",
            "blank": raw + b"\n" * 5,
            "empty": b"",
            "spaces": b" \n\t\n",
            "long": raw.replace(b"Berapa", b"Berapa " * 30000, 1),
            "no rows": b"[]" if kind.endswith("json") else raw.split(b"\n")[0] + b"\n",
        }[done]
    file = home / kind
    if how == "place":
        path, done = _place(home, kind, raw, rng)
        return path, options, done
    file.write_bytes(raw)
    return file, options, done


def _place(home: Path, kind: str, raw: bytes, rng: random.Random) -> tuple[Path, str]:
    suffix = kind.split(".")[1]
    how = rng.choice(
        ["name", "folder", "loop", "dangling", "suffix", "inside", "two", "bytes", "long"]
    )
    names = [
        "ünï ☃",
        "a b",
        "*",
        "[x]",
        "$HOME",
        "a'b",
        "-x",
        "#1",
        "%20",
        "\x1b[31m",
        "~",
        "train",
        "{}",
    ]
    name = rng.choice(names)
    file = home / f"{name}.{suffix}"
    path: Any = file
    if how in ("name", "folder", "two", "loop"):
        file.write_bytes(raw)
    if how == "folder":
        path = home
    elif how == "two":
        (home / f"other.{rng.choice([suffix, 'csv'])}").write_bytes(raw)
        path = home
    elif how == "loop":
        (home / "loop").symlink_to(home)
        os.symlink("self.jsonl", home / f"self.{suffix}")
        path = rng.choice([home, home / f"self.{suffix}"])
    elif how == "dangling":
        file.symlink_to(home / "nowhere")
    elif how == "suffix":
        path = (
            home
            / f"rows.{rng.choice(['JSONL', 'tsv', 'json', 'csv', 'txt', 'jsonl', 'parquet', 'gz'])}"
        )
        path.write_bytes(raw)
    elif how == "inside":
        file.mkdir()
        (file / kind).write_bytes(raw)
        path = rng.choice([home, file])
    elif how == "bytes":
        odd = os.fsencode(home) + b"/caf\xe9." + suffix.encode()
        with open(odd, "wb") as handle:
            handle.write(raw)
        path = rng.choice([home, Path(os.fsdecode(odd))])
    elif how == "long":
        path = home / ("x" * 300)
    return path, f"place {how} {name!r}"


def unfaithful_rows(path: Path, options: dict[str, Any], data: Any) -> list[str]:
    """Compare the rows that were prepared with what a plain reader finds in the files."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    try:
        rows = [row for file in files if file.suffix[1:] in KINDS for row in _plain(file)]
    except Exception as error:  # whatever the plain reader cannot read
        return [f"accepted, but the plain reader says {type(error).__name__}: {error}"[:200]]
    prepared = data.prepared.rows["train"]
    left_out = any("left out" in note for note in data.prepared.facts["notes"])
    wrong = []
    if len(rows) != len(prepared) and not left_out:
        wrong.append(f"{len(rows)} rows in the file, {len(prepared)} prepared")
    if not options or len(files) != 1:
        return wrong
    for row, encoded in zip(rows, prepared, strict=False):
        if encoded["num_cut"]:
            continue
        wanted = f"{_written(row.get('question'))} {_written(row.get('answer'))}"
        text = data.tokenizer.decode(encoded["input_ids"][:-1], clean_up_tokenization_spaces=False)
        if text != wanted:
            wrong.append(f"{wanted!r:.100} was prepared as {text!r:.100}")
    return wrong


KINDS = ("jsonl", "json", "csv", "txt", "parquet")


def _written(value: Any) -> str:
    return value.text if isinstance(value, _Number) else str(value)


class _Number:
    def __init__(self, text: str) -> None:
        self.text = text


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a field stands twice")
    return dict(pairs)


def _json(text: str) -> Any:
    return json.loads(
        text,
        parse_int=_Number,
        parse_float=_Number,
        parse_constant=_no_constant,
        object_pairs_hook=_once,
    )


def _plain(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return list(pq.read_table(file).to_pylist())
    text = file.read_bytes().decode("utf-8-sig")
    if file.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        header, *rest = [row for row in rows if row]
        if len(set(header)) != len(header):
            raise ValueError("a field stands twice")
        return [dict(zip(header, row, strict=True)) for row in rest]
    if file.suffix == ".json":
        return list(_json(text))
    lines = [line for line in text.split("\n") if line.strip()]
    return [{"text": line} if file.suffix == ".txt" else _json(line) for line in lines]
