"""What the experiments share: measured quantities with their bands, the table, the lines that are kept."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = ["Experiment", "Row", "band", "figure", "markdown", "print_rows", "summary"]

_BANDS = Path(__file__).parent / "bands.json"


@dataclass(frozen=True)
class Row:
    """One quantity of an experiment.

    Attributes
    ----------
    quantity : str
    measured : sequence of float
        One value for each seed or instance.
    low, high : float
        The band in which the median must lie; infinite where it is open.
    origin : str
        Where the band comes from: a figure or a text of the paper, an identity, or ``plain.py``.
    """

    quantity: str
    measured: tuple
    low: float
    high: float
    origin: str

    def __post_init__(self):
        object.__setattr__(self, "measured", tuple(float(v) for v in np.atleast_1d(self.measured)))

    @property
    def median(self):
        """Median over the seeds."""
        return float(np.median(self.measured))

    @property
    def within(self):
        """Whether the median lies in the band; NaN does not."""
        return bool(self.low <= self.median <= self.high)

    @property
    def target(self):
        """The band as people write it."""
        if np.isinf(self.low):
            return f"<= {self.high:.3g}"
        if np.isinf(self.high):
            return f">= {self.low:.3g}"
        return f"{self.low:.3g} .. {self.high:.3g}"

    @property
    def value(self):
        """Median, with the range where there are several values."""
        if len(self.measured) == 1:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} [{min(self.measured):.3g}, {max(self.measured):.3g}]"


@dataclass
class Experiment:
    """What a script returns: its rows and a figure, if it draws one."""

    rows: list = field(default_factory=list)
    figure: object = None

    def add(self, quantity, measured, low, high, origin):
        """Append a row."""
        self.rows.append(Row(quantity, measured, low, high, origin))

    def near(self, quantity, measured, target, share, origin):
        """Append a row whose band is ``target`` within a share of it on either side."""
        self.add(quantity, measured, target * (1 - share), target * (1 + share), origin)


def band(key, quantity):
    """Return (low, high) that the plain NumPy runs gave, see ``plain.py``."""
    entry = json.loads(_BANDS.read_text())["bands"][key]["quantities"][quantity]
    return entry["low"], entry["high"]


def figure(*panels, size=(4.6, 3.4)):
    """Return (figure, axes) of ``panels`` side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = panels[0] if panels else 1
    made = Figure(figsize=(size[0] * count, size[1]), dpi=110, layout="constrained")
    FigureCanvasAgg(made)
    return made, np.atleast_1d(made.subplots(1, count))


_HEAD = ("experiment", "quantity", "target", "where the band comes from", "measured", "within")


def _cells(name, row):
    return name, row["quantity"], row["target"], row["origin"], row["value"], "yes" if row["within"] else "NO"


def print_rows(name, rows):
    """Print the rows of one experiment, aligned."""
    for row in rows:
        _, quantity, target, origin, value, within = _cells(name, row)
        print(f"  {quantity:<52} {target:>20}  {value:<34} {within:<4} ({origin})")


def markdown(lines):
    """Return kept lines as a Markdown table."""
    out = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    out += ["| " + " | ".join(_cells(line["experiment"], line)) + " |" for line in lines]
    return "\n".join(out)


def summary(lines):
    """Return a Markdown table with a line an experiment: how many quantities are within, and what it took."""
    out = ["| | experiment | quantities within their bands | seconds |", "|---|---|---|---|"]
    for name, group in itertools.groupby(lines, key=lambda line: line["experiment"]):
        group = list(group)
        within = sum(line["within"] for line in group)
        out.append(f"| {name} | {group[0]['title']} | {within} of {len(group)} | {group[0]['seconds']:.0f} |")
    return "\n".join(out)
