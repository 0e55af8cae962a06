"""How `lfw_dataset.py -get_timing` measures a loader, draws the measurement and names the bottleneck.

A pass has two parts that must not be mixed: starting the workers (once an epoch, unless they are kept alive) and loading. Each
worker therefore writes down when it is ready; the clock of the steady state runs from the moment the last one is, until
the last batch has arrived. Stopping the workers is outside the clock.
"""

import functools
import itertools
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from machine import available_memory, shared_memory, usable_cpus, workers_within
from timing import measure, spread

COLOURS = {"simple": "tab:blue", "complex": "tab:orange"}


def note_start(ready: torch.Tensor, worker: int) -> None:
    """DataLoader's worker_init_fn: write the time into shared memory, then wait until all have: nobody loads before the clock runs."""
    ready[worker] = time.time()
    deadline = time.time() + 60
    while not ready.all() and time.time() < deadline:
        time.sleep(0.001)


def watch_start(num_workers: int) -> tuple[torch.Tensor, functools.partial]:
    """Shared memory for the workers' start times (s since the epoch), and the worker_init_fn that fills it."""
    ready = torch.zeros(num_workers, dtype=torch.float64).share_memory_()
    return ready, functools.partial(note_start, ready)


def describe(batch: torch.Tensor) -> dict:
    """What is said of a batch; the batch itself is not kept, since it would be one more in memory than are in flight."""
    low, high = (value.item() for value in torch.aminmax(batch))
    return {"shape": tuple(batch.shape), "dtype": batch.dtype, "low": low, "high": high, "mb": batch.nbytes / 1e6}


def time_pass(loader: DataLoader, ready: torch.Tensor, batches_to_check: int, device: torch.device, look=None) -> dict:
    """Iterate over exactly `batches_to_check` batches, or all there are: images, batches, start-up and steady state in s.

    Beside them what `look` makes of the first batch that holds images, or None, and the names of the broken files.
    """
    images, batches, first, skipped = 0, 0, None, []
    limit = min(batches_to_check, len(loader))
    if not loader.persistent_workers:
        ready.zero_()
    begin = time.time()
    iterator = iter(loader)  # the workers are started here
    bar = {"desc": "loading", "total": limit, "unit": "batch", "disable": look is None}  # passes in turn have one bar for all of them
    for batch, broken in tqdm(itertools.islice(iterator, limit), **bar):
        images += len(batch.to(device))  # on a CPU there is nothing to copy
        batches += 1
        skipped += broken
        first = look(batch) if look and first is None and len(batch) else first
    end = time.time()
    del iterator  # ... and stopped here, outside the clock
    startup_s = max(0.0, ready.max().item() - begin) if len(ready) else 0.0  # 0 for workers kept alive, which were ready before
    seconds = end - begin - startup_s
    run = {"images": images, "batches": batches, "startup_s": startup_s, "seconds": seconds, "images_per_s": images / seconds}
    return run | {"first": first, "skipped": skipped}


def time_loaders(loaders: dict, batches_to_check: int, passes: int, device: torch.device) -> tuple[list[dict], set]:
    """Time each of `loaders`, {(num_workers, augment): (loader, ready)}, `passes` times in turn; a row a loader, broken files.

    In turn, A B A B, so that a machine that gets slower meanwhile gets slower for all of them.
    """
    runs, skipped = {key: [] for key in loaders}, set()
    with tqdm(total=passes * len(loaders), desc="timed passes", unit="pass") as progress:
        for _ in range(passes):
            for key, (loader, ready) in loaders.items():
                progress.set_postfix_str(f"{key[0]} workers, {key[1]}")
                run = time_pass(loader, ready, batches_to_check, device)
                skipped.update(run.pop("skipped"))
                del run["first"]
                runs[key].append(run)
                progress.update()
    return [summary(*key, rows) for key, rows in runs.items()], skipped


def summary(num_workers: int, augment: str, runs: list[dict]) -> dict:
    """One row of results out of the passes of one loader."""
    rates = [run["images_per_s"] for run in runs]
    return {
        "num_workers": num_workers,
        "augment": augment,
        "batches": runs[0]["batches"],
        "images_per_s": statistics.median(rates),
        "mean_images_per_s": statistics.mean(rates),
        "sd_images_per_s": spread(rates),
        "startup_s": statistics.median(run["startup_s"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "passes": len(runs),
        "runs_images_per_s": rates,
    }


# ---- what to expect, and where the time went ---------------------------------------------------------------------------


def counted(number: int, thing: str) -> str:
    """1 batch, 2 batches; 1 image, 2 images."""
    return f"{number:,} {thing}{'' if number == 1 else 'es' if thing.endswith('ch') else 's'}"


def batches_in_flight(num_workers: int, prefetch_factor: int, batches: int) -> int:
    """Batches in memory at once at most: those the workers are ahead and the one in use, but not more than there are."""
    return min(num_workers * prefetch_factor + 1, batches)


def batch_bytes(args, images: int) -> int:
    """Bytes of a float32 batch, the images taken to be as large as LFW's or as -resize makes them."""
    return min(args.batch_size, images) * 3 * (args.resize or 250) ** 2 * 4


def default_workers(args, images: int) -> int:
    """One worker for each usable CPU, but no more than there are batches, or than half of the free memory or /dev/shm has room for."""
    places = [available_memory() // 2, shared_memory()]
    room = [workers_within(free, batch_bytes(args, images), args.prefetch_factor) for free in places if free is not None]
    return min(usable_cpus(), -(-images // args.batch_size), *room)


def warn_about_memory(workers: int, waiting: int, batch: int) -> None:
    """Say it where `waiting` batches of `batch` bytes at once may be more than fits: into memory, and what workers send into /dev/shm."""
    for place, free in {"memory": available_memory(), "/dev/shm": shared_memory() if workers else None}.items():
        if free is not None and free < waiting * batch:
            more = ", or start the container with more (docker run --shm-size)" if place == "/dev/shm" else ""
            print(f"warning: batches in flight may take {waiting * batch / 1e6:,.0f} MB, and {place} has {free / 1e6:,.0f}:")
            print(f"         processes may be killed; take fewer workers or a smaller -batch_size{more}")


def warn_about(args, images: int) -> None:
    """Say before the run what will not help or may fail: idle workers, too few cores, too little memory, no GPU to pin for."""
    most, usable = max(args.num_workers), usable_cpus()
    batches = -(-images // args.batch_size)
    if most > batches:
        print(
            f"warning: {most} workers for {counted(batches, 'batch')}: a worker loads whole batches, so {most - batches} of them stay idle"
        )
    if most > usable:
        print(f"warning: {most} workers on {counted(usable, 'usable CPU')}: they take turns, more than {usable} gain nothing")
    if args.persistent_workers and args.batches_to_check < batches:
        print("warning: workers kept alive go on loading when a pass stops early, beside the next one:")
        print("         leave out -persistent_workers, or load all batches (-batches_to_check, which -quick makes small)")
    if args.pin_memory and args.device.type != "cuda":
        print("warning: -pin_memory serves the copy to a CUDA device and there is none here, so it is left out")
        args.pin_memory = False
    warn_about_memory(most, batches_in_flight(most, args.prefetch_factor, batches), batch_bytes(args, images))


def stage_costs(files: list[str], load_rgb, augment, device: torch.device) -> dict[str, float]:
    """Microseconds an image of each stage on one core, over a few files, from reading to the batch, and its copy to a GPU."""
    decoded = [load_rgb(file) for file in files]
    tensors = [to_tensor(image) for image in decoded]

    def hand_over():  # what a worker does: stack the batch into shared memory that is new each time
        storage = tensors[0]._typed_storage()._new_shared(sum(tensor.numel() for tensor in tensors))  # as torch's default_collate
        return torch.stack(tensors, out=tensors[0].new(storage).resize_(len(tensors), *tensors[0].shape))

    stages = {
        "read": lambda: [Path(file).read_bytes() for file in files],
        "read + decode": lambda: [load_rgb(file) for file in files],
        "augmentation": lambda: [augment(image) for image in decoded],
        "to tensor": lambda: [to_tensor(image) for image in decoded],
        "stack": lambda: torch.stack(tensors),  # without workers
        "transfer": hand_over,
    }
    if device.type != "cpu":
        batch = torch.stack(tensors)
        stages["copy to device"] = lambda: batch.to(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    costs = {name: measure(stage, device).median_ms * 1e3 / len(files) for name, stage in stages.items()}
    torch.set_num_threads(threads)
    costs["decode"] = max(0.0, costs.pop("read + decode") - costs["read"])
    return costs


def explain(row: dict, costs: dict[str, float]) -> str:
    """Where an image's time goes, what the measured rate says about it, and the bottleneck: a stage, or starting the workers."""
    other_way = "stack" if row["num_workers"] else "transfer"  # a worker stacks the batch where it hands it over
    costs = {name: cost for name, cost in costs.items() if name != other_way}
    total, slowest = sum(costs.values()), max(costs, key=costs.get)
    parts = ", ".join(f"{name} {cost:.0f}" for name, cost in sorted(costs.items(), key=lambda item: -item[1]))
    busy = max(1, min(row["num_workers"], usable_cpus(), row["batches"]))
    text = f"{row['augment']}: an image costs {total:.0f} us on one core ({parts}). "
    if row["startup_s"] > row["seconds"]:
        text += "The bottleneck is start-up, which takes longer than the loading.\n"
    else:
        text += f"The bottleneck is {slowest}, {costs[slowest] / total:.0%}.\n"
    text += f"  {counted(busy, 'core')} could load {busy * 1e6 / total:,.0f} images/s; "
    text += f"measured with {counted(row['num_workers'], 'worker')}: {row['images_per_s']:,.0f}."
    if row["startup_s"] > 0.1 * row["seconds"]:
        text += f" Starting the workers takes {row['startup_s']:.2f} s more in each epoch; -persistent_workers pays it once."
    return text


# ---- the picture -----------------------------------------------------------------------------------------------------


def plot_sweep(rows: list[dict]) -> plt.Figure:
    """Images/s over workers: every run a dot, the median a line, one sd as bar, the ideal line, physical and usable cores."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for augment in dict.fromkeys(row["augment"] for row in rows):
        mine = sorted((row for row in rows if row["augment"] == augment), key=lambda row: row["num_workers"])
        workers = [row["num_workers"] for row in mine]
        colour = COLOURS[augment]
        for row in mine:  # a little to the left, so that the bar does not hide them
            axes.plot([row["num_workers"] - 0.06] * row["passes"], row["runs_images_per_s"], ".", color=colour, alpha=0.5, markersize=7)
        medians, deviations = ([row[key] for row in mine] for key in ("images_per_s", "sd_images_per_s"))
        axes.errorbar(
            workers, medians, yerr=deviations, fmt="-o", markersize=4, color=colour, capsize=4, label=f"{augment} augmentation: median, sd"
        )
        base = next((row for row in mine if row["num_workers"] == 1), None)
        if base and len(mine) > 1:
            ideal = [row["num_workers"] for row in mine if row["num_workers"] >= 1]
            axes.plot(
                ideal, [base["images_per_s"] * n for n in ideal], "--", color=colour, linewidth=1, alpha=0.6, label="ideal: n x one worker"
            )
    mark_cores(axes)
    axes.set(xlabel="number of workers (0: the main process loads)", ylabel="images/s, steady state")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # one number of workers gives a narrow range, whose bar would end at the frame
    left, right = axes.get_xlim()
    axes.set_xlim(left - 0.5, right + 0.5)
    axes.set_xticks(sorted({row["num_workers"] for row in rows}))
    axes.legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def mark_cores(axes: plt.Axes) -> None:
    """Vertical lines at the physical cores and at the CPUs this process may use; one line where both are the same."""
    usable, physical_cores = usable_cpus(), psutil.cpu_count(logical=False)
    marks = {usable: "usable CPUs"}
    if physical_cores:
        marks[physical_cores] = "physical cores" if physical_cores != usable else "physical = usable cores"
    sides = ["center"] if len(marks) == 1 else ["right", "left"]  # away from each other, however close the lines
    for (cores, text), side in zip(sorted(marks.items()), sides, strict=True):
        axes.axvline(cores, color="grey", linestyle=":", linewidth=1)
        axes.text(cores, 1.01, f"{cores} {text}", color="grey", fontsize=7, ha=side, va="bottom", transform=axes.get_xaxis_transform())
