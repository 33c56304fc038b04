"""The page of one and of several runs: what it says is what the records say, and nothing in it asks the network."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from logged import logged_to

from longfire.errors import SettingsError
from longfire.training.report_page import CHARTS, POINTS, html, read, running_mean, thinned


def run_folder(tmp_path, name, steps=40, lr=1e-3, loss=4.0):
    folder = tmp_path / name
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "loss": loss - step / steps,
            "grad_norm": 1.0,
            "lr": lr,
            "tokens": 100 * step,
            "mfu": 0.5,
        }
        record |= {
            "tokens_per_second": 1000.0,
            "elapsed_seconds": 0.1 * step,
            "memory_bytes": 2**30,
            "skipped_steps": 0,
        }
        record |= {
            "data_wait_fraction": 0.01,
            "seconds": 0.1,
            "data_seconds": 0.001,
            "forward_seconds": 0.04,
        }
        lines.append(
            record | {"backward_seconds": 0.05, "optimizer_seconds": 0.005, "other_seconds": 0.004}
        )
        if step % 20 == 0:
            lines.append(
                {
                    "step": step,
                    "eval/wiki/loss": loss - 0.5 * step / steps,
                    "eval/wiki/bits_per_byte": 1.25,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.toml").write_text(f"[optimizer]\nlr = {lr}\n[model]\nconfig = '<b>&.json'\n")
    return folder


class Page(HTMLParser):
    """Tables as lists of rows, and every address that the page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [
            value
            for key, value in attributes
            if key in ("src", "href") and not value.startswith("#")
        ]
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "th")
        if self.cell:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")


@pytest.mark.filterwarnings("error")
def test_gradient_norms_that_are_all_zero_are_drawn_without_a_warning(tmp_path):
    folder = run_folder(tmp_path, "still")
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text().replace('"grad_norm": 1.0', '"grad_norm": 0.0'))
    html([folder], folder / "report.html")


def test_a_matplotlib_that_is_broken_is_reported(tmp_path, monkeypatch):
    folder = run_folder(tmp_path, "undrawn")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        SettingsError,
        match=r"matplotlib, which cannot be imported \(.*pip install 'longfire\[plots\]'",
    ):
        html([folder], folder / "report.html")


def test_a_damaged_line_is_reported_and_the_rest_is_drawn(tmp_path):
    folder, message = run_folder(tmp_path, "damaged"), []
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00\n")
    with logged_to(message):
        html([folder], folder / "report.html")
    assert len(message) == 1 and "1 line cannot be read" in message[0]


def test_a_page_of_one_run(tmp_path):
    folder = run_folder(tmp_path, "first")
    html([folder], folder / "report.html")
    text = (folder / "report.html").read_text()
    page = Page(text)
    table = dict(zip(*page.rows[:2]))
    assert table["run"] == "first" and table["steps"] == "40" and table["tokens"] == "4,000"
    assert table["validation of wiki: loss"] == "3.5000" and table["wiki: bits a byte"] == "1.250"
    assert table["MFU"] == "50.0%" and table["memory"] == "1.00 GiB" and table["time"] == "4 s"
    assert ["model.config", "<b>&.json"] in page.rows and "<b>&" not in text, (
        "a value of a setting is text, not markup"
    )
    assert not page.addresses and "<script" not in text and "@import" not in text, "self-contained"
    assert text.count("<svg") == len(CHARTS)
    for name in CHARTS:
        assert (folder / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_are_drawn_over_each_other_and_what_differs_is_shown(tmp_path):
    folders = [
        run_folder(tmp_path, "first", lr=1e-3),
        run_folder(tmp_path, "second", lr=2e-3, loss=3.0),
    ]
    html(folders, tmp_path / "compared.html")
    text = (tmp_path / "compared.html").read_text()
    page = Page(text)
    differing = page.rows[page.rows.index(["setting", "first", "second"]) + 1]
    assert differing == ["optimizer.lr", "0.001", "0.002"]
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", text)
    assert labels.count("first") >= 5 and labels.count("second") >= 5, "each chart names both"


@pytest.mark.slow
def test_the_same_records_give_the_same_page(tmp_path):
    folder = run_folder(tmp_path, "first")
    html([folder], tmp_path / "a.html")
    html([folder], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_runs_of_one_name_are_distinguished_by_their_path(tmp_path):
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    names = [
        story.name
        for story in read([run_folder(tmp_path / "x", "run"), run_folder(tmp_path / "y", "run")])
    ]
    assert names == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_a_run_that_is_still_writing(tmp_path):
    """A cut-off last line is left out, nulls (numbers that were not finite) become gaps, records may lack fields."""
    folder = run_folder(tmp_path, "first")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": null, "tokens": 4100}\n{"step": 42, "lo')
    (story,) = read([folder])
    assert (
        len(story) == 41 and np.isnan(story.column("loss")[-1]) and np.isnan(story.column("lr")[-1])
    )
    html([folder], folder / "report.html")


def test_no_run_there(tmp_path):
    with pytest.raises(SettingsError, match=r"holds no metrics.jsonl.*job.dump_folder"):
        html([tmp_path], tmp_path / "report.html")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(SettingsError, match="no training step yet"):
        html([tmp_path], tmp_path / "report.html")


def test_without_matplotlib_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'longfire\[plots\]'"):
        html([run_folder(tmp_path, "first")], tmp_path / "report.html")


def test_a_thinned_curve_keeps_every_spike():
    y = np.random.default_rng(0).normal(size=200_000)
    y[123_456], y[77] = 50.0, -50.0
    x, thin = thinned(np.arange(len(y)), y)
    assert len(x) <= POINTS and (np.diff(x) > 0).all()
    assert thin.max() == 50.0 and thin.min() == -50.0 and (y[x] == thin).all()


def test_the_running_mean_of_a_constant_is_the_constant_from_the_start():
    np.testing.assert_allclose(running_mean(np.full(100, 3.0), 10), 3.0, rtol=1e-12)
    ramp = running_mean(np.arange(1000.0), 10)
    np.testing.assert_allclose(
        ramp[500:], np.arange(500, 1000) - 9.0, rtol=1e-6
    )  # lags by width - 1 in the long run
