"""What a run measured beside its curves: the test split with intervals, targets, answers before and after."""

from typing import Any

from fine_tune.report.blocks import Section, Sentences, Table
from fine_tune.report.intervals import wilson
from fine_tune.report.observations import Tone
from fine_tune.report.record import RunRecord, is_number
from fine_tune.report.targets import Target, judge
from fine_tune.report.words import Words
from fine_tune.runs.answers import ANOTHER, OF_ANSWERS, is_another
from fine_tune.runs.results import is_of_own_rows, own_openings

MOST_ANSWERS, MOST_CHARACTERS = 16, 400
Ends = tuple[float, float]


def test(run: RunRecord, words: Words) -> Section:
    """List what each opening of the test split measured, with 95 % intervals."""
    results = run.results("test")
    if not results:
        return Section("test", words("test"), [Sentences([("note", unopened(run, words))])])
    rows = []
    for result in results:
        when = str(result.get("time", "?"))[:16].replace("T", " ")
        checkpoint = str(result.get("checkpoint") or words("as_configured"))
        tested = _tested(run, result, words)
        for name in result["metrics"]:
            if name.startswith("test/") and not name.endswith(("_low", "_high")):
                value = words.number(float(result["metrics"][name]))
                ends, counted = interval_of(run, result, name)
                told = words("no_interval") if ends is None else shown_interval(ends, words)
                rows.append([name, value, told, counted, tested, checkpoint, when])
    head = [words(k) for k in ("metric", "value", "interval_95", "counted", "tested_rows")]
    head += [words("checkpoint"), words("when")]
    own, others = own_openings(run.record)
    if "test_openings" not in run.record:  # an older version wrote it
        own, others = len(results), 0
    opened = words("opened", count=own)
    opened += f" {words('opened_others', count=others)}" if others else ""
    table = Table(head, rows, note=words("interval_note"), stacks=True)
    return Section("test", words("test"), [Sentences([("note", opened)]), table])


def unopened(run: RunRecord, words: Words) -> str:
    """Say why there is no result of the test split."""
    splits = run.record.get("num_rows")
    if splits and "test" not in splits:
        return words("test_no_split")
    own, _ = own_openings(run.record)
    key = "test_under_way" if run.is_owned else "test_no_result"
    return words(key, count=own) if own else words("test_sealed")


def interval_of(run: RunRecord, result: dict[str, Any], name: str) -> tuple[Ends | None, str]:
    """Return the 95 % interval of a metric, and of what count it is a share, where they are known."""
    metrics = result["metrics"]
    ends = (metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))
    if None in ends and isinstance(result.get("intervals"), dict):
        noted = result["intervals"].get(name)
        ends = tuple(noted) if isinstance(noted, list) and len(noted) == 2 else (None, None)
    if all(map(is_number, ends)):
        return (float(ends[0]), float(ends[1])), ""  # type: ignore[arg-type]
    counted = result.get("counted")
    pair = counted.get(name) if isinstance(counted, dict) else None
    if isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) and pair[1] > 0:
        return wilson(pair[0] / pair[1], int(pair[1])), f"{int(pair[0])} / {int(pair[1])}"
    if (
        name in OF_ANSWERS
    ):  # of a record without counts: the answers, if they are of this test alone
        stage = f"test {result.get('checkpoint') or 'untrained'}"
        answers = [answer for answer in run.answers if answer.get("stage") == stage]
        counts = {
            "test/exact_match": sum(bool(answer.get("exact_match")) for answer in answers),
            f"test/{ANOTHER}": sum(is_another(answers)),
        }
        if answers and abs(counts[name] / len(answers) - metrics[name]) < 1e-6:
            count = counts[name]
            return wilson(count / len(answers), len(answers)), f"{count} / {len(answers)}"
    return None, ""


def _tested(run: RunRecord, result: dict[str, Any], words: Words) -> str:
    """Say on which rows: the run's own test split, or others."""
    count = result.get("num_rows")
    rows = words.number(count) if is_number(count) else words("unknown")
    if is_of_own_rows(run.record, result):
        return rows
    return words("other_rows", rows=rows, hash=str(result.get("test_hash"))[:8])


def shown_interval(ends: Ends, words: Words) -> str:
    """Write an interval."""
    return " – ".join(words.number(end).replace("-", "−") for end in ends)


def judged(run: RunRecord) -> list[Target]:
    """Hold what the run measured against its targets."""
    given = run.setting("targets")
    known = given.items() if isinstance(given, dict) else ()
    goals = {str(name): float(goal) for name, goal in known if isinstance(goal, int | float)}
    return judge(run.own_results("validation") + run.own_results("test"), goals)


def targets(run: RunRecord, words: Words) -> Section:
    """Say which targets were reached."""
    told: list[tuple[Tone, str]] = []
    for target in judged(run):
        named: dict[str, Any] = {"name": target.name, "goal": target.goal}
        if target.measured is None:
            told.append(("note", words("target_unmeasured", **named)))
        elif target.is_reached:
            told.append(("good", words("target_reached", **named, value=target.measured)))
        else:
            told.append(("bad", words("target_missed", **named, value=target.measured)))
    return Section(
        "targets", words("targets"), [Sentences(told or [("note", words("no_targets"))])]
    )


def answers(run: RunRecord, words: Words) -> Section:
    """Lay the answers before and after training side by side."""
    before = {_asked(a): a for a in run.answers if a.get("stage") == "before"}
    stages = [str(a["stage"]) for a in run.answers if str(a.get("stage")).startswith("after ")]
    shown = [a for a in run.answers if stages and a.get("stage") == stages[-1]]
    if not stages:  # killed, or still running: those before training are all there are
        shown = [{k: v for k, v in a.items() if k != "answer"} for a in before.values()]
    if not shown:
        return Section("answers", words("answers"), [Sentences([("note", words("no_answers"))])])
    pairs = any("rejected" in answer for answer in shown)
    wanted = ["expected", "rejected"] if pairs else ["expected"]
    rows = []
    note = ""
    if len(shown) > MOST_ANSWERS:
        note = words("answers_shown", shown=MOST_ANSWERS, count=len(shown))
    for answer in sorted(shown, key=lambda a: str(a.get("row_id")).zfill(12))[:MOST_ANSWERS]:
        earlier = before.get(_asked(answer), {})
        texts = [answer.get("prompt"), *(answer.get(name) for name in wanted)]
        texts += [earlier.get("answer"), answer.get("answer")]
        odds = [a["log_odds"] for a in (earlier, answer) if isinstance(a.get("log_odds"), float)]
        told = [" → ".join(words.fixed(value, 2) for value in odds)] if pairs else []
        rows.append([*(_shortened(text, words) for text in texts), *told])
    expected = ["chosen", "rejected"] if pairs else ["expected"]
    names = ["asked", *expected, "before", "after", *(["log_odds"] if pairs else [])]
    head = [words(name) for name in names]
    table = Table(head, rows, num_text=len(names), note=note, stacks=True)
    return Section("answers", words("answers"), [table])


def _asked(answer: dict[str, Any]) -> tuple[str, str]:
    return str(answer.get("row_id")), str(answer.get("prompt"))


def _shortened(text: Any, words: Words) -> str:
    if text is None:
        return words("no_answer_yet")
    text = str(text)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
