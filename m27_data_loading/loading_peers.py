"""Other libraries' loaders, each tuned as its own documentation says, all delivering what the exercise's loader delivers.

    pip install -r requirements-peers.txt                           in an environment of its own: see the notes in that file
    python m27_data_loading/loading_ladder.py -path_to_folder data/lfw -peers      the rungs and the peers, timed in turn

An epoch is every image of the folder once, in a new order, in float32 batches (n, 3, height, width) in [0, 1], each image under
a RandomAffine of its own, nearest pixel, black outside. A batch is valid until the next one is asked for, so that memory may be
used again. To let each peer do its best, those that take code of ours get our compiled augmentation, our decoder where theirs is
slower, and batches in memory that is used again. What is left to differ is the peer itself: how it reads, shuffles, hands out
the work and hands over the batches. What it has to make once (shards, a .beton file) is made before the clock starts.
"""

import functools
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from m27_data_loading import affine
from m27_data_loading import fast_loader as ours
from m27_data_loading.peer_tasks import Epochs, Tasks, images_of
from paths import atomic_path

# ---- peers: each (folder, work, batch_size, threads) -> something to iterate over; `work` keeps what is made once --------


def open_webdataset(folder: Path, work: Path, batch_size: int, threads: int) -> Epochs:
    """WebDataset: tar files, read in sequence by the worker processes of a DataLoader, each worker having its own tar files.

    Its documentation: make the batches in the workers and give the DataLoader batch_size=None
    (https://webdataset.github.io/webdataset/sharding/); shuffle the files as bytes, before decoding (FAQ, issue 439).
    Ours: the workers write into shared memory that stays, and only (worker, buffer, images) passes between processes; a batch sent
    the usual way lies in fresh shared memory and takes three to four times as long. The end of an epoch is a smaller batch a worker.
    """
    import webdataset as wds

    files, height, width = images_of(folder)
    if not (shards := work / "shards").exists():
        (part := work / "shards.part").mkdir(parents=True, exist_ok=True)
        with wds.ShardWriter(str(part / "%05d.tar"), maxcount=-(-len(files) // 32), verbose=0) as writer:
            for i, file in enumerate(np.random.default_rng(0).permutation(files)):
                writer.write({"__key__": f"{i:08}", "jpg": Path(file).read_bytes()})
        part.rename(shards)
    ring = torch.empty(threads, 2, batch_size, 3, height, width).share_memory_()  # two buffers a worker: one in use, one being filled

    def fill(samples: Iterator[tuple[bytes]]) -> Iterator[tuple[int, int, int]]:
        worker, rng = torch.utils.data.get_worker_info().id, np.random.default_rng()
        pixels = np.empty(height * width * 3 + 1, np.uint8)
        for buffer in itertools.cycle([0, 1]):
            if not (batch := list(itertools.islice(samples, batch_size))):
                return
            matrices = affine.inverse_matrices(affine.random_affine(rng, len(batch), height, width), height, width)
            for (jpeg,), matrix, out in zip(batch, matrices, ring[worker, buffer].numpy(), strict=False):
                ours.decode_jpeg(jpeg, "RGB", buffer=pixels[:-1])
                affine.warp_into(affine.as_words(pixels, height, width), matrix, out)
            yield worker, buffer, len(batch)

    urls = sorted(str(path) for path in shards.glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(2000).to_tuple("jpg").compose(fill)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=threads, prefetch_factor=1, persistent_workers=True)
    return Epochs(lambda: (ring[worker, buffer, :count] for worker, buffer, count in loader))


def open_torchdata(folder: Path, work: Path, batch_size: int, threads: int) -> Epochs:
    """torchdata.nodes: iterators, chained; a ParallelMapper runs a function in threads and keeps the order.

    Its documentation: method="thread" for functions that release the GIL (https://pytorch.org/data/0.11/what_is_torchdata_nodes.html),
    a Prefetcher at the end (.../migrate_to_nodes_from_utils.html); snapshot_frequency=0 leaves out the state for resuming.
    Ours: a task is up to 64 images. One whole batch a task in fresh memory, as in the migration guide, needs twice the CPU time.
    """
    import torchdata.nodes as tn

    tasks = Tasks(folder, batch_size)
    node = tn.ParallelMapper(tn.IterableWrapper(tasks), tasks.run, num_workers=threads, method="thread", snapshot_frequency=0)
    loader = tn.Loader(tn.Prefetcher(node, prefetch_factor=max(1, batch_size // tasks.loader.task), snapshot_frequency=0))
    return Epochs(lambda: tasks.batches(loader))


def open_spdl(folder: Path, work: Path, batch_size: int, threads: int) -> Epochs:
    """SPDL: stages linked by queues; an event loop hands the work to a pool of threads.

    Its documentation: threads where the stages release the GIL (.../spdl/0.8.0/getting_started/execution_models.html), no tensor for
    the single image but straight into the batch (best_practice.html), concurrency no higher than needed (optimization_guide/).
    Tried without gain: reading in a stage of its own, more threads than CPUs, its FFmpeg decoder (twice the CPU time).
    """
    from spdl.pipeline import PipelineBuilder

    tasks = Tasks(folder, batch_size)
    builder = PipelineBuilder().add_source(tasks).pipe(tasks.run, concurrency=threads, output_order="input")
    builder.add_sink(max(1, batch_size // tasks.loader.task))

    def epoch():
        pipeline = builder.build(num_threads=threads)
        with pipeline.auto_stop():
            yield from tasks.batches(pipeline)

    return Epochs(epoch)


def open_dali(folder: Path, work: Path, batch_size: int, threads: int) -> Epochs:
    """NVIDIA DALI on the CPU: its own reader, decoder, warp and random numbers, compiled into one graph.

    Its documentation: the defaults are meant to do (https://docs.nvidia.com/deeplearning/dali/user-guide/docs/
    advanced_topics_performance_tuning.html), crop_mirror_normalize casts and transposes in one operator. Tried without a gain that
    exceeds the noise: queues of 1 and 3, exec_dynamic=False, DALI_AFFINITY_MASK, transpose and multiply, warp to float.
    Ours: the batch is a view of DALI's memory; its PyTorch plugin would copy it.
    """
    from nvidia.dali import fn, math, pipeline_def, types

    files, height, width = images_of(folder)
    centre = [width / 2, height / 2]

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None)
    def pipeline():
        jpegs, _ = fn.readers.file(files=files, shuffle_after_epoch=True, pad_last_batch=True, prefetch_queue_depth=2)
        zoom = fn.random.uniform(range=list(affine.ZOOM))
        shift = math.floor(fn.random.uniform(range=[-affine.SHIFT, affine.SHIFT], shape=2) * np.float32([width, height]) + 0.5)
        matrix = fn.transforms.scale(scale=fn.stack(zoom, zoom), center=centre)
        matrix = fn.transforms.rotation(matrix, angle=fn.random.uniform(range=[-affine.DEGREES, affine.DEGREES]), center=centre)
        matrix = fn.transforms.translation(matrix, offset=shift)
        images = fn.decoders.image(jpegs, device="cpu")
        images = fn.warp_affine(images, matrix=matrix, inverse_map=False, interp_type=types.INTERP_NN, fill_value=0)
        return fn.crop_mirror_normalize(images, std=255.0, dtype=types.FLOAT, output_layout="CHW")

    graph = pipeline()

    def epoch():
        for left in range(len(files), 0, -batch_size):
            (images,) = graph.run()  # valid until the next run
            yield torch.from_numpy(np.asarray(images.as_tensor()))[:left]

    return Epochs(epoch)


def open_ffcv(folder: Path, work: Path, batch_size: int, threads: int) -> Epochs:
    """FFCV: all images in one memory-mapped file, and decoding and augmentation compiled into one parallel loop.

    Its documentation: os_cache=True and RANDOM for a data set that fits in memory (https://docs.ffcv.io/parameter_tuning.html),
    augmentations of one's own as compiled operations (https://docs.ffcv.io/bottleneck_doctor.html). The file holds the JPEG files'
    own bytes. Its decoder takes libjpeg's fast, less exact transform. Ours: decoding and warp in one operation, one batch ahead
    (two and three are no faster), and batches that stay from one epoch to the next, which saves a tenth of the CPU time.
    """
    from ffcv.fields.rgb_image import IMAGE_MODES, RGBImageField, SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.writer import DatasetWriter
    from numba import njit

    files, height, width = images_of(folder)

    class JpegField(RGBImageField):
        def encode(self, destination, jpeg: np.ndarray, malloc) -> None:
            destination["mode"], destination["height"], destination["width"] = IMAGE_MODES["jpg"], height, width
            destination["data_ptr"], storage = malloc(jpeg.size)
            storage[:] = jpeg

    class JpegFiles:
        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            return (np.fromfile(files[index], np.uint8),)

    @njit(nogil=True)
    def warp(words, out):  # the matrix is drawn here: a compiled operation sees no array that changes from epoch to epoch
        angle, zoom = math.radians(np.random.uniform(-affine.DEGREES, affine.DEGREES)), np.random.uniform(affine.ZOOM[0], affine.ZOOM[1])
        x = 0.5 - width / 2 - np.round(np.random.uniform(-affine.SHIFT * width, affine.SHIFT * width))
        y = 0.5 - height / 2 - np.round(np.random.uniform(-affine.SHIFT * height, affine.SHIFT * height))
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        inverse = np.array([cos, sin, cos * x + sin * y + width / 2, -sin, cos, cos * y - sin * x + height / 2])
        affine.warp_into(words, np.floor(inverse * 65536 + 0.5).astype(np.int64), out)

    class DecodeAndWarp(SimpleRGBImageDecoder):
        def declare_state_and_memory(self, previous_state):
            batch = AllocationQuery((3, height, width), np.dtype("float32"))
            return replace(previous_state, jit_mode=True, shape=batch.shape, dtype=batch.dtype), batch

        def generate_code(self):
            read, decode, parallel_range = self.memory_read, Compiler.compile(imdecode), Compiler.get_iterator()

            def run(indices, batch, metadata, storage):
                for i in parallel_range(len(indices)):
                    pixels = np.empty((height * width * 3 // 4 + 2) * 4, np.uint8)
                    jpeg = read(metadata[indices[i]]["data_ptr"], storage)
                    decode(jpeg, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    words = np.lib.stride_tricks.as_strided(pixels.view(np.uint32), (height, width), (width * 3, 3))
                    warp(words, batch[i])
                return batch

            run.is_parallel = True
            return run

    if not (beton := work / "images.beton").exists():
        with atomic_path(beton) as part:
            DatasetWriter(str(part), {"image": JpegField()}, num_workers=1).from_indexed_dataset(JpegFiles())
    how = {"os_cache": True, "order": OrderOption.RANDOM, "drop_last": False, "batches_ahead": 1}
    pipelines, fields = {"image": [DecodeAndWarp()]}, {"image": JpegField}
    loader = Loader(str(beton), batch_size, num_workers=threads, pipelines=pipelines, custom_fields=fields, **how)
    loader.graph.allocate_memory = functools.cache(loader.graph.allocate_memory)
    return Epochs(lambda: (torch.from_numpy(images) for (images,) in loader))


PEERS = {"webdataset": open_webdataset, "torchdata": open_torchdata, "spdl": open_spdl, "dali": open_dali, "ffcv": open_ffcv}
MODULES = {"torchdata": "torchdata.nodes", "spdl": "spdl.pipeline", "dali": "nvidia.dali"}  # where it is not the peer's name


def installed() -> list[str]:
    """The peers found here, by name; they are looked for, not imported."""
    return [name for name in PEERS if is_there(MODULES.get(name, name))]


def is_there(module: str) -> bool:
    """Whether `module` could be imported, found out without importing it."""
    parent = module.rpartition(".")[0]
    return (not parent or is_there(parent)) and importlib.util.find_spec(module) is not None
