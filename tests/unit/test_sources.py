"""Every place rows can come from gives the same rows; splits are found; content is fingerprinted."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from harness import write_rows

from fine_tune.data import sources
from fine_tune.data.files import rows_of
from fine_tune.data.sources import ALL, Source, fingerprint, locate_row, read_source
from fine_tune.errors import UserError

ROWS = [{"question": f"soal {i}", "answer": f"jawab {i}"} for i in range(5)]


def save(folder: Path, kind: str) -> Path:
    data = Dataset.from_list(ROWS)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_rows(path, ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        data.to_csv(path)
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "saved":
        data.save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        write_rows(path / "a.jsonl", ROWS[:2])
        write_rows(path / "b.jsonl", ROWS[2:])
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "folder"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = read_source(Source(str(save(tmp_path, kind))), tmp_path / "cache")
    assert list(rows) == [ALL]
    assert rows_of(rows[ALL][:]) == ROWS


def test_text_is_a_row_per_line_without_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("satu\n\ndua\n")
    rows = read_source(Source(str(tmp_path / "rows.txt")), tmp_path / "cache")
    assert rows_of(rows[ALL][:]) == [{"text": "satu"}, {"text": "dua"}]


def test_splits_are_found_in_folders_saved_data_and_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    train = write_rows(folder / "train-00000-of-00001.jsonl", ROWS[:3])
    dev = write_rows(folder / "dev.jsonl", ROWS[3:])
    DatasetDict(
        train=Dataset.from_list(ROWS[:3]), validation=Dataset.from_list(ROWS[3:])
    ).save_to_disk(tmp_path / "saved")
    by_name = {"train": str(train), "validation": str(dev)}
    for path in (str(folder), str(tmp_path / "saved"), by_name):
        rows = read_source(Source(path), tmp_path / "cache")
        assert {split: rows_of(part[:]) for split, part in rows.items()} == {
            "train": ROWS[:3],
            "validation": ROWS[3:],
        }


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    before = fingerprint(Source(str(file)))
    assert before == fingerprint(Source(str(write_rows(tmp_path / "other.jsonl", ROWS))))
    write_rows(file, [*ROWS[:-1], {"question": "soal 4", "answer": "lain"}])
    assert fingerprint(Source(str(file))) != before


def test_a_row_is_located_past_blank_lines_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n\n{"q": 2}\n')
    (tmp_path / "b.jsonl").write_text('\n{"q": 3}\n')
    assert locate_row(Source(str(tmp_path)), ALL, 1) == f"{tmp_path}/a.jsonl:3"
    assert locate_row(Source(str(tmp_path)), ALL, 2) == f"{tmp_path}/b.jsonl:2"


def test_several_broken_lines_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": \n[1]\n{"a": 2}\n')
    with pytest.raises(UserError) as caught:
        read_source(Source(str(file)), tmp_path / "cache")
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        f"{file}:2",
        f"{file}:3",
    ]


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text("question,answer\n1,2\n")
    with pytest.raises(UserError, match="files of one kind"):
        read_source(Source(str(tmp_path)), tmp_path / "cache")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_values_stay_as_they_were_written(tmp_path: Path, kind: str) -> None:
    values = ["007", "1.50", "1945-08-17", "NA", "True", ""]
    file = tmp_path / f"rows.{kind}"
    if kind == "csv":
        file.write_text("answer\n" + "".join(f'"{value}"\n' for value in values))
    else:
        write_rows(file, [{"answer": value} for value in values])
    rows = rows_of(read_source(Source(str(file)), tmp_path / "cache")[ALL][:])
    assert [row["answer"] for row in rows] == values


@pytest.mark.parametrize(("mark", "named"), [(";", "semicolons"), ("\t", "tabs")])
@pytest.mark.parametrize("answer", ["Jakarta", "Jakarta, kota"])
def test_another_separator_than_the_comma_is_named(
    tmp_path: Path, mark: str, named: str, answer: str
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"question{mark}answer\nIbu kota?{mark}{answer}\n", "utf-8-sig")
    with pytest.raises(UserError, match=f"{named} stand between the fields") as told:
        read_source(Source(str(file)), tmp_path / "cache")
    assert len(told.value.problems) == 1


def test_a_row_longer_than_the_header_is_told_beside_the_header(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\n1,2,3\n")
    with pytest.raises(UserError, match=r"row 1: other fields than the header's .*'answer'\]"):
        read_source(Source(str(tmp_path / "rows.csv")), tmp_path / "cache")


def test_numbers_of_json_keep_their_digits(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"answer": 5}\n{"answer": 5.50}\n{"answer": 12345678901234567890}\n')
    rows = rows_of(read_source(Source(str(file)), tmp_path / "cache")[ALL][:])
    assert [str(row["answer"]) for row in rows] == ["5", "5.50", "12345678901234567890"]


def test_renaming_a_file_of_a_folder_changes_the_fingerprint(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "test.jsonl", ROWS)
    before = fingerprint(Source(str(tmp_path)))
    (tmp_path / "test.jsonl").rename(tmp_path / "dev.jsonl")
    assert fingerprint(Source(str(tmp_path))) != before


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, kind: str) -> None:
    text = {"jsonl": '{"text": "satu"}\n', "csv": "text\nsatu\n", "txt": "satu\n"}[kind]
    file = tmp_path / f"rows.{kind}"
    file.write_text(text, encoding="utf-8-sig")
    rows = rows_of(read_source(Source(str(file)), tmp_path / "cache")[ALL][:])
    assert rows == [{"text": "satu"}]


def on_the_hub(monkeypatch: pytest.MonkeyPatch, **splits: list[dict[str, str]]) -> None:
    """Let every hub name lead to these rows, as ``load_dataset`` gives them."""
    data = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    monkeypatch.setattr(sources, "_hub_commit", lambda *_: "sha")
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: data)


def test_rows_of_the_hub_that_are_all_train_have_no_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_hub(monkeypatch, train=ROWS)
    rows = read_source(Source("owner/name"), tmp_path / "cache")
    assert {split: rows_of(part[:]) for split, part in rows.items()} == {ALL: ROWS}
    on_the_hub(monkeypatch, train=ROWS[:3], validation=ROWS[3:])
    assert list(read_source(Source("owner/name"), tmp_path / "cache")) == ["train", "validation"]


def test_a_row_of_the_hub_is_located_by_its_number() -> None:
    assert locate_row(Source("owner/name"), ALL, 2) == "owner/name: row 3"
