"""`grounding_table`: do attention, the search and the model itself know which answers came from a memory?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from m3runtime.adapters.answers import Answer
from m3runtime.lab.evaluation.modes import Item, Mode
from m3runtime.lab.evaluation.report import Table
from m3runtime.lab.evaluation.statistics import mean, separation

LOST = 0.03
"""The share of right answers that a threshold may decline."""
FIGURES = ("leader", "lead", "share", "likelihood", "evidence")
"""The names of `grounded`."""
SIGNALS: Mapping[str, str] = {
    "score": "the score of the nearest memory",
    "lead": "attention to the leading memory, of that to all",
    "likelihood": "the mean log-probability of the answer's tokens",
    "likelihood and lead": "both, the logarithm of the lead added to the other",
    "evidence": "the evidence: the lead, and words of question and answer in the leading memory",
}


def grounded(answer: Answer) -> dict[str, Any]:
    """The record of an answer's `Grounding` and log-probabilities; empty if there was nothing to read, or to say."""
    if answer.grounding is None or answer.grounding.leader is None or not answer.log_probs:
        return {}
    return {
        "leader": answer.grounding.leader,
        "lead": answer.grounding.lead,
        "share": answer.grounding.share,
        "likelihood": float(np.mean([one.log_prob for one in answer.log_probs])),
        "evidence": answer.evidence,
    }


def without_figures(answers: Mapping[Mode, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Answers by mode and key without the figures of `grounded`.

    Their last digits depend on who was in a batch, which is a matter of time.
    """
    return {
        mode: {key: {name: x for name, x in one.items() if name not in FIGURES} for key, one in by_key.items()}
        for mode, by_key in answers.items()
    }


def grounding_table(
    items: Sequence[Item], answers: Mapping[str, Mapping[str, Any]], seed: int, floor: float | None
) -> Table | None:
    """The table of one mode; None without right answers, or questions whose answer is nowhere.

    ``floor`` is ``generate.grounding_floor``.
    """
    told = [(item, answers[item.key]) for item in items if "lead" in answers[item.key]]
    right = [(item, answer) for item, answer in told if answer.get("right")]
    nowhere = [(item, answer) for item, answer in told if item.right is None]
    if not right or not nowhere:
        return None
    led = mean([float(answer["leader"] == item.right) for item, answer in right], seed)
    rows: list[tuple[object, ...]] = [("right answers that attention read most from the right memory", led, "-")]
    rows += [
        (f"attention to memories, {name}", mean([answer["share"] for _, answer in group], seed), "-")
        for name, group in (("right answers", right), ("answers to what is nowhere", nowhere))
    ]
    threshold = 0.0
    for signal, name in SIGNALS.items():
        of = _SIGNALS[signal]
        ours, others = ([of(*one) for one in group] for group in (right, nowhere))
        threshold = float(np.quantile(ours, LOST, method="lower"))
        rows.append((name, separation(ours, others, seed), mean([float(x < threshold) for x in others], seed)))
    wrong = [(item, answer) for item, answer in told if answer.get("right") is False]
    if floor is not None:
        rows += [
            (f"marked as not grounded, {name}", mean([float(one["evidence"] < floor) for _, one in group], seed), "-")
            for name, group in (
                ("right answers", right),
                ("wrong answers", wrong),
                ("answers to what is nowhere", nowhere),
            )
            if group
        ]
    return Table(
        "Grounding",
        ("", "share, or area under the ROC curve", f"declined at {LOST:.0%} of right answers lost"),
        tuple(rows),
        "The area tells right answers from answers to questions whose answer is nowhere: 0.5 by chance, 1 without "
        "error. The thresholds were set on the same right answers; that of the evidence, a value for "
        f"generate.grounding_floor, is {threshold:.3f}.",
    )


_SIGNALS: Mapping[str, Callable[[Item, Mapping[str, Any]], float]] = {
    "score": lambda item, _: item.recalled[0].score,
    "lead": lambda _, answer: float(answer["lead"]),
    "likelihood": lambda _, answer: float(answer["likelihood"]),
    "likelihood and lead": lambda _, answer: float(answer["likelihood"] + np.log(answer["lead"])),
    "evidence": lambda _, answer: float(answer["evidence"]),
}
