"""The sentences and pictures of `quantize.py -model NAME`."""

import matplotlib.pyplot as plt

from timing import times_as_fast


def against(ours: dict, theirs: dict) -> str:
    """How many times as fast one row is as another, in words."""
    return times_as_fast(ours["runs_ms"], theirs["runs_ms"], theirs["variant"])


def say(rows: list[dict]) -> None:
    """For each batch size and number of threads: our int8 against eager float32, the fastest float variant, and the peers."""
    for batch, threads in dict.fromkeys((row["batch"], row["threads"]) for row in rows):
        same = {row["variant"]: row for row in rows if (row["batch"], row["threads"]) == (batch, threads)}
        floats = [row for name, row in same.items() if "int8" not in name]
        peers = [row for name, row in same.items() if "ONNX" in name or "OpenVINO" in name]
        fastest = min(floats, key=lambda row: row["latency_ms"])
        best = min((row for row in same.values() if row not in floats + peers), key=lambda row: row["latency_ms"])
        others = {row["variant"]: row for row in [same["eager"], same.get("compiled float32", fastest), fastest, *peers]}
        print(f"batch {batch}, {threads} thread{'s' * (threads > 1)}: {best['variant']} is")
        for row in others.values():
            print(f"  {against(best, row)}")
        for name, row in same.items():
            if "int8" in name and row not in peers and "slower" in (said := against(row, fastest)):
                print(f"  {name} does not pay here: {said}")


def plot_speed(rows: list[dict]) -> plt.Figure:
    """Bars: how many times as fast as eager float32, by variant, a group for each batch size and number of threads."""
    figure, axes = plt.subplots(figsize=(9, 4.5))
    groups = list(dict.fromkeys((row["batch"], row["threads"]) for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    width = 0.85 / len(variants)
    for number, variant in enumerate(variants):
        found = {(row["batch"], row["threads"]): row["x_eager"] for row in rows if row["variant"] == variant}
        places = [place + (number - len(variants) / 2) * width for place, group in enumerate(groups) if group in found]
        bars = axes.bar(places, found.values(), width, align="edge", label=variant)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(groups)), [f"batch {batch}, {threads} thread{'s' * (threads > 1)}" for batch, threads in groups])
    axes.set(ylabel=f"{rows[0]['model']}: times as fast as eager float32")
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 0.91))
    return figure


def plot_layers(rows: list[dict], unit: str) -> plt.Figure:
    """Bars: the error that is left when one layer is kept in float32, against the error with all of them in int8."""
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(rows)))
    all_int8, single = rows[0], rows[1:]
    axes.barh([row["kept_float32"] for row in single], [row["error"] for row in single], color="tab:blue")
    axes.axvline(all_int8["error"], color="tab:red", linestyle="--", label="all layers in int8")
    axes.invert_yaxis()
    axes.set(xlabel=unit, ylabel="layer kept in float32")
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 0.95))
    return figure
