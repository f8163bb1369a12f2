"""The report: one page that needs nothing else, says what was found and what was not, and shows text as text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import JsonValue
from tiny_policies import saved_policy

from deploy.gate import policy_gate
from deploy.registry import Registry
from deploy.settings import GateSettings
from deploy.versions import Draft, VersionKind
from feedback.records import Candidate, Comparison, Prompt
from train import report
from train.errors import DatasetUnusable
from train.measures import completed, plots
from train.measures.completed import Completed
from train.measures.plots import Range
from train.report import number, read_history
from train.running.board import Board

ODD_TASK = r"$\costs$ <script> 5"
HISTORY = [
    {"iteration": float(i), "score": 0.1 * i, "kl_to_reference": 0.05 * i, "seconds": 1.0}
    | {"score[list]": 0.2 * i, f"score[{ODD_TASK}]": 0.3 * i}
    for i in range(5)
]
MEASURED = {"nonfinite_weights": 0.0, "kl_to_reference": 1.25, "kl_se": 0.1, "eos_share": 0.5, "distinct_2": 0.3}
PAGE_COLOURS = ("muted", "rule", "series-1", "series-2")
NASTY = '<script>alert("x")</script> & <b>bold</b>'


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Policy 1 that was imported, reward model 1, and policy 2 that a round made of them."""
    found = Registry(tmp_path / "state")
    found.publish(Draft(kind=VersionKind.POLICY), saved_policy(tmp_path / "first"))
    metrics = {"held_out_accuracy": 0.7, "held_out_accuracy_low": 0.6, "held_out_accuracy_high": 0.8}
    bins = {"calibration_0_predicted": 0.55, "calibration_0_observed": 0.5}
    fitted = Draft(kind=VersionKind.REWARD_MODEL, metrics=metrics | bins | {"previous_held_out_accuracy": 0.65})
    found.publish(fitted, saved_policy(tmp_path / "fitted"))
    metrics = MEASURED | {f"parent_{name}": value / 2 for name, value in MEASURED.items()}
    draft = Draft(
        kind=VersionKind.POLICY,
        parent=1,
        reference_policy=1,
        reward_model=1,
        run="round-7",
        comparisons=123,
        settings={"ppo": {"kl_coef": 0.05, "target_kl": None}},
        metrics=metrics,
        gate=policy_gate(MEASURED, {"completion_tokens": 9.0}, GateSettings()),
    )
    found.publish(draft, saved_policy(tmp_path / "second"))
    return found


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The run of policy 2, with all that a round leaves."""
    run = tmp_path / "state" / "runs" / "round-7"
    run.mkdir(parents=True)
    (run / "ppo-history.jsonl").write_text("".join(json.dumps(numbers) + "\n" for numbers in HISTORY))
    (run / "dataset.json").write_text(json.dumps({"superseded": 17}))
    with Board(run) as board:
        for step in range(1, 201):
            board("reward_model", step, 200, {"loss": 1 / step})

    def made(prompt: int, completion: str, score: float) -> Completed:
        return Completed(
            prompt_ids=(prompt,), prompt=f"prompt {prompt}", completion=completion, tokens=3, finished=True, score=score
        )

    completed.write(run / report.COMPLETIONS, [made(2, NASTY, 1.0), *(made(n, "new", 0.0) for n in range(3, 8))])
    completed.write(run / report.PARENT_COMPLETIONS, [made(n, f"old {n}", 0.5) for n in range(2, 8)])
    return run.parent


def judged(prompt: str, best: int) -> Comparison:
    return Comparison(
        id="cmp_1",
        created=1.0,
        principal="alice",
        labeler="L",
        prompt=Prompt(text=prompt),
        source="task",
        candidates=(Candidate(text="a", policy_version=2), Candidate(text="b", policy_version=1)),
        ranking=((best,), (1 - best,)),
    )


def test_the_page_needs_nothing_else_and_runs_nothing(registry: Registry, runs: Path) -> None:
    path = report.write(registry, 2, runs)
    assert path == runs / "round-7" / "report.html"
    page = Page(path)
    assert not page.names() & {"script", "link", "img", "iframe", "object", "embed"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not re.search(r'(?:src|href)="(?!#)', path.read_text())
    assert NASTY in page.text
    assert ODD_TASK in page.text, "a task has whatever name people give it, in a plot's legend, too"
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))


def test_the_page_says_what_was_found(registry: Registry, runs: Path) -> None:
    page = Page(report.write(registry, 2, runs, comparisons=[judged("p", 0), judged("q", 0), judged("r", 1)]))
    said = re.sub(r"\s+", " ", page.text)
    assert "refused by its gate" in said
    assert "eos_share is 0.5; it must be at least 0.95" in said
    assert "1.25 ± 0.196" in said  # KL, 1.96 standard errors
    assert "66.7 % preferred to version 1 by labelers" in said
    assert "16.7 % preferred to version 1 by the reward model" in said  # one of six prompts
    assert "0.700 [0.600, 0.800]" in said
    assert "superseded 17" in said
    assert "ppo.kl_coef 0.0500" in said
    assert len(re.findall(r"\bold \d", page.text)) == 6
    plotted = [title for title in ("score, by task", "entropy", "training loss, nats", "so sure") if title in said]
    assert plotted == ["score, by task", "training loss, nats", "so sure"]


def test_what_was_not_measured_is_named(registry: Registry, runs: Path) -> None:
    found = Page(report.write(registry, 2, runs)).text.partition("Not measured")[2]
    assert "win rate over the parent by labelers" in found
    assert "false claims" in found
    assert "KL to the reference" not in found


def test_a_version_without_a_run_has_a_page(registry: Registry, runs: Path) -> None:
    path = report.write(registry, 1, runs)
    assert path == runs / "policy-1" / "report.html"
    said = re.sub(r"\s+", " ", Page(path).text)
    assert "never gated" in said
    assert "no run of the worker made it" in said
    assert "win rates: it has no parent" in said
    assert "the course of training: there is no PPO run" in said


def test_a_damaged_run_is_refused(registry: Registry, runs: Path) -> None:
    (runs / "round-7" / "ppo-history.jsonl").write_text("{broken")
    with pytest.raises(DatasetUnusable, match=r"ppo-history\.jsonl"):
        report.write(registry, 2, runs)


def test_a_history_is_read_back(runs: Path, tmp_path: Path) -> None:
    assert read_history(runs / "round-7" / "ppo-history.jsonl") == HISTORY
    with pytest.raises(DatasetUnusable, match="missing"):
        read_history(tmp_path / "missing")


@pytest.mark.parametrize(
    "svg",
    [
        plots.lines({"a": [(0, 1), (1, float("nan")), (2, 3)], "b": [(0, 2)]}, "step"),
        plots.ranges([Range("gold", 0.6, 0.5, 0.7)], 0.5),
        plots.calibration([(0.6, 0.4), (0.9, 1.0)]),
    ],
)
def test_a_drawing_takes_the_pages_colours(svg: str) -> None:
    drawn = ElementTree.fromstring(svg)
    assert drawn.tag.endswith("svg")
    colours = re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)
    assert {"var(--muted)", "var(--series-1)"} <= set(colours) <= {"none", *(f"var(--{name})" for name in PAGE_COLOURS)}


def test_numbers_are_short() -> None:
    values: list[JsonValue] = [0, 1.0, 0.5, 12.345, 123456.7, 0.00012345, -0.0456, None, True, "x", [1]]
    assert list(map(number, values)) == [
        "0",
        "1",
        "0.500",
        "12.3",
        "123457",
        "0.000123",
        "-0.0456",
        "–",
        "true",
        "x",
        "[1]",
    ]
