"""The report of a policy version: one HTML page that holds all of it, plots included, and runs no script.

What it was made from, whether it may take traffic and why, how it compares with its parent in the eyes of labelers, of
the reward model and of gold, how training went, and some completions of both to read. What was not measured is named.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import jinja2
from pydantic import JsonValue
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deploy.errors import DeployError
from deploy.files import replace_atomically
from deploy.gate import GateReport
from deploy.registry import Registry
from deploy.versions import Manifest, Version, VersionKind
from feedback.records import Comparison
from train.errors import DatasetUnusable
from train.measures import completed, plots, win_rate
from train.measures.completed import Completed
from train.measures.figure_names import CURVES, FIGURES, REWARD_MODEL_FIGURES, TASK_CURVES, WIN_RATES
from train.measures.plots import Points, Range
from train.ppo import HISTORY_FILE
from train.running.board import FOLDER

PAGE, COMPLETIONS, PARENT_COMPLETIONS = "report.html", "completions.jsonl", "parent_completions.jsonl"
"""In the run's directory: the report, and the completions it quotes."""

EXAMPLES = 4
"""Prompts quoted of each sort: where the score rose most, where it changed least, where it fell most."""

LOSS = "reward_model/loss"
"""Where the run's TensorBoard files have the reward model's loss."""

LOSS_POINTS = 100
CALIBRATION = re.compile(r"calibration_\d+_predicted")

History = Sequence[Mapping[str, float]]
"""The numbers of each iteration, as ``ppo.run`` keeps them."""


@dataclass(frozen=True)
class Row:
    """A figure of the version beside its parent's; text, with the interval where there is one."""

    label: str
    value: str
    parent: str
    change: str


@dataclass(frozen=True)
class Plot:
    """An SVG and what it shows."""

    title: str
    svg: str


@dataclass(frozen=True)
class Example:
    """One prompt with a completion of each of the two versions."""

    prompt: str
    ours: Completed
    theirs: Completed


@dataclass(frozen=True)
class Facts:
    """All that the page says."""

    version: Manifest
    where: Path
    lineage: list[Manifest]
    reward_model: Manifest | None
    gates: list[tuple[Manifest, GateReport]]
    win_rates: list[Range]
    win_rate_plot: str
    rows: list[Row]
    reward_model_rows: list[Row]
    curves: list[Plot]
    reward_model_plots: list[Plot]
    examples: dict[str, list[Example]]
    counts: dict[str, float]
    missing: list[str] = field(default_factory=list)


def write(registry: Registry, number: int, runs: Path, *, comparisons: Sequence[Comparison] | None = None) -> Path:
    """Write the report of policy version ``number``.

    Args:
        registry: where the version and its ancestors are.
        number: the version.
        runs: directory of the runs, ``state/runs``.
        comparisons: those in force (``feedback.controls.in_force(...).ordinary``), for the labelers' win rate over
            the parent; None where the log was not read.

    Returns:
        The page: ``runs/<run>/report.html``; for a version that no run made, ``runs/policy-<number>/report.html``.

    Raises:
        DeployError: where there is no such version.
        DatasetUnusable: where a file of its run is damaged.
    """
    version = registry.get(VersionKind.POLICY, number)
    run = runs / (version.manifest.run or f"policy-{number}")
    run.mkdir(parents=True, exist_ok=True)
    page = _ENVIRONMENT.get_template("report.html.j2").render(facts=gather(registry, version, run, comparisons))
    replace_atomically(run / PAGE, page.encode())
    return run / PAGE


def gather(registry: Registry, version: Version, run: Path, comparisons: Sequence[Comparison] | None) -> Facts:
    """What there is to say of a version; raises as ``write``."""
    manifest = version.manifest
    missing: list[str] = []
    reward_model = _reward_model(registry, manifest, missing)
    ours, theirs = _completions(run, missing)
    found = _win_rates(manifest, comparisons, ours, theirs, missing)
    ranges = [Range(label, *(found[name + end] for end in ("", "_low", "_high"))) for name, label in _known_of(found)]
    return Facts(
        version=manifest,
        where=version.path,
        lineage=_lineage(registry, manifest),
        reward_model=reward_model,
        gates=[(one, one.gate) for one in (manifest, reward_model) if one is not None and one.gate],
        win_rates=ranges,
        win_rate_plot=plots.ranges(ranges, 0.5) if ranges else "",
        rows=_rows(FIGURES, manifest.metrics, "parent_", missing),
        reward_model_rows=_rows(REWARD_MODEL_FIGURES, reward_model.metrics, "previous_", missing)
        if reward_model
        else [],
        curves=_curves(run, missing),
        reward_model_plots=_reward_model_plots(run, reward_model, missing),
        examples=_examples(ours, theirs),
        counts=_counts(run, manifest),
        missing=missing,
    )


def read_history(path: Path) -> list[dict[str, float]]:
    """The history ``ppo.run`` wrote. Raises DatasetUnusable where the file is not one."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DatasetUnusable(f"{path} holds no history of a PPO run: {error}") from error


def _lineage(registry: Registry, manifest: Manifest) -> list[Manifest]:
    """The version and its ancestors, the youngest first, as far as the registry has them."""
    found = [manifest]
    with suppress(DeployError):
        while (parent := found[-1].parent) is not None:
            found.append(registry.get(VersionKind.POLICY, parent).manifest)
    return found


def _reward_model(registry: Registry, manifest: Manifest, missing: list[str]) -> Manifest | None:
    if manifest.reward_model is None:
        missing.append("a reward model: none trained this version")
        return None
    try:
        return registry.get(VersionKind.REWARD_MODEL, manifest.reward_model).manifest
    except DeployError as error:
        missing.append(f"the reward model it was trained against: {error}")
        return None


def _completions(run: Path, missing: list[str]) -> tuple[list[Completed], list[Completed]]:
    """Those of the version and of its parent; none where they were not kept, or erased since."""
    ours, theirs = (run / name for name in (COMPLETIONS, PARENT_COMPLETIONS))
    if not (ours.exists() and theirs.exists()):
        missing.append("completions to read: the run kept none, or they were erased")
        return [], []
    return completed.read(ours), completed.read(theirs)


def _win_rates(
    manifest: Manifest,
    comparisons: Sequence[Comparison] | None,
    ours: Sequence[Completed],
    theirs: Sequence[Completed],
    missing: list[str],
) -> dict[str, float]:
    """Over the parent, by whoever can tell."""
    if manifest.parent is None:
        missing.append("win rates: it has no parent")
        return {}
    found = {name: value for name, value in manifest.metrics.items() if name.startswith("win_rate_")}
    if ours and theirs:
        found |= win_rate.by_completions([ours], [theirs])
    if comparisons is not None:
        found |= win_rate.by_labelers(comparisons, manifest.version, manifest.parent)
    for name, label in WIN_RATES.items():
        if name not in found:
            missing.append(f"win rate over the parent by {label}")
    return found


def _known_of(found: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(name, label) for name, label in WIN_RATES.items() if {name, f"{name}_low", f"{name}_high"} <= found.keys()]


def _rows(named: Mapping[str, str], metrics: Mapping[str, float], before: str, missing: list[str]) -> list[Row]:
    """The figures of ``metrics`` that have a name, beside those under ``before`` it."""
    rows = []
    for name, label in named.items():
        if name not in metrics:
            missing.append(label)
            continue
        parent = metrics.get(before + name)
        change = "" if parent is None else ("+" if metrics[name] > parent else "") + number(metrics[name] - parent)
        rows.append(Row(label, _shown(metrics, name), _shown(metrics, before + name), change))
    return rows


def _shown(metrics: Mapping[str, float], name: str) -> str:
    """A figure with its interval, or its standard error, where there is one."""
    if name not in metrics:
        return ""
    if f"{name}_low" in metrics and f"{name}_high" in metrics:
        return f"{number(metrics[name])} [{number(metrics[f'{name}_low'])}, {number(metrics[f'{name}_high'])}]"
    error = metrics.get(f"{'kl' if name == 'kl_to_reference' else name}_se")
    return number(metrics[name]) + (f" ± {number(1.96 * error)}" if error is not None else "")


def number(value: JsonValue) -> str:
    """A number to read: three significant digits, whole numbers in full; a dash for none; anything else as JSON."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value)
    size = abs(value)
    if float(value).is_integer() or size >= 1000:
        return f"{value:.0f}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}" if 1e-3 <= size < math.inf else f"{value:.3g}"


def _curves(run: Path, missing: list[str]) -> list[Plot]:
    path = run / HISTORY_FILE
    if not path.exists():
        missing.append("the course of training: there is no PPO run")
        return []
    history = read_history(path)
    series = {
        title: {label: _points(history, name) for name, label in names.items()} for title, names in CURVES.items()
    }
    series |= {title: _by_task(history, name) for name, title in TASK_CURVES.items()}
    found = {title: {label: each for label, each in drawn.items() if each} for title, drawn in series.items()}
    return [Plot(title, plots.lines(drawn, "iteration")) for title, drawn in found.items() if drawn]


def _by_task(history: History, name: str) -> dict[str, Points]:
    """The lines of ``name[task]``: of the tasks as many as can be told apart."""
    keys = sorted({key for numbers in history for key in numbers if key.startswith(f"{name}[")})
    return {key[len(name) + 1 : -1]: _points(history, key) for key in keys[: plots.MOST_LINES]}


def _points(history: History, name: str) -> Points:
    return [(numbers["iteration"], numbers[name]) for numbers in history if name in numbers]


def _reward_model_plots(run: Path, reward_model: Manifest | None, missing: list[str]) -> list[Plot]:
    if reward_model is None:
        return []
    drawn = []
    if losses := _losses(run):
        drawn.append(Plot("training loss, nats", plots.lines({"loss": losses}, "step")))
    else:
        missing.append("the course of the reward model's loss")
    metrics = reward_model.metrics
    bins = [name.removesuffix("_predicted") for name in sorted(metrics) if CALIBRATION.fullmatch(name)]
    if bins:
        points = [(metrics[f"{each}_predicted"], metrics[f"{each}_observed"]) for each in bins]
        drawn.append(Plot("how often it is right where it is so sure", plots.calibration(points)))
    else:
        missing.append("calibration of the reward model")
    return drawn


def _losses(run: Path) -> Points:
    """Of the reward model by step, from the run's TensorBoard files; of a long course the means of equal parts."""
    board = EventAccumulator(str(run / FOLDER), size_guidance={"scalars": 0})
    board.Reload()
    if LOSS not in board.Tags()["scalars"]:
        return []
    losses = sorted({event.step: event.value for event in board.Scalars(LOSS)}.items())
    part = -(-len(losses) // LOSS_POINTS)
    parts = [losses[start : start + part] for start in range(0, len(losses), part)]
    return [(fmean(step for step, _ in each), fmean(loss for _, loss in each)) for each in parts]


def _examples(ours: Sequence[Completed], theirs: Sequence[Completed]) -> dict[str, list[Example]]:
    """Prompts that show what changed: by the difference in score, or the first ones where nothing was scored."""
    of_parent = {one.prompt_ids: one for one in theirs}
    both = [Example(one.prompt, one, of_parent[one.prompt_ids]) for one in ours if one.prompt_ids in of_parent]
    changed = [one for one in both if one.ours.completion != one.theirs.completion]
    if any(one.ours.score is None or one.theirs.score is None for one in both):
        return {"nothing was scored, the first prompts": both[:EXAMPLES]} if both else {}
    changed.sort(key=lambda one: (one.ours.score or 0.0) - (one.theirs.score or 0.0), reverse=True)
    inner = changed[EXAMPLES:-EXAMPLES]
    middle = max(0, len(inner) - EXAMPLES) // 2
    sorts = {
        "the score rose most": changed[:EXAMPLES],
        "the score changed as for most": inner[middle : middle + EXAMPLES],
        "the score fell most": changed[EXAMPLES:][-EXAMPLES:][::-1],
    }
    return {title: examples for title, examples in sorts.items() if examples}


def _counts(run: Path, manifest: Manifest) -> dict[str, float]:
    """What the version learnt from, and what was left out of it."""
    counts: dict[str, float] = {"comparisons": manifest.comparisons, "demonstrations": manifest.demonstrations}
    with suppress(FileNotFoundError):
        counts |= json.loads((run / "dataset.json").read_bytes())
    return counts


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["number"] = number
