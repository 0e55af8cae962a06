"""What `loading_ladder.py` makes of its epochs: ratios within a round, the table, the picture, the conclusions.

The rounds are A B C A B C ...: what slows the machine for a while slows all loaders of a round. So a gain is a ratio of two epochs of
the same round, quoted as the median of the rounds, and called noise when the interval of that median holds 1.
"""

import math
import statistics

import matplotlib.pyplot as plt

CEILINGS = ("decode alone", "write alone", "decode and write")
WHITE_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind a number, where a line may pass
BEST, CACHED = "+ memory used again", "+ decoded pixels on disk"  # the fastest loader that decodes, and the one that need not


def ratio(runs: list[dict], base: list[dict]) -> list[float]:
    """How much faster `runs` is than `base`, round by round, so that what slows both does not count."""
    return [run["images_per_s"] / other["images_per_s"] for run, other in zip(runs, base, strict=True)]


def interval(ratios: list[float]) -> tuple[float, float]:
    """Between which two rounds the true median lies, in 93 of 100 cases: the lowest and the highest of five, the 4th and 12th of 15.

    A round is above the median or below it as a coin falls, so that the binomial distribution tells how many of the lowest and
    highest may be left out. With fewer than five rounds it is all of them, and says less.
    """
    n, outside = len(ratios), 0
    while 2 * sum(math.comb(n, below) for below in range(outside + 2)) / 2**n <= 0.07:
        outside += 1
    ordered = sorted(ratios)
    return ordered[outside], ordered[-1 - outside]


def verdict(ratios: list[float]) -> str:
    """faster or slower where the interval is on one side of 1; one round is no evidence."""
    low, high = interval(ratios)
    return "faster" if low > 1 and len(ratios) > 1 else "slower" if high < 1 and len(ratios) > 1 else "cannot tell"


def in_words(ratios: list[float]) -> str:
    """Median of ratios of the same round, its interval, and the verdict."""
    low, high = interval(ratios)
    return f"{statistics.median(ratios):.2f}x ({low:.2f} to {high:.2f}), {verdict(ratios)}"


def table(runs: dict[str, list[dict]], rungs: list[str]) -> list[dict]:
    """One row a rung or ceiling: the median of its epochs, and of its ratios in the same round."""
    rows = []
    for number, (name, mine) in enumerate(runs.items()):
        ceiling = "write alone" if name == CACHED else "decode and write"
        before = ratio(mine, runs[rungs[number - 1]]) if 0 < number < len(rungs) else None
        rows.append(
            {
                "rung": name,
                "images_per_s": statistics.median(run["images_per_s"] for run in mine),
                "x_before": statistics.median(before) if before else None,
                "clear": None if not before or len(before) < 2 else "no" if verdict(before) == "cannot tell" else "yes",
                "x_naive": statistics.median(ratio(mine, runs[rungs[0]])),
                "of_ceiling": statistics.median(ratio(mine, runs[ceiling])),
                "page_faults": None if mine[0]["page_faults"] is None else int(statistics.median(run["page_faults"] for run in mine)),
                "runs_images_per_s": [run["images_per_s"] for run in mine],
            }
        )
    return rows


def plot_ladder(rows: list[dict]) -> plt.Figure:
    """A bar of images/s for each loader, the exercise's on top, every epoch a dot; the ceilings are lines."""
    bars = [row for row in rows if row["rung"] not in CEILINGS]
    ceilings = {row["rung"]: row["images_per_s"] for row in rows if row["rung"] in CEILINGS}
    widest = max(max(row["runs_images_per_s"]) for row in bars)
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(bars) + 1.8))
    for place, row in enumerate(bars):
        axes.barh(place, row["images_per_s"], color="tab:grey" if row["rung"].startswith("peer") else "tab:blue", alpha=0.7)
        axes.plot(row["runs_images_per_s"], [place] * len(row["runs_images_per_s"]), ".", color="black", markersize=4)
        text = f"{row['images_per_s']:,.0f} ({row['x_naive']:.1f}x)"
        axes.text(max(row["runs_images_per_s"]) + 0.015 * widest, place, text, fontsize=8, va="center", bbox=WHITE_BOX)
    for name, colour in {"decode and write": "tab:red", "decode alone": "tab:orange", "write alone": "tab:green"}.items():
        outside = " (beyond the right edge)" if ceilings[name] > 1.25 * widest else ""
        axes.axvline(ceilings[name], color=colour, linestyle=":", label=f"ceiling: {name}, {ceilings[name]:,.0f}{outside}")
    axes.set_yticks(range(len(bars)), [row["rung"] for row in bars])
    axes.invert_yaxis()
    axes.set(xlabel="images/s, whole epochs (dots: every epoch, bars: median)")
    axes.set_xlim(0, 1.25 * widest)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 0.95))
    return figure


def conclusions(rows: list[dict]) -> str:
    """The figures in words: largest gain, fastest loader that decodes, gain of the cache; noise is called noise."""
    steps = [row for row in rows if row["x_before"]]
    decoding = [row for row in rows if row["rung"] not in (*CEILINGS, CACHED) and not row["rung"].startswith("peer")]
    largest = max((row for row in steps if row["clear"] == "yes"), key=lambda row: row["x_before"], default=None)
    best = max(decoding, key=lambda row: row["images_per_s"])
    lines = [f"Largest gain of one change: {largest['rung']}, {largest['x_before']:.2f}x."] if largest else []
    if unclear := [row["rung"] for row in steps if row["clear"] == "no"]:
        lines.append(f"Faster in some rounds and slower in others, so noise: {', '.join(unclear)}.")
    lines.append(
        f"Fastest loader that decodes: {best['rung']}, {best['x_naive']:.1f}x the exercise's, "
        f"{best['of_ceiling']:.2f} of decoding and writing alone."
    )
    lines += [f"With decoded pixels on disk: {row['x_before']:.2f}x the rung before." for row in rows if row["rung"] == CACHED]
    return "\n".join(lines)
