"""How dp_train.py times nn.DataParallel against one GPU: forward, training step, stages, memory. Needs CUDA devices."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import ConvNet, Images, normalize
from common import measure_alternately

STAGES = ("scatter", "replicate", "parallel_apply", "gather")


class TimedDataParallel(nn.DataParallel):
    """DataParallel whose four stages are timed with CUDA events on device 0: `stage_ms` {stage: ms of the last call}."""

    def timed(self, stage: str, *args):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = getattr(super(), stage)(*args)
        end.record()
        for device in self.device_ids:
            torch.cuda.synchronize(device)
        self.stage_ms = {**getattr(self, "stage_ms", {}), stage: begin.elapsed_time(end)}
        return result

    def scatter(self, *args):
        return self.timed("scatter", *args)

    def replicate(self, *args):
        return self.timed("replicate", *args)

    def parallel_apply(self, *args):
        return self.timed("parallel_apply", *args)

    def gather(self, *args):
        return self.timed("gather", *args)


def time_on_gpus(args, data: Images) -> list[dict]:
    """Forward and training step of one device and of DataParallel, alternately, over batch sizes; stages, peak memory by GPU."""
    network = ConvNet(args.widths, "group").to(args.device, memory_format=torch.channels_last)
    models = {"one device": network, "DataParallel": nn.DataParallel(network, device_ids=args.device_ids)}
    timed, rows = TimedDataParallel(network, device_ids=args.device_ids), []
    for batch_size in (args.batch_size // 4, args.batch_size, args.batch_size * 4):
        images = normalize(data.images[torch.arange(batch_size) % len(data)].to(args.device))
        labels = data.labels[torch.arange(batch_size) % len(data)].to(args.device)

        def step(model, images=images, labels=labels):
            nn.functional.cross_entropy(model(images), labels).backward()
            network.zero_grad()

        with torch.inference_mode():
            difference = (models["one device"](images) - models["DataParallel"](images)).abs().max().item()
            forward = measure_alternately(
                {name: lambda model=model, images=images: model(images) for name, model in models.items()}, args.device
            )
        for index in args.device_ids:
            torch.cuda.reset_peak_memory_stats(index)
        steps = measure_alternately({name: lambda model=model: step(model) for name, model in models.items()}, args.device)
        peaks = [torch.cuda.max_memory_allocated(index) / 1e6 for index in args.device_ids]
        timed(images)
        for name in models:
            row = {"measured": name, "devices": 1 if name == "one device" else len(args.device_ids), "batch": batch_size}
            row |= {"forward_ms": forward[name].median_ms, "step_ms": steps[name].median_ms, "step_sd_ms": steps[name].sd_ms}
            rows.append(row | {"ratio": steps["one device"].median_ms / steps[name].median_ms, "output_difference": difference})
        rows[-1] |= {f"{stage}_ms": timed.stage_ms[stage] for stage in STAGES if stage in timed.stage_ms} | {"peak_mb_by_gpu": peaks}
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
