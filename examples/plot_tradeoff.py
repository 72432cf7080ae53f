"""Draw the trade-off that `bitplan run ... --json > plans.json` measured: plans beside uniform schemes.

python examples/plot_tradeoff.py plans.json [more.json ...] -o tradeoff.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

Point = tuple[float, float, float, float]


def main() -> None:
    """Read plan resources, draw one panel per file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="what `bitplan run --json` printed")
    parser.add_argument("-o", "--output", type=Path, default=Path("tradeoff.svg"))
    options = parser.parse_args()
    mpl.rcParams |= {"svg.hashsalt": "bitplan", "font.size": 9}
    figure, panels = plt.subplots(
        1, len(options.files), figsize=(4.6 * len(options.files), 3.4), squeeze=False
    )
    for panel, file in zip(panels[0], options.files, strict=True):
        draw(panel, file.stem, json.loads(file.read_text()))
    figure.tight_layout()
    figure.savefig(options.output, metadata={"Date": None} if options.output.suffix == ".svg" else None)


def draw(panel: Any, title: str, plans: list[dict[str, Any]]) -> None:
    """One panel: divergence with its 95 % interval over stored bits per weight."""
    measured = [plan["evidence"] for plan in plans if plan["evidence"]]
    uniform = [point(entry) for entry in measured[0]["entries"] if entry["name"].startswith("uniform ")]
    planned = [
        point(entry) for evidence in measured for entry in evidence["entries"] if entry["name"] == "plan"
    ]
    for points, label, style in ((uniform, "uniform schemes", "s--"), (planned, "Bitplan", "o-")):
        bits, mean, low, high = zip(*sorted(points), strict=True)
        errors = [
            [m - a for m, a in zip(mean, low, strict=True)],
            [b - m for m, b in zip(mean, high, strict=True)],
        ]
        panel.errorbar(bits, mean, yerr=errors, fmt=style, label=label, markersize=4, capsize=2)
    panel.set_yscale("log")
    panel.set_xlabel("stored bits per weight")
    panel.set_ylabel(f"{measured[0]['measure'].upper()} to full precision")
    panel.set_title(title.replace("-", " "))
    panel.legend()
    panel.grid(alpha=0.3)


def point(entry: dict[str, Any]) -> Point:
    """(bits per weight, mean, low, high) of one measured plan."""
    value = entry["divergence"]
    return entry["bits_per_weight"], value["mean"], max(value["low"], 1e-9), value["high"]


if __name__ == "__main__":
    main()
