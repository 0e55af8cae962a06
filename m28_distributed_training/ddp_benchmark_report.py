"""The sentences and the picture of `ddp_train.py -benchmark`."""

import statistics

import matplotlib.pyplot as plt

from timing import verdict

ENOUGH = 5  # rounds for a verdict: that all of them are on one side of 1 by chance is one in 16


def say(rows: list[dict]) -> None:
    """What the table means: efficiency, and whether processes or threads are the better use of the same cores."""
    best = [row for row in rows if row["efficiency"]][-1]
    print(
        f"{best['processes']} processes: {best['speedup']:.2f}x one process, {best['efficiency']:.0%} of the ideal {best['processes']}x; ",
        end="",
    )
    print(f"the all-reduce adds {best['allreduce_share']:.1%} to the step and is handed {best['bytes_per_step']:,} bytes, ", end="")
    print(f"{4 * best['bytes_per_step'] / best['formula_bytes']:g} a parameter")  # formula_bytes: 4 of each
    if best["processes"] > 1:
        ideal = rows[0]["step_ms"] / best["processes"]
        print(
            f"where the rest goes: {ideal:.0f} ms would be ideal; a process's part takes {best['alone_ms']:.0f} ms while the others wait, "
            f"{best['compute_ms']:.0f} ms while all compute, {best['step_ms']:.0f} ms with the all-reduce"
        )
    threaded = rows[-1]
    if threaded is not best and threaded["efficiency"] is None:
        ratios = [mine / theirs for mine, theirs in zip(best["runs_speedup"], threaded["runs_speedup"], strict=True)]
        judged = verdict(ratios, "faster", "slower") if len(ratios) >= ENOUGH else f"{len(ratios)} rounds cannot tell"
        said = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), {judged}"
        print(f"{best['processes']} processes of {best['threads']} threads against one of {threaded['threads']} threads: {said}")


def plot(rows: list[dict]) -> plt.Figure:
    """Speed-up over processes beside the ideal line, every round a dot; and a step's time in three parts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
    scaled, threaded = [row for row in rows if row["efficiency"]], [row for row in rows if not row["efficiency"]]
    counts = [row["processes"] for row in scaled]
    left.plot(counts, counts, "--", color="grey", label="ideal")
    left.plot(counts, [row["speedup"] for row in scaled], "o-", color="tab:blue", label="median")
    for row in scaled:
        left.plot([row["processes"]] * len(row["runs_speedup"]), row["runs_speedup"], ".", color="tab:blue", alpha=0.4)
        left.annotate(f"{row['efficiency']:.0%}", (row["processes"], row["speedup"]), (6, -14), textcoords="offset points", fontsize=9)
    for row in threaded:
        left.plot(
            row["threads"] / scaled[0]["threads"], row["speedup"], "s", color="tab:orange", label=f"1 process, {row['threads']} threads"
        )
    left.set(xlabel="processes", ylabel="speed-up over one process", xticks=counts, xlim=(0.7, counts[-1] + 0.3), ylim=(0, None))
    left.legend()
    names = [f"{row['processes']} x {row['threads']}" for row in rows]
    bottom = [0.0] * len(rows)
    for label, colour, share_of in (
        ("compute (data, forward, backward, optimizer), alone", "tab:blue", lambda row: 1 - row["sharing_share"] - row["allreduce_share"]),
        ("extra while the others compute, too", "tab:orange", lambda row: row["sharing_share"]),
        ("all-reduce that is not hidden", "tab:red", lambda row: row["allreduce_share"]),
    ):
        heights = [row["step_ms"] * share_of(row) for row in rows]
        right.bar(names, heights, bottom=bottom, color=colour, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    right.set(xlabel="processes x threads", ylabel="ms a step", ylim=(0, max(row["step_ms"] for row in rows) * 1.25))
    right.legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure
