"""What architectures.py draws and advises from its rows."""

import itertools

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from timing import times_as_fast


def pareto(rows: list[dict]) -> list[dict]:
    """The rows that no other row beats in both latency and accuracy, fastest first."""
    front, best = [], -1.0
    for row in sorted(rows, key=lambda row: (row["latency_ms"], -row["accuracy_published"])):
        if row["accuracy_published"] > best:
            front.append(row)
            best = row["accuracy_published"]
    return front


def plot_accuracy(rows: list[dict]) -> plt.Figure:
    """Published accuracy over latency at the smallest batch; the area of a bubble is the number of parameters."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    front = pareto(rows)
    axes.plot([row["latency_ms"] for row in front], [row["accuracy_published"] for row in front], "--", color="grey", label="Pareto front")
    for row in rows:
        axes.scatter(row["latency_ms"], row["accuracy_published"], s=row["parameters"] / 4e4, alpha=0.5)
        text = f"{row['model']}\n{row['parameters'] / 1e6:.1f} M"
        axes.annotate(text, (row["latency_ms"], row["accuracy_published"]), fontsize=8, ha="center", va="center")
    axes.set(xlabel=f"ms at batch {rows[0]['batch']}", ylabel="ImageNet top-1 accuracy, as published")
    axes.margins(0.2)
    axes.legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def plot_rates(rows: list[dict], what: str, ceiling: float) -> plt.Figure:
    """Latency over MACs, both logarithmic, with lines of constant GMAC/s: a network far above the ceiling's line waits for memory."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    macs = [min(row["gmacs"] for row in rows) / 2, max(row["gmacs"] for row in rows) * 4]  # room for the names
    for share in (1, 0.5, 0.25, 0.1, 0.05):
        rate = ceiling * share
        line = {"color": "tab:red", "label": f"{rate:,.0f} GMAC/s, {what}"} if share == 1 else {"color": "lightgrey"}
        axes.plot(macs, [count / rate * 1e3 for count in macs], linewidth=1, **line)
        if share < 1:  # the red one is named in the legend: a network near the ceiling has its own name there
            axes.annotate(f"{rate:,.0f} GMAC/s", (macs[1], macs[1] / rate * 1e3), fontsize=7, color="grey", ha="right", va="bottom")
    for row in rows:
        point = (row["gmacs"], row["latency_ms"] / row["batch"])
        axes.plot(*point, "o")
        axes.annotate(f" {row['model']}, {row['gmacs_per_s']:,.0f} GMAC/s", point, fontsize=8, va="top")
    axes.set(xlabel="GMACs an image", ylabel=f"ms an image, at batch {rows[0]['batch']}", xscale="log", yscale="log", xlim=macs)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def who_is_level(rows: list[dict]) -> str:
    """A line for each two neighbours in latency at a batch size of which no telling is which one is faster."""
    said = ""
    for batch in dict.fromkeys(row["batch"] for row in rows):
        ranked = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["latency_ms"])
        for fast, slow in itertools.pairwise(ranked):
            verdict = times_as_fast(fast["runs_ms"], slow["runs_ms"], slow["model"])
            if "cannot tell" in verdict:
                said += f"batch {batch}: {fast['model']} is {verdict}\n"
    return said


def advise(rows: list[dict], budget_ms: float) -> str:
    """Which network to take for a latency budget, and why; `rows` are those whose accuracy is published."""
    if not rows:
        return "So there is nothing to weigh the latencies against: measure the accuracy. No picture of it was drawn."
    fitting = [row for row in rows if row["latency_ms"] <= budget_ms]
    if not fitting:
        fastest = min(rows, key=lambda row: row["latency_ms"])
        none = f"None of {len(rows)} networks needs at most {budget_ms:g} ms at batch {fastest['batch']}"
        return f"{none}; the fastest, {fastest['model']}, takes {fastest['latency_ms']:.1f} ms."
    best = max(fitting, key=lambda row: row["accuracy_published"])
    reached = f"{best['accuracy_published']:.1%} published accuracy in {best['latency_ms']:.1f} ms"
    text = f"For {budget_ms:g} ms at batch {best['batch']} take {best['model']}: {reached}, "
    if better := [row for row in rows if row["accuracy_published"] > best["accuracy_published"]]:
        next_one = min(better, key=lambda row: row["latency_ms"])
        return (
            text + f"the best of {len(fitting)} that fit; {next_one['model']} is more accurate and needs {next_one['latency_ms']:.1f} ms."
        )
    return text + f"the most accurate of {len(rows)}, and it fits."
