"""Runs as one page: curves, a table and what their settings differ in; one HTML file that needs no
network, and a PNG a chart."""

import html as markup
import importlib
import importlib.util
import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longfire.disk import write_whole
from longfire.errors import CheckpointError, SettingsError
from longfire.messages import visible
from longfire.own_files import read_note
from longfire.plural import duration
from longfire.regular_files import refuse_link
from longfire.training.environment import ENVIRONMENT, Environment
from longfire.training.records import METRICS, records, unreadable_line
from longfire.training.trackers import settings_of

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 2000  # of a curve: more than a page has pixels
SMOOTHING = 0.02  # of a run: the width over which the thick curve averages the thin one
FINAL_STEPS = 50  # over which the table averages the training loss
PARTS = ("data", "forward", "backward", "optimizer", "other")  # of a step, as the records split it
COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#c2255c", "#5f3dc4", "#846358")
PART_COLOURS = ("#c92a2a", "#4dabf7", "#1864ab", "#74b816", "#adb5bd")


@dataclass(frozen=True)
class Story:
    """The content of a run folder: its records as columns (NaN where a step has none), its settings
    and its machine."""

    name: str
    folder: Path
    columns: dict[str, np.ndarray]  # of training steps: step, loss, tokens, elapsed_seconds ...
    # of evaluations: step, <source>/loss, <source>/bits_per_byte ...
    heldout: dict[str, np.ndarray]
    settings: dict[str, object]  # section.key -> value
    machine: Environment
    unreadable: int = 0  # lines of metrics.jsonl

    def __len__(self) -> int:
        return len(self.columns["step"])

    def column(self, name: str) -> np.ndarray:
        """A number of all training steps; NaN where it was not recorded."""
        return self.columns.get(name, np.full(len(self), np.nan))

    def at(self, name: str, steps: np.ndarray) -> np.ndarray:
        """The values of a training column at other steps, as those of evaluations."""
        return np.interp(steps, self.columns["step"], self.column(name))

    def losses(self) -> list[str]:
        """The evaluation columns that are losses."""
        return [key for key in self.heldout if key.endswith("/loss")]


# Draws a figure; matplotlib is imported when one is drawn
Chart = Callable[[Sequence[Story]], "Figure"]


def html(folders: Sequence[Path], out: Path) -> None:
    """Write the page of one or several runs to `out`, and its charts as PNGs to a folder of the
    same name beside it.

    Raises SettingsError if a folder holds no run or matplotlib is not installed, CheckpointError if
    `out` cannot be written.
    """
    needs_matplotlib()
    stories = read(folders)
    for story in stories:
        if story.unreadable:
            logger.warning(unreadable_line(story.folder / METRICS, story.unreadable))
    figures = {name: draw(stories) for name, draw in CHARTS.items()}
    page = page_of(stories, {name: as_svg(figure) for name, figure in figures.items()})
    pictures = out.with_suffix("")
    try:
        refuse_link(pictures)
        pictures.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=150)
            write_whole(pictures / f"{name}.png", picture.getvalue())
        write_whole(out, page)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror}; name another place with --out"
        ) from error


def needs_matplotlib() -> None:
    """Raises SettingsError where matplotlib cannot be imported."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsError(
            "curves are drawn by matplotlib, which is not installed: pip install 'longfire[plots]'"
        )
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise SettingsError(
            f"curves are drawn by matplotlib, which cannot be imported ({error}): pip install "
            "'longfire[plots]'"
        ) from error


def save_figure(drawn: "Figure", out: Path, title: str) -> None:
    """Write one figure as .png, .svg or .html. Raises SettingsError for another ending,
    CheckpointError if it cannot be written."""
    check_ending(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            drawn.savefig(out, dpi=150)
        elif out.suffix == ".svg":
            write_whole(out, as_svg(drawn))
        else:
            title = markup.escape(title)
            write_whole(
                out,
                "<!doctype html><html lang=en><head><meta "
                f"charset=utf-8><title>{title}</title><style>{STYLE}</style>"
                f"</head><body><h1>{title}</h1>{as_svg(drawn)}</body></html>\n",
            )
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror}; name another place"
        ) from error


def check_ending(out: Path) -> None:
    """Raises SettingsError where `save_figure` would, before anything is measured."""
    needs_matplotlib()
    if out.suffix not in (".png", ".svg", ".html"):
        raise SettingsError(f"{out}: pictures are written as .png, .svg or .html; name one of them")


def read(folders: Sequence[Path]) -> list[Story]:
    """The stories of run folders, with different names."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [read_one(folder, name) for folder, name in zip(folders, names)]


def read_one(folder: Path, name: str) -> Story:
    """The story of one run folder. Raises SettingsError where it has no training step."""
    path = folder / METRICS
    if not path.exists():
        raise SettingsError(
            f"{folder} holds no {METRICS}, so it is no run folder; give the job.dump_folder of a "
            "run"
        )
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    unreadable = 0
    for record in records(path):
        if record is None:
            unreadable += 1
        elif "loss" in record:
            steps.append(record)
        else:
            evaluations.append(record)
    if not steps:
        raise SettingsError(
            f"{path} has no training step yet; report again when the run has made one"
        )
    heldout: dict[str, np.ndarray] = {}
    for key, values in as_columns(evaluations).items():
        heldout[key.removeprefix("eval/")] = values
    machine = read_note(folder / ENVIRONMENT, Environment) or Environment()
    return Story(
        name, folder, as_columns(steps), heldout, flat_settings(folder), machine, unreadable
    )


def flat_settings(folder: Path) -> dict[str, object]:
    """section.key -> value of a run.toml."""
    flat: dict[str, object] = {}
    for section, values in settings_of(folder).items():
        if isinstance(values, dict):
            for key, value in values.items():
                flat[f"{section}.{key}"] = value
    return flat


def as_columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """An array for each field; what a record lacks, or has as null, is NaN."""
    columns: dict[str, np.ndarray] = {}
    for number, record in enumerate(records):
        for name, value in record.items():
            column = columns.setdefault(name, np.full(len(records), np.nan))
            if value is not None:
                column[number] = value
    return columns


# Charts. Each takes all stories and returns a figure; CHARTS is the table of them.


def figure(y_label: str, x_label: str) -> "tuple[Figure, Axes]":
    """An empty figure, without pyplot's global state and windows."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = drawn.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.grid(color="#e9ecef")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def plain_label(name: str) -> str:
    """A name as matplotlib shows it without reading it: a dollar begins no formula, and a name
    with a leading underscore is not left out of the legend."""
    label = visible(name).replace("$", r"\$")
    if label.startswith("_"):
        return f" {label}"
    return label


def curves(
    stories: Sequence[Story],
    name: str,
    axes: "Axes",
    x_of: Callable[[Story], np.ndarray],
    smooth: bool = True,
) -> None:
    """Draw a column of every run: every step thin, the running mean thick."""
    for story, colour in zip(stories, cycle(COLOURS)):
        x = x_of(story)
        y = story.column(name)
        known = np.isfinite(y)
        x = x[known]
        y = y[known]
        if smooth and len(y) > 20:
            axes.plot(*thinned(x, y), color=colour, alpha=0.25, linewidth=0.8)
            y = running_mean(y, max(2, round(SMOOTHING * len(y))))
        axes.plot(*thinned(x, y), color=colour, linewidth=1.6, label=plain_label(story.name))


def running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Exponential mean: y_t has the weight 1/width, and the start is corrected for the values that
    it lacks."""
    keep = 1 - 1 / width
    mean = 0.0
    weight = 0.0
    out = np.empty_like(y)
    for index, value in enumerate(y):
        mean = keep * mean + value / width
        weight = keep * weight + 1 / width
        out[index] = mean / weight
    return out


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most some POINTS of a curve: the least and the greatest of each stretch, so that no spike
    is lost."""
    if len(x) <= POINTS:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(y)), POINTS // 2):
        kept.append(stretch[y[stretch].argmin()])
        kept.append(stretch[y[stretch].argmax()])
    index = np.unique(kept)
    return x[index], y[index]


def tokens_of(story: Story) -> np.ndarray:
    """Tokens seen, of each step."""
    return story.column("tokens")


def loss_by_tokens(stories: Sequence[Story]) -> "Figure":
    """Loss by tokens seen."""
    return loss_chart(stories, "tokens", "tokens", 1.0)


def loss_by_time(stories: Sequence[Story]) -> "Figure":
    """Loss by time of training, in minutes or hours."""
    longest = max(last(story.column("elapsed_seconds")) for story in stories)
    if longest > 2 * 3600:
        return loss_chart(stories, "hours of training", "elapsed_seconds", 3600.0)
    return loss_chart(stories, "minutes of training", "elapsed_seconds", 60.0)


def loss_chart(stories: Sequence[Story], x_label: str, x_name: str, unit: float) -> "Figure":
    """Training loss as curves, each evaluation as a point."""
    drawn, axes = figure("loss (nats per token)", x_label)
    curves(stories, "loss", axes, lambda story: story.column(x_name) / unit)
    for story, colour in zip(stories, cycle(COLOURS)):
        for key, marker in zip(story.losses(), cycle("osD^v*")):
            x = story.at(x_name, story.heldout["step"]) / unit
            source = f" ({key.removesuffix('/loss')})" if len(story.losses()) > 1 else ""
            label = plain_label(f"{story.name}, validation{source}")
            axes.plot(x, story.heldout[key], marker, color=colour, markersize=4, label=label)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def plain_chart(name: str, y_label: str, smooth: bool = False, logarithmic: bool = False) -> Chart:
    """The chart of one field of the records."""

    def draw(stories: Sequence[Story]) -> "Figure":
        drawn, axes = figure(y_label, "tokens")
        curves(stories, name, axes, tokens_of, smooth)
        drawn_values = np.concatenate([story.column(name) for story in stories])
        if logarithmic and (drawn_values > 0).any():  # of zeros alone there is no logarithm
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if len(stories) > 1:
            axes.legend(frameon=False, fontsize=8)
        return drawn

    return draw


def split_chart(stories: Sequence[Story]) -> "Figure":
    """The parts of a step's time: the mean of all steps, one bar for each run."""
    drawn, axes = figure("", "milliseconds a step (mean)")
    names = [plain_label(story.name) for story in stories]
    left = np.zeros(len(stories))
    for part, colour in zip(PARTS, PART_COLOURS):
        seconds = [mean(story.column(f"{part}_seconds")) for story in stories]
        widths = 1000 * np.nan_to_num(seconds)
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.5)
        left += widths
    axes.set_ylim(len(stories) - 0.3, -0.7)  # the first run on top
    handles = axes.get_legend_handles_labels()
    drawn.legend(*handles, loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=8)
    return drawn


CHARTS: dict[str, Chart] = {
    "loss-by-tokens": loss_by_tokens,
    "loss-by-time": loss_by_time,
    "learning-rate": plain_chart("lr", "learning rate"),
    "gradient-norm": plain_chart("grad_norm", "gradient norm", smooth=True, logarithmic=True),
    "throughput": plain_chart("tokens_per_second", "tokens a second", smooth=True),
    "step-split": split_chart,
}


def as_svg(drawn: "Figure") -> str:
    """The figure as an element of a page: text stays text, and the same figure gives the same
    bytes."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "longfire", "font.family": "sans-serif"}
    ):
        drawn.savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue()
    return re.sub(
        r'width="[^"]+" height="[^"]+"|height="[^"]+" width="[^"]+"',
        "",
        element[element.index("<svg") :],
        count=1,
    )


# The page.


def mean(values: np.ndarray) -> float:
    """The mean of the values that are known; NaN where none is."""
    known = values[np.isfinite(values)]
    if len(known):
        return float(known.mean())
    return float("nan")


def last(values: np.ndarray) -> float:
    """The last value that is known; NaN where none is."""
    known = values[np.isfinite(values)]
    if len(known):
        return float(known[-1])
    return float("nan")


def lowest_of(story: Story, key: str) -> str:
    """The lowest of several validation losses, and its step; empty where there is one only."""
    losses = story.heldout[key]
    known = np.isfinite(losses)
    if known.sum() < 2:
        return ""
    at = int(np.nanargmin(np.where(known, losses, np.nan)))
    return f"{losses[at]:.4f} (step {story.heldout['step'][at]:,.0f})"


def row_of(story: Story) -> dict[str, str]:
    """The line of a run in the final table."""
    loss = mean(story.column("loss")[-FINAL_STEPS:])
    row = {
        "run": story.name,
        "steps": f"{last(story.column('step')):,.0f}",
        "tokens": f"{last(story.column('tokens')):,.0f}",
        f"loss (mean of the last {FINAL_STEPS} steps)": f"{loss:.4f}",
    }
    for key in story.losses():
        source = key.removesuffix("/loss")
        row[f"validation of {source}: loss"] = f"{last(story.heldout[key]):.4f}"
        lowest = lowest_of(story, key)
        if lowest:
            row[f"validation of {source}: lowest"] = lowest
        if f"{source}/bits_per_byte" in story.heldout:
            row[f"{source}: bits a byte"] = f"{last(story.heldout[f'{source}/bits_per_byte']):.3f}"
    return row | {
        "tokens/s (median)": f"{np.nanmedian(story.column('tokens_per_second')):,.0f}",
        "MFU": f"{mean(story.column('mfu')):.1%}",
        "waiting for data": f"{mean(story.column('data_wait_fraction')):.1%}",
        "time": duration(np.nan_to_num(last(story.column("elapsed_seconds")))),
        "memory": f"{np.nanmax(story.column('memory_bytes'), initial=0) / 2**30:.2f} GiB",
        "skipped steps": f"{np.nan_to_num(last(story.column('skipped_steps'))):.0f}",
    }


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows as an HTML table; a row that lacks a column shows a dash."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    head = "".join(f"<th>{markup.escape(name)}</th>" for name in names)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{markup.escape(row.get(name, '–'))}</td>" for name in names)
        body += f"<tr>{cells}</tr>"
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def settings_table(stories: Sequence[Story], only_differing: bool) -> str:
    """Settings as rows, runs as columns."""
    keys: dict[str, None] = {}
    for story in stories:
        keys |= dict.fromkeys(story.settings)
    rows: list[dict[str, str]] = []
    for key in keys:
        values = {story.name: str(story.settings.get(key, "–")) for story in stories}
        if not only_differing or len(set(values.values())) > 1:
            rows.append({"setting": key, **values})
    if rows:
        return table(rows)
    return "<p>They have the same settings.</p>"


def machine_of(story: Story) -> str:
    """The machine of a run, in one sentence."""
    machine = story.machine
    cpu = f"{machine.get('cpu', 'unknown CPU')}, {machine.get('threads', '?')} threads"
    devices = (machine.get("cuda") or {}).get("devices") or [cpu]
    versions = [f"{name} {version}" for name, version in machine.get("versions", {}).items()]
    parts = [
        f"{len(devices)} x {devices[0]}" if len(devices) > 1 else devices[0],
        f"Python {machine.get('python', '?')}",
        ", ".join(versions),
        f"git {machine['git']}" if machine.get("git") else "",
        machine.get("time", ""),
    ]
    return "; ".join(part for part in parts if part)


STYLE = """
body {
  font: 15px/1.5 system-ui, sans-serif; color: #212529; background: #fff;
  max-width: 1180px; margin: 2em auto; padding: 0 1em
}
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin-top: 2em }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1em }
figure { margin: 0 } figcaption { font-weight: 600 } svg { width: 100%; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td {
  text-align: left; padding: .3em .9em .3em 0;
  border-bottom: 1px solid #dee2e6; vertical-align: top
}
th { font-weight: 600 }
.machine { color: #495057; font-size: 13px }
"""


def page_of(stories: Sequence[Story], charts: dict[str, str]) -> str:
    """The whole page as text."""
    title = markup.escape(" · ".join(story.name for story in stories))
    figures = "".join(
        f"<figure><figcaption>{name.replace('-', ' ')}</figcaption>{svg}</figure>"
        for name, svg in charts.items()
    )
    differing = f"<h2>What differs</h2>{settings_table(stories, True)}" if len(stories) > 1 else ""
    machines = "".join(
        f"<p class=machine><b>{markup.escape(story.name)}</b>: "
        f"{markup.escape(machine_of(story))}</p>"
        for story in stories
    )
    return (
        "<!doctype html><html lang=en><head><meta "
        f"charset=utf-8><title>{title}</title><style>{STYLE}</style></head><body>"
        f"<h1>{title}</h1>{table([row_of(story) for story in stories])}{differing}"
        f"<div class=charts>{figures}</div><h2>Machine</h2>{machines}"
        "<details><summary>All "
        f"settings</summary>{settings_table(stories, False)}</details></body></html>\n"
    )
