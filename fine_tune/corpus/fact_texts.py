"""Texts that tell the facts of ``facts.py`` and ask for none of them: what a language model can be pretrained on."""

from collections.abc import Iterator
from typing import Any

from fine_tune.corpus.facts import Fact, digest, filled, relation_facts
from fine_tune.errors import UserError

SUMS_PER_TEXT, SUBJECTS_PER_TEXT = 6, 3


def fact_texts(relations: dict[str, dict[str, Any]], count: int) -> Iterator[str]:
    """Write texts, each of what is known about a few subjects, or of a few sums; the same facts give the same texts.

    Args:
        relations: Those with `statements` are told, the facts that training sees; a statement tells a fact with
            {subject} (or {a} and {b}) and {answer}.
        count: Texts; all subjects come by turns, in other words, order and company each time.

    Raises:
        UserError: No relation has statements, or a statement holds a question.
    """
    told = {name: relation for name, relation in relations.items() if relation.get("statements")}
    if not told:
        raise UserError("--corpus_texts: no relation has `statements`, so there is nothing to tell")
    facts = {
        name: [f for f in relation_facts(name, told[name]) if f.is_trained] for name in sorted(told)
    }
    if not any(facts.values()):
        raise UserError("--corpus_texts: the relations with `statements` have no facts to tell")
    _refuse_questions(relations, told, facts)
    written, version = 0, 0
    while True:
        for text in _texts(facts, version):
            if written == count:
                return
            yield " ".join(
                sentence for group in text for sentence in _sentences(group, told, version)
            )
            written += 1
        version += 1


def _texts(facts: dict[str, list[Fact]], version: int) -> list[list[list[Fact]]]:
    """Return the facts of each text of one round, by subject; subjects and sums in new company each time."""
    by_subject: dict[str, list[Fact]] = {}
    sums: list[list[Fact]] = []
    for fact in (fact for of_relation in facts.values() for fact in of_relation):
        if "subject" in fact.slots:
            by_subject.setdefault(str(fact.slots["subject"]), []).append(fact)
        else:
            sums.append([fact])
    by_turns = _shuffled(list(by_subject.values()), version)
    texts = [
        by_turns[i : i + SUBJECTS_PER_TEXT] for i in range(0, len(by_turns), SUBJECTS_PER_TEXT)
    ]
    sums = _shuffled(sums, version)
    texts += [sums[i : i + SUMS_PER_TEXT] for i in range(0, len(sums), SUMS_PER_TEXT)]
    return sorted(texts, key=lambda text: digest("text", text[0][0].id, str(version)))


def _shuffled(groups: list[list[Fact]], version: int) -> list[list[Fact]]:
    return sorted(groups, key=lambda group: digest(group[0].id, str(version)))


def _sentences(group: list[Fact], told: dict[str, dict[str, Any]], version: int) -> Iterator[str]:
    for fact in sorted(group, key=lambda fact: digest("order", fact.id, str(version))):
        statements = told[_relation(fact)]["statements"]
        name = min(statements, key=lambda name: digest("words", name, fact.id, str(version)))
        yield filled(statements[name], fact, name, answer=fact.answer)


def _refuse_questions(
    relations: dict[str, dict[str, Any]], told: dict[str, Any], facts: dict[str, list[Fact]]
) -> None:
    """Refuse statements that hold a question, of their own fact or of any other about the same words."""
    for name, relation in told.items():
        for fact in facts[name]:
            asked = {
                f"{other}:{key}": filled(text, fact, key)
                for other, of_other in relations.items()
                for key, text in {
                    **of_other["phrasings"],
                    **of_other.get("new_phrasings", {}),
                }.items()
                if ("{subject}" in text) == ("subject" in fact.slots)
            }
            for key, text in relation["statements"].items():
                statement = filled(text, fact, key, answer=fact.answer)
                found = next((q for q, words in asked.items() if words in statement), None)
                if found is not None:
                    raise UserError(
                        f"relation {name}: the statement {key} ({statement!r}) holds the question {found}, which may "
                        "be held out: change its words"
                    )


def _relation(fact: Fact) -> str:
    return fact.id.split(":")[0]
