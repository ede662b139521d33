"""Draws docs/pictures/recipes.svg: accuracy by training cost, from the table "Accuracy" of docs/training.md.

python tests/benchmarks/recipes_chart.py
"""

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[2] / "docs"
CHART = DOCS / "pictures/recipes.svg"
# Its ten epochs of 50,000 images are ten reference epochs by definition.
REPLACED = (10.0, 77.11)


class Row(NamedTuple):
    """A recipe's mean test accuracy and its standard deviation in percent, and its cost in reference epochs."""

    recipe: str
    accuracy: float
    deviation: float
    cost: float


def read_rows() -> list[Row]:
    """The rows of the table, in its order."""
    pattern = r"^\| `(\w+)` \| \d+ \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) \|"
    found = re.findall(pattern, (DOCS / "training.md").read_text(), re.MULTILINE)
    return [Row(name, *(float(number) for number in numbers)) for name, *numbers in found]


def main() -> None:
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.family": "sans-serif", "font.size": 11}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        for row in read_rows():
            color = "tab:orange" if row.recipe == "resnet18" else "tab:blue"
            axes.errorbar(row.cost, row.accuracy, row.deviation, fmt="o", color=color, capsize=3)
            label = f"{row.recipe} {row.accuracy:.2f} %"
            axes.annotate(label, (row.cost, row.accuracy), (8, -12), textcoords="offset points", color=color)
        axes.plot(*REPLACED, "s", color="tab:gray")
        label = f"the scripts it replaces {REPLACED[1]} %\n(original images)"
        axes.annotate(label, REPLACED, (10, -4), textcoords="offset points", color="tab:gray")
        axes.set(xscale="log", xlim=(0.8, 40), ylim=(75, 93.5), ylabel="test accuracy in %")
        axes.set_xlabel("training time in epochs of the scripts' own loop on the same CPU")
        axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(CHART, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
