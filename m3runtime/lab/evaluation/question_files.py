"""`read_questions`: questions, their answers and the texts that hold them, from files in the usual formats.

Rows come as lines of JSON, as one JSON list, as SQuAD's tree of articles, or as MS MARCO's columns. Each row is one of

- SQuAD: ``question``, ``context``, ``answers`` with ``text``, or a list of such;
- HotpotQA: ``question``, ``answer``, ``context`` of titles and sentences, ``supporting_facts``;
- MS MARCO: ``query``, ``answers``, ``passages`` with ``passage_text`` and ``is_selected``;
- NQ-open, and anybody's own: ``question``, ``answer`` or ``answers`` (a text or a list of texts; none where nothing
  answers it), and ``source``, the sources in a bank that hold the answer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3runtime.errors import InputError

_NO_ANSWER = "No Answer Present."
"""MS MARCO's answer to questions that its passages do not answer."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text that comes with a question."""

    title: str
    text: str

    @property
    def headed(self) -> str:
        """The text below its title, as Markdown."""
        return f"# {self.title}\n\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of a file."""

    question: str
    answers: tuple[str, ...] = ()
    """Accepted answers; none if nothing answers it."""
    right: tuple[Text, ...] = ()
    """The texts that hold the answer,"""
    others: tuple[Text, ...] = ()
    """and others that come with the question."""
    sources: tuple[str, ...] = ()
    """The sources in a bank that hold the answer."""
    where: str = ""
    """Its place in the file, for error messages."""


def read_questions(path: Path) -> list[Asked]:
    """All questions of a file, in its order.

    Raises `InputError` that names the file, and the row, if it cannot be read, or is of no format that is known.
    """
    try:
        content = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    found = []
    for where, row in _rows(content, path):
        try:
            asked = _asked(row, where)
            json.dumps(row, ensure_ascii=False).encode()  # fails for half a character
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"{where}: not a question of a format that is known (see `m3 eval qa --help`): "
                f"{type(error).__name__} {error}"
            ) from None
        found.append(asked)
    if not found:
        raise InputError(f"{path}: there is no question")
    return found


def _rows(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Each row, and where it is."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        yield from _lines(content, path)
        return
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        yield from _articles(whole["data"], path)
    elif isinstance(whole, dict) and isinstance(whole.get("query"), dict):
        for key in whole["query"]:
            columns = {name: of.get(key) for name, of in whole.items() if isinstance(of, dict)}
            yield f"{path}, question {key}", columns
    else:
        for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
            yield f"{path}, question {number}", row


def _lines(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where} is not JSON: {error}") from None


def _articles(articles: Sequence[Any], path: Path) -> Iterator[tuple[str, Any]]:
    """The questions of SQuAD's own files."""
    for number, article in enumerate(articles, 1):
        try:
            for paragraph in article["paragraphs"]:
                for row in paragraph["qas"]:
                    given = {"title": article.get("title", ""), "context": paragraph["context"]}
                    yield f"{path}, question {row.get('id')}", {**row, **given}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, article {number}: not as in SQuAD: {type(error).__name__} {error}") from None


def _asked(row: Mapping[str, Any], where: str) -> Asked:
    if "passages" in row:
        return _marco(row, where)
    question = _text(row["question"])
    context = row.get("context")
    if isinstance(context, str):
        title = str(row.get("title") or "").replace("_", " ")
        return Asked(question, _spans(row["answers"]), (Text(title, _text(context)),), where=where)
    if context is not None:
        return _hotpot(row, question, where)
    given = row["answers"] if "answers" in row else row["answer"]
    return Asked(question, _texts(given), sources=_texts(row.get("source")), where=where)


def _spans(answers: Any) -> tuple[str, ...]:
    """SQuAD's answers: a list of objects, or in the exports of other libraries one object of lists."""
    given = answers["text"] if isinstance(answers, Mapping) else [one["text"] for one in answers]
    return _texts(given)


def _hotpot(row: Mapping[str, Any], question: str, where: str) -> Asked:
    context, facts = row["context"], row["supporting_facts"]
    if isinstance(context, Mapping):
        context = list(zip(context["title"], context["sentences"], strict=True))
    named = set(facts["title"]) if isinstance(facts, Mapping) else {title for title, _ in facts}
    texts = [(Text(_text(title), _text("".join(sentences))), title in named) for title, sentences in context]
    right, others = (tuple(text for text, one in texts if one is wanted) for wanted in (True, False))
    return Asked(question, _texts(row["answer"]), right, others, where=where)


def _marco(row: Mapping[str, Any], where: str) -> Asked:
    passages = row["passages"]
    if isinstance(passages, Mapping):
        passages = [dict(zip(passages, values, strict=True)) for values in zip(*passages.values(), strict=True)]
    texts = [(Text("", _text(one["passage_text"])), bool(one["is_selected"])) for one in passages]
    right, others = (tuple(text for text, one in texts if one is wanted) for wanted in (True, False))
    answers = tuple(answer for answer in _texts(row["answers"]) if answer != _NO_ANSWER)
    return Asked(_text(row["query"]), answers, right, others, where=where)


def _texts(given: Any) -> tuple[str, ...]:
    """A text, a list of texts or nothing, as different texts that are not blank."""
    if given is None or isinstance(given, str):
        given = [given] if given else []
    if not isinstance(given, list):
        raise TypeError(f"an answer is a text or a list of texts, not {given!r:.80}")
    return tuple(dict.fromkeys(_text(one).strip() for one in given if one != ""))


def _text(given: Any) -> str:
    if not isinstance(given, str) or not given.strip():
        raise TypeError(f"a text is needed, not {given!r:.80}")
    return given
