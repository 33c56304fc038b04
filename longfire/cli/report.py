"""`longfire report`."""

from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import Parser


def report(words: Sequence[str]) -> int:
    """One or several runs as one page: loss, learning rate, gradient norm, throughput, a table."""
    parser = Parser("report", report, "longfire report runs/gla runs/softmax --out compared.html")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folders; several are drawn over each other",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="(default: report.html in the first run folder)"
    )
    options = parser.parse_words(words)
    from longfire.training.report_page import html

    out = options.out or options.runs[0] / "report.html"
    html(options.runs, out)
    print(out)
    return 0
