"""The analysis of a run's curves in sentences, and the conclusion."""

from typing import Any

from fine_tune.report.analysis import Analysis, Evidence, analyse
from fine_tune.report.blocks import Section, Sentences
from fine_tune.report.curves import events
from fine_tune.report.observations import Finding, Tone
from fine_tune.report.record import RunRecord
from fine_tune.report.results import judged, unopened
from fine_tune.report.words import Words

BAD_ENOUGH = ("diverged", "overfitted", "worsened")  # to be told before a run has ended


def analysis_of(run: RunRecord) -> Analysis:
    """Analyse a run's curves."""
    found, listed = events(run), run.record.get("events", [])
    broke = [e.get("step") for e in listed if e.get("kind") == "fallback" and not e.get("to")]
    ended = broke and isinstance(broke[-1], int) and run.step < broke[-1]  # else it went on
    clip = run.number("trainer.gradient_clip_val")
    return analyse(
        Evidence(
            train=run.curve("train/loss"),
            validation=run.curve("val/loss"),
            grad_norm=run.curve("grad_norm"),
            num_spikes=len(found.get("loss_spike", [])),
            non_finite_steps=tuple(found.get("fallback", [])),
            accuracy=(
                run.curve("val/rewards_accuracy"),
                run.curve("val/rewards_accuracy_low"),
                run.curve("val/rewards_accuracy_high"),
            ),
            stopped_step=broke[-1] if ended else None,
            clip=clip,
        )
    )


def sentence(finding: Finding, words: Words) -> str:
    """Write a finding in words."""
    numbers: dict[str, Any] = dict(finding.numbers)
    if "clipped" in numbers:
        numbers["clipped"] = words.share(float(numbers["clipped"]))
    if "change" in numbers:
        level = abs(numbers["before"])
        numbers["relative"] = words.share(abs(numbers["change"]) / level if level else 0.0)
    return words(finding.key, **numbers)


def analysis(run: RunRecord, found: Analysis, words: Words) -> Section:
    """Write the analysis: the main finding, then what else the numbers say."""
    findings = [found.main, *found.others]
    told = [(finding.tone, sentence(finding, words)) for finding in findings]
    if run.status == "running":
        told[0] = (told[0][0], words("so_far", finding=told[0][1]))
    return Section("analysis", words("analysis"), [Sentences(told)])


def conclusion(run: RunRecord, found: Analysis, words: Words) -> Section:
    """Say what the run amounts to, and what to do next."""
    told: list[tuple[Tone, str]] = []
    if run.status != "running" or found.verdict in BAD_ENOUGH:  # else it is too early for one
        unfinished = found.verdict == "improving" and run.status != "finished"
        verdict = f"verdict_{found.verdict}{'_unfinished' if unfinished else ''}"
        told.append((found.main.tone, words(verdict)))
    if run.status != "finished":
        told.append(("note" if run.status == "running" else "bad", words("not_finished")))
    best, step = run.record.get("best"), run.record.get("best_step")
    if best is not None and step is not None and run.record.get("best_score") is not None:
        told.append(("note", words("take_best", step=step, name=str(best))))
    targets = judged(run)
    if targets:
        reached = sum(target.is_reached for target in targets)
        tone: Tone = "good" if reached == len(targets) else "bad"
        told.append((tone, words("targets_reached", reached=reached, count=len(targets))))
    if not run.own_results("test"):
        told.append(("note", unopened(run, words)))
    return Section("conclusion", words("conclusion"), [Sentences(told)])
