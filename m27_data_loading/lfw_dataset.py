"""Load a folder of face photographs in parallel: look at a batch, time the loader, find what holds it back.

    python m27_data_loading/lfw_dataset.py                                      what is loaded, and how fast
    python m27_data_loading/lfw_dataset.py -visualize_batch                     a picture of one batch
    python m27_data_loading/lfw_dataset.py -get_timing -num_workers 1           five timed passes with one worker
    python m27_data_loading/lfw_dataset.py -get_timing -num_workers 0 1 2 4     the error-bar plot over workers
    python m27_data_loading/lfw_dataset.py -get_timing -num_workers 0 1 2 4 -augment both    ... light and heavy augmentation
    python m27_data_loading/lfw_dataset.py -path_to_folder data/lfw             the real LFW (python data/download.py lfw)

A DataLoader worker is a process of its own. It is started when iteration begins (iter()), takes the indices of one whole batch,
opens and decodes each image, augments it, stacks the batch into shared memory and hands that over; the next batch goes to the
next worker. So more workers than batches are idle, each worker holds `-prefetch_factor` whole batches in memory, and workers
beyond the CPUs that this process may use only take turns. With 0 workers the main process does all of it itself.
"""

import functools
import multiprocessing
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import new_parser, non_negative_int, parse, positive_int, print_table, save_figure, save_results
from errors import InputError
from m27_data_loading.image_folder import default_folder, find_images
from m27_data_loading.loader_timing import (
    batches_in_flight,
    counted,
    default_workers,
    describe,
    explain,
    plot_sweep,
    stage_costs,
    time_loaders,
    time_pass,
    warn_about,
    watch_start,
)

PASSES = 5
AUGMENTATIONS = {
    "simple": transforms.RandomAffine(5, (0.1, 0.1), (0.5, 2.0)),  # degrees, share of width and height, zoom
    "complex": transforms.Compose(
        [
            transforms.RandomAffine(5, (0.1, 0.1), (0.5, 2.0), interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.RandomPerspective(0.3, p=1.0),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),  # brightness, contrast, saturation, hue
            transforms.RandomHorizontalFlip(),
        ]
    ),
}


# ---- the data set ----------------------------------------------------------------------------------------------------


def load_rgb(path: str, resize: int | None = None) -> Image.Image:
    """Open and decode one image with PIL, as RGB whatever it was; a broken file is named in an InputError."""
    try:
        with Image.open(path) as file:  # lazy: only the header is read here
            image = file.convert("RGB")  # the pixels are decoded here; grey, palette, RGBA and CMYK become RGB
            return image.resize((resize, resize), Image.Resampling.BILINEAR) if resize else image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises
        if reason := getattr(error, "strerror", None):  # the system is to blame, not the image
            raise InputError(f"{path} cannot be opened: {reason}") from error
        raise InputError(
            f"{path} cannot be read as an image ({type(error).__name__}): remove it (lfw_dataset.py -on_error skip goes on without it)"
        ) from error


class LFWDataset(Dataset):
    """Images of a folder as float32 tensors (3, height, width) in [0, 1], opened only when asked for.

    `transform` turns a PIL image into a tensor. With on_error="skip" a broken image comes out as its name, a string. `resize`, in
    pixels, is the side that every image is brought to.
    """

    def __init__(self, path_to_folder: str | Path, transform, on_error: str = "stop", resize: int | None = None) -> None:
        self.files = find_images(path_to_folder)
        self.transform, self.on_error, self.resize = transform, on_error, resize

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            return self.transform(load_rgb(str(self.files[index]), self.resize))
        except InputError as error:
            if self.on_error == "stop" or getattr(error.__cause__, "strerror", None):  # the system's fault, not the image's
                raise
            return str(self.files[index])

    def person(self, index: int) -> str:
        """Name of the person shown, from the file's folder: .../Grace_Hopper/Grace_Hopper_0001.jpg -> Grace Hopper."""
        return Path(self.files[index]).parent.name.replace("_", " ")


def collate(items: list) -> tuple[torch.Tensor, list[str]]:
    """Stack n images into one batch (n, 3, height, width); the names of broken ones are handed on beside it."""
    images = [item for item in items if isinstance(item, torch.Tensor)]
    broken = [item for item in items if isinstance(item, str)]
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        found = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:3])
        raise InputError(f"the images differ in size ({found}): a batch needs one size, resize them on loading with -resize 250")
    return torch.utils.data.default_collate(images) if images else torch.empty(0, 3, 0, 0), broken


def build_dataset(args, augment: str) -> LFWDataset:
    """The folder's images, each: decoded, resized where asked for, augmented, scaled to [0, 1]."""
    transform = transforms.Compose([AUGMENTATIONS[augment], transforms.ToTensor()])
    return LFWDataset(args.path_to_folder, transform, args.on_error, args.resize)


def build_loader(args, dataset: Dataset, num_workers: int, **options) -> tuple[DataLoader, torch.Tensor]:
    """The exercise's DataLoader, and the shared tensor into which its workers write the time at which they were ready."""
    ready, options["worker_init_fn"] = watch_start(num_workers)
    if num_workers:  # without workers these options raise
        options |= {"prefetch_factor": args.prefetch_factor, "persistent_workers": args.persistent_workers}
        options |= {"multiprocessing_context": args.start_method}
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle="sampler" not in options,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=args.pin_memory,  # page-locked host memory, from which a GPU copies without a detour
        generator=torch.Generator().manual_seed(args.seed),
        **options,
    )
    return loader, ready


# ---- the exercises ---------------------------------------------------------------------------------------------------


def load_once(args) -> tuple[list[dict], set]:
    """Load every batch once and print what came: images, people, shape, type, range, memory, images/s."""
    workers, dataset = args.num_workers[0], build_dataset(args, args.augment)
    loader, ready = build_loader(args, dataset, workers)
    run = time_pass(loader, ready, args.batches_to_check, args.device, describe)
    first, skipped = run.pop("first"), set(run.pop("skipped"))
    if first is None:
        raise InputError(f"none of the images loaded from {args.path_to_folder} can be read")
    people = {Path(file).parent for file in dataset.files}
    waiting, ahead = batches_in_flight(workers, args.prefetch_factor, len(loader)), workers * args.prefetch_factor
    reason = (
        f"{counted(workers, 'worker')} {args.prefetch_factor} ahead each, 1 in use{', but there are no more' if waiting <= ahead else ''}"
    )
    reason = reason if workers else "without workers nothing is loaded ahead"
    print(f"data set   {len(dataset):,} images of {len(people):,} people in {args.path_to_folder}")
    print("batch      {shape}, {dtype}, values {low:.3f} to {high:.3f}, {mb:,.1f} MB".format(**first))
    print(f"in flight  at most {counted(waiting, 'batch')}, {waiting * first['mb']:,.0f} MB: {reason}")
    print(f"loaded     {run['images']:,} images in {run['batches']} of {counted(len(loader), 'batch')}, ", end="")
    print(f"{run['images_per_s']:,.0f} images/s, start-up {run['startup_s']:.2f} s")
    return [{"num_workers": workers, "augment": args.augment, **run}], skipped


def time_sweep(args) -> tuple[list[dict], set]:
    """Time the loader for each number of workers and each augmentation; print the table, draw the plot, name the bottleneck."""
    augments = ["simple", "complex"] if args.augment == "both" else [args.augment]
    datasets = {augment: build_dataset(args, augment) for augment in augments}
    files = datasets[augments[0]].files
    for path in tqdm(files, desc="reading each file once", unit="file", leave=False):
        Path(path).read_bytes()  # from now on the files are in memory: no pass pays for a cold disk
    loaders = {(n, augment): build_loader(args, datasets[augment], n) for augment in augments for n in args.num_workers}
    available = -(-len(files) // args.batch_size)
    limit = min(available, args.batches_to_check)
    found = "all there are" if limit == available else f"of {available}"
    print(f"{PASSES} passes of {counted(limit, 'batch')} of {args.batch_size} images ({found})")
    rows, skipped = time_loaders(loaders, limit, PASSES, args.device)
    print_table([{key: value for key, value in row.items() if key != "runs_images_per_s"} for row in rows])
    readable = [file for index, file in enumerate(files[:64]) if isinstance(datasets[augments[0]][index], torch.Tensor)][:32]
    for augment in augments if readable else []:
        best = max((row for row in rows if row["augment"] == augment), key=lambda row: row["images_per_s"])
        print(explain(best, stage_costs(readable, functools.partial(load_rgb, resize=args.resize), AUGMENTATIONS[augment], args.device)))
    save_figure(plot_sweep(rows), __file__, "timing", args, f"batch {args.batch_size}, {PASSES} passes of {counted(limit, 'batch')}")
    return rows, skipped


def draw_batch(args) -> tuple[list[dict], set]:
    """Save a grid of the first images of one shuffled batch, each under its person's name."""
    dataset = build_dataset(args, args.augment)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).tolist()
    loader, ready = build_loader(args, dataset, args.num_workers[0], sampler=order)
    run = time_pass(loader, ready, 1, args.device, look=lambda batch: batch)
    images, broken = run.pop("first"), set(run.pop("skipped"))
    if images is None:
        raise InputError(f"none of the images of this batch from {args.path_to_folder} can be read")
    names = [dataset.person(index) for index in order if dataset.files[index] not in broken]
    shown = min(len(images), 32)
    figure, grid = plt.subplots(-(-shown // 8), 8, figsize=(12, 1.75 * -(-shown // 8) + 0.7), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, name in zip(grid.flat, images[:shown], names, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())  # (3, height, width) -> (height, width, 3)
        axes.set_title(name, fontsize=7)
    figure.suptitle(f"{shown} of {len(images)} images of a batch {tuple(images.shape)}, {args.augment} augmentation")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save_figure(figure, __file__, "batch", args, f"images of {Path(args.path_to_folder).name}")
    return [{"num_workers": args.num_workers[0], "augment": args.augment, **run}], broken


def main(args) -> list[dict]:
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # warn_about says it with the reason
    args.path_to_folder = str(args.path_to_folder or default_folder())
    if args.quick:
        args.batch_size, args.batches_to_check = min(args.batch_size, 32), min(args.batches_to_check, 4)
    images = len(find_images(args.path_to_folder))
    args.num_workers = args.num_workers or [default_workers(args, images)]
    warn_about(args, images)
    exercise = draw_batch if args.visualize_batch else time_sweep if args.get_timing else load_once
    rows, skipped = exercise(args)
    if skipped:
        print(f"skipped {counted(len(skipped), 'broken image')}: {', '.join(sorted(skipped))}")
    return rows


if __name__ == "__main__":
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("-path_to_folder", help="folder of .jpg files (default: data/lfw where it was downloaded, else drawn sample faces)")
    flag("-batch_size", type=positive_int, default=512, help="images a batch (default: 512)")
    workers_help = "worker processes; several numbers with -get_timing (default: one a usable CPU, as far as batches and memory go)"
    flag("-num_workers", type=non_negative_int, nargs="+", help=workers_help)
    flag("-visualize_batch", action="store_true", help="save a picture of one batch")
    flag("-get_timing", action="store_true", help=f"time {PASSES} passes and name the bottleneck")
    flag("-batches_to_check", type=positive_int, default=100, help="batches a pass, all where there are fewer (default: 100)")
    flag("-augment", choices=["simple", "complex", "both"], default="simple", help="complex is several times the work of simple")
    flag("-prefetch_factor", type=positive_int, default=2, help="batches each worker prepares ahead (default: 2)")
    flag("-persistent_workers", action="store_true", help="keep the workers from one epoch to the next")
    flag("-start_method", choices=multiprocessing.get_all_start_methods(), help="how workers start (default: the system's way)")
    flag("-pin_memory", action="store_true", help="page-locked batches, for a faster copy to a CUDA device")
    flag("-resize", type=positive_int, help="side in pixels that every image is brought to (default: as they are)")
    flag("-on_error", choices=["stop", "skip"], default="stop", help="what to do about a broken image (default: stop)")
    args = parse(parser)
    if args.visualize_batch and args.get_timing:
        parser.error("-visualize_batch and -get_timing are two exercises: give one of them")
    if not args.get_timing and (len(args.num_workers or []) > 1 or args.augment == "both"):
        parser.error("several -num_workers and -augment both compare timings: add -get_timing")
    rows = main(args)
    save_results(__file__, args, rows)
