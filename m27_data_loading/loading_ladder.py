"""From the exercise's DataLoader to the limit of the machine, one change a rung, and what each change is worth.

    python m27_data_loading/loading_ladder.py                               on drawn sample faces
    python m27_data_loading/loading_ladder.py -path_to_folder data/lfw      on the real LFW: about 6 minutes on two cores
    python m27_data_loading/loading_ladder.py -path_to_folder data/lfw -peers    ... beside other libraries' loaders

Every rung delivers the same: shuffled float32 batches (n, 3, height, width) in [0, 1] after RandomAffine(5, (0.1, 0.1), (0.5, 2.0)).
Before anything is timed, the compiled augmentation is compared with torchvision's, value by value. All rungs are timed in one
run, one epoch each in turn, so that their ratios hold on a machine whose speed drifts.

How to read the table: x_before is the gain over the rung before, clear whether the rounds agree on its direction (all of five; of more
rounds some may differ, as chance would have it), x_naive the gain over the first; of_ceiling is the share of what the machine can do at
most for that work: decode every file and write every batch on all cores, with nothing in between (a rung that reads decoded pixels is
held against the writing alone). page_faults counts how often the operating system had to supply a page of memory, 4 kB on most
machines, during an epoch: a batch of 512 in fresh memory is 93,750 of them, in used memory none.
"""

import sys
import tempfile
import time
from multiprocessing import active_children, get_start_method
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.transforms import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import new_parser, parse, positive_int, print_table, save_figure, save_results
from m27_data_loading.affine import as_words, inverse_matrices, njit, random_affine, warp_into
from m27_data_loading.ceilings import build_ceilings
from m27_data_loading.fast_loader import FastLoader, decode_into, decode_jpeg
from m27_data_loading.image_folder import default_folder
from m27_data_loading.ladder_report import BEST, CACHED, conclusions, in_words, plot_ladder, ratio, table
from m27_data_loading.lfw_dataset import AUGMENTATIONS, LFWDataset, load_rgb
from m27_data_loading.loader_timing import batches_in_flight, warn_about_memory
from m27_data_loading.peer_process import Peer, reason, start_peers
from m27_data_loading.pixel_cache import NoPlace
from machine import usable_cpus

# ---- the rungs -------------------------------------------------------------------------------------------------------


class FasterDecoder(LFWDataset):
    """The exercise's data set with simplejpeg in the place of PIL's decoder; PIL still warps."""

    def __init__(self, path_to_folder, transform):
        super().__init__(path_to_folder, transform)
        width, height = load_rgb(str(self.files[0])).size
        self.shape = (height, width, 3)

    def pixels(self, index: int) -> np.ndarray:
        pixels = np.empty(np.prod(self.shape) + 1, np.uint8)  # one byte more: see as_words
        decode_into(str(self.files[index]), pixels[:-1].reshape(self.shape))
        return pixels

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.fromarray(self.pixels(index)[:-1].reshape(self.shape)))


class CompiledAugmentation(FasterDecoder):
    """Warp, division and change of layout in one compiled loop; no PIL image and no ToTensor any more."""

    def __getitem__(self, index: int) -> torch.Tensor:
        height, width, _ = self.shape
        rng = np.random.default_rng(torch.randint(2**63 - 1, ()).item())  # torch's generator differs by worker and epoch
        matrix = inverse_matrices(random_affine(rng, 1, height, width), height, width)[0]
        out = torch.empty(3, height, width)
        warp_into(as_words(self.pixels(index), height, width), matrix, out.numpy())
        return out


class FreshMemory(FastLoader):
    """Threads in the place of worker processes; each batch still lies in memory fresh from the operating system."""

    def buffer(self, number: int) -> torch.Tensor:
        return torch.empty(self.batch_size, 3, self.height, self.width)


def build_rungs(folder: str, batch_size: int, workers: int, seed: int, limit: int | None = None) -> dict:
    """The loaders by name, from the exercise's to the fastest; of the first `limit` images, or of all."""
    augment = transforms.Compose([AUGMENTATIONS["simple"], transforms.ToTensor()])

    def loader(dataset, **options):
        images = Subset(dataset, range(min(limit or len(dataset), len(dataset))))
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(images, batch_size, shuffle=True, num_workers=workers, generator=generator, **options)

    threaded = {"batch_size": batch_size, "threads": workers, "seed": seed, "limit": limit}
    rungs = {
        "the exercise": loader(LFWDataset(folder, augment)),
        "+ workers kept alive": loader(LFWDataset(folder, augment), persistent_workers=True),
        "+ faster decoder": loader(FasterDecoder(folder, augment), persistent_workers=True),
        "+ compiled augmentation": loader(CompiledAugmentation(folder, None), persistent_workers=True),
        "+ threads": FreshMemory(folder, **threaded),
        BEST: FastLoader(folder, **threaded),
    }
    try:
        rungs[CACHED] = FastLoader(folder, **threaded, cache=True)
    except NoPlace as error:
        print(f"left out   {CACHED}: {error}")
    return rungs


# ---- measuring -------------------------------------------------------------------------------------------------------


def prove_equal(files: list[str], seed: int) -> int:
    """Warp `files` with fixed parameters, compiled and by torchvision, and compare each value; the number compared."""
    width, height = load_rgb(files[0]).size
    parameters = random_affine(np.random.default_rng(seed), len(files), height, width)
    ours = np.empty((3, height, width), np.float32)
    pixels = np.empty(height * width * 3 + 1, np.uint8)
    differing = 0
    for file, (angle, right, down, zoom), matrix in zip(files, parameters, inverse_matrices(parameters, height, width), strict=True):
        theirs = functional.to_tensor(functional.affine(load_rgb(file), angle, [right, down], zoom, [0.0, 0.0])).numpy()
        decode_into(file, pixels[:-1].reshape(height, width, 3))
        warp_into(as_words(pixels, height, width), matrix, ours)
        differing += int((ours != theirs).sum())
    print(f"equality   {differing} of {ours.size * len(files):,} values differ between the compiled augmentation and torchvision's")
    if differing:
        raise RuntimeError("the rungs do not compute the same: their speeds cannot be compared")
    return ours.size * len(files)


def page_faults(loader) -> int | None:
    """Pages of memory the system has supplied so far to this process and the loader's workers, dead or alive; None where untold."""
    workers = isinstance(loader, DataLoader)
    if sys.platform == "win32" or (workers and (sys.platform != "linux" or get_start_method() != "fork")):
        return None  # the workers are not our children, or do not tell
    import resource  # not on Windows

    faults = sum(resource.getrusage(who).ru_minflt for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    for worker in active_children():
        faults += int(Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()[7])  # minflt of man 5 proc
    return faults


def time_epoch(loader, epoch: int) -> dict:
    """One whole epoch, start of the workers included: images, images/s, page faults."""
    if isinstance(loader, Peer):
        return loader.time_epoch()
    if isinstance(loader, FastLoader):
        loader.set_epoch(epoch)
    faults, begin = page_faults(loader), time.perf_counter()
    images = sum(len(batch) for batch in loader)
    seconds = time.perf_counter() - begin
    faults = None if faults is None else page_faults(loader) - faults
    return {"images": images, "images_per_s": images / seconds, "page_faults": faults}


def time_whole_epoch(loader, epoch: int, images: int) -> dict:
    """`time_epoch`; RuntimeError where other than `images` images came, since then the speeds cannot be compared."""
    run = time_epoch(loader, epoch)
    if run["images"] != images:
        raise RuntimeError(f"{run['images']:,} images came in an epoch of {images:,}")
    return run


def time_all(loaders: dict, epochs: int, images: int) -> dict[str, list[dict]]:
    """Time every loader for `epochs` epochs after one that does not count, A B C A B C ...; the runs by name, failing peers left out."""
    runs, lost = {name: [] for name in loaders}, {}
    turns = [(epoch, name) for epoch in range(epochs + 1) for name in loaders]
    for epoch, name in (progress := tqdm(turns, "epochs", unit="epoch")):
        progress.set_postfix_str(name)
        loader, peer = loaders[name], isinstance(loaders[name], Peer)
        if name in lost:
            continue
        try:
            run = time_whole_epoch(loader, epoch, loader.images if peer else images)
            runs[name] += [run] if epoch else []
        except Exception as error:  # whatever a peer's library may raise, or its process die of
            if not peer:
                raise
            lost[name] = error
    for name, error in lost.items():
        print(f"{name} is left out: {reason(error)}")
    return {name: mine for name, mine in runs.items() if name not in lost}


def say_what_is_missing() -> None:
    """Two rungs need packages that may be missing on rarer machines; say so, since their names promise them."""
    if decode_jpeg is None:
        print("missing    simplejpeg: the rungs from '+ faster decoder' on decode with PIL")
    if njit is None:
        print("missing    numba: the rungs from '+ compiled augmentation' on warp with NumPy, several times slower")


def main(args) -> list[dict]:
    say_what_is_missing()
    args.path_to_folder = str(args.path_to_folder or default_folder())
    args.num_workers = args.num_workers or usable_cpus()
    if args.quick:
        args.batch_size, args.epochs = min(args.batch_size, 64), min(args.epochs, 2)
    limit = 512 if args.quick else None
    common = {"folder": args.path_to_folder, "batch_size": args.batch_size, "workers": args.num_workers, "seed": args.seed, "limit": limit}
    rungs, ceilings = build_rungs(**common), build_ceilings(**common)
    fastest = rungs[BEST]
    fastest.buffer(0)
    for loader in [rungs.get(CACHED), *ceilings.values()]:
        if loader:
            loader.ring = fastest.ring  # they run one after the other: one ring serves them all
    size_mb, images, exercise = fastest.ring[0].nbytes / 1e6, len(fastest.files), rungs["the exercise"]
    print(f"data set   {images:,} images of {fastest.width}x{fastest.height} in {args.path_to_folder}")
    print(f"memory     {len(fastest.ring)} batches of {size_mb:,.0f} MB in the ring; {args.num_workers} workers or threads")
    waiting = batches_in_flight(args.num_workers, exercise.prefetch_factor, len(exercise))
    warn_about_memory(args.num_workers, waiting, fastest.ring[0].nbytes)
    for _ in ceilings["decode alone"]:  # an image that is broken or of another size is named before anything is timed
        pass
    prove_equal(fastest.files[:64], args.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        peers = start_peers(args.path_to_folder, Path(work), args.batch_size, args.num_workers) if args.peers else {}
        runs = time_all(rungs | ceilings | peers, args.epochs, images)
    for name in [name for name in runs if name in peers]:
        print(f"{BEST}, against {name}: {in_words(ratio(runs[BEST], runs[name]))}")
    return table(runs, list(rungs))


if __name__ == "__main__":
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("-path_to_folder", help="folder of .jpg files (default: data/lfw where it was downloaded, else drawn sample faces)")
    flag("-batch_size", type=positive_int, default=512, help="images a batch (default: 512)")
    flag("-num_workers", type=positive_int, help="worker processes, or threads (default: the CPUs this process may use)")
    flag("-epochs", type=positive_int, default=5, help="epochs timed of each rung, after one that is not (default: 5)")
    flag("-peers", action="store_true", help="also time other libraries' loaders: those of requirements-peers.txt that are installed")
    args = parse(parser)
    rows = main(args)
    print_table([{key: value for key, value in row.items() if key != "runs_images_per_s"} for row in rows])
    print(conclusions(rows))
    save_results(__file__, args, rows)
    save_figure(plot_ladder(rows), __file__, "rungs", args, f"batch {args.batch_size}, {args.epochs} epochs of each in turn")
