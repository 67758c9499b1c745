"""Text in a report: nothing in it acts, and both languages say the same."""

import string

import pytest
import yaml

from fine_tune.report.inert import markdown, markdown_code, plain
from fine_tune.report.words import FOLDER, LANGUAGES, Words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+1+cmd()", "'+1+cmd()"),
        ("-2+3", "'-2+3"),
        ("\t=cmd()", "\\t=cmd()"),
        (" =cmd()", "' =cmd()"),
        ("-5", "-5"),
        ("+0.25", "+0.25"),
        ("-1.2e-05", "-1.2e-05"),
        ("-", "-"),
        ("a=b", "a=b"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("left\u202eright", "left\\u202eright"),
        ("two\nlines", "two\nlines"),
        ("two\n=cmd()\n-5\n- list", "two\n'=cmd()\n-5\n'- list"),
        ("\n=cmd()", "\n'=cmd()"),
    ],
)
def test_formulas_and_control_characters_become_text(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_markdown_shows_hostile_text_and_runs_none_of_it() -> None:
    shown = markdown(
        "<script>alert(1)</script> ![x](http://evil) `rm` | *b* __c__ a_b @you\n# head"
    )
    assert shown == (
        "&lt;script&gt;alert(1)&lt;/script&gt; \\!\\[x\\](http&#58;//evil) \\`rm\\` \\| \\*b\\* \\_\\_c\\_\\_ a_b "
        "&#64;you \\# head"
    )


def test_code_cannot_leave_its_fence() -> None:
    assert markdown_code(["echo ```", "a\nb\x1b"]) == "````text\necho ```\na\\nb\\x1b\n````"


def test_both_languages_have_the_same_sentences_with_the_same_numbers() -> None:
    texts = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8")) for name in LANGUAGES]
    names = [
        {
            key: {field for _, field, _, _ in string.Formatter().parse(text) if field}
            for key, text in of.items()
        }
        for of in texts
    ]
    assert names[0] == names[1]
    assert len(names[0]) > 150
    same = {key for key in texts[0] if texts[0][key] == texts[1][key]}
    assert len(same) < 40, sorted(same)


def test_numbers_are_written_as_each_language_does() -> None:
    en, indonesian = Words("en"), Words("id")
    assert (en.number(1234567), indonesian.number(1234567)) == ("1,234,567", "1.234.567")
    assert (en.number(0.123456), indonesian.number(0.123456)) == ("0.1235", "0,1235")
    assert (en.rate(1.96e-4), indonesian.rate(1.96e-4)) == ("1.96e-04", "1,96e-04")
    assert (en.share(0.123), indonesian.share(0.123)) == ("12.3 %", "12,3 %")
    assert en.number(float("nan")) == "NaN" and en.number(float("inf")) == "∞"
    assert [en.seconds(s) for s in (0.42, 12, 185, 3725)] == [
        "0.42 s",
        "12 s",
        "3 min 05 s",
        "1 h 02 min",
    ]
