"""How dp_train.py times nn.DataParallel against one GPU: forward, training step, stages, memory. Needs CUDA devices."""

import functools
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import ConvNet, Images, normalize
from timing import measure_alternately

REPEATS = 5


class TimedDataParallel(nn.DataParallel):
    """DataParallel whose four stages are timed, all devices waited for after each: `stage_ms` {stage: [ms of each call]}."""

    def timed(self, stage: str, *args):
        begin = time.perf_counter()
        result = getattr(super(), stage)(*args)
        for device in self.device_ids:
            torch.cuda.synchronize(device)
        self.stage_ms.setdefault(stage, []).append((time.perf_counter() - begin) * 1e3)
        return result

    def scatter(self, *args):
        return self.timed("scatter", *args)

    def replicate(self, *args):
        return self.timed("replicate", *args)

    def parallel_apply(self, *args):
        return self.timed("parallel_apply", *args)

    def gather(self, *args):
        return self.timed("gather", *args)


def time_stages(network: nn.Module, device_ids: list[int], images: torch.Tensor) -> dict[str, float]:
    """Median of ms that each stage of the forward pass takes, one call to warm up apart; with one device there is scatter only."""
    model = TimedDataParallel(network, device_ids=device_ids)
    with torch.inference_mode():
        for call in range(1 + REPEATS):
            if call <= 1:
                model.stage_ms = {}
            model(images)
    return {f"{stage}_ms": statistics.median(runs) for stage, runs in model.stage_ms.items()}


def peak_mb(step, device_ids: list[int]) -> list[float]:
    """Most memory that one call of `step` takes on each GPU, MB, what is there already counted."""
    for index in device_ids:
        torch.cuda.reset_peak_memory_stats(index)
    step()
    return [torch.cuda.max_memory_allocated(index) / 1e6 for index in device_ids]


def time_on_gpus(args, data: Images) -> list[dict]:
    """Forward and training step of one device and of DataParallel, alternately, over batch sizes; stages, peak memory by GPU."""
    network = ConvNet(args.widths, "group").to(args.device, memory_format=torch.channels_last)
    models, rows = {"one device": network, "DataParallel": nn.DataParallel(network, device_ids=args.device_ids)}, []
    for batch_size in (max(len(args.device_ids), args.batch_size // 4), args.batch_size, args.batch_size * 4):
        places = torch.arange(batch_size) % len(data)
        images = normalize(data.images[places].to(args.device)).to(memory_format=torch.channels_last)
        labels = data.labels[places].to(args.device)

        def step(model, images=images, labels=labels):
            nn.functional.cross_entropy(model(images), labels).backward()
            network.zero_grad()

        with torch.inference_mode():
            difference = (models["one device"](images) - models["DataParallel"](images)).abs().max().item()
            calls = {name: functools.partial(model, images) for name, model in models.items()}
            forward = measure_alternately(calls, args.device, REPEATS)
        steps = {name: functools.partial(step, model) for name, model in models.items()}
        timings = measure_alternately(steps, args.device, REPEATS)
        for name in models:
            row = {"measured": name, "devices": 1 if name == "one device" else len(args.device_ids), "batch": batch_size}
            row |= {"forward_ms": forward[name].median_ms, "step_ms": timings[name].median_ms, "step_sd_ms": timings[name].sd_ms}
            rows.append(row | {"ratio": timings["one device"].median_ms / timings[name].median_ms, "output_difference": difference})
        peaks = peak_mb(steps["DataParallel"], args.device_ids)
        rows[-1] |= time_stages(network, args.device_ids, images) | {"peak_mb_by_gpu": peaks}
    return rows


def plot_steps(rows: list[dict]) -> plt.Figure:
    """Time of a training step over the batch size, one device against DataParallel, one sd as bar."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["measured"] for row in rows):
        mine = [row for row in rows if row["measured"] == name]
        sizes = [row["batch"] for row in mine]
        axes.errorbar(sizes, [row["step_ms"] for row in mine], [row["step_sd_ms"] for row in mine], marker="o", capsize=4, label=name)
    axes.set(xlabel="batch size", ylabel="ms a training step", xscale="log", yscale="log")
    axes.legend()
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure
