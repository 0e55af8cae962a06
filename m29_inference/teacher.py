"""The teacher of distill.py: an image classifier of the Hugging Face hub or of a folder, or our own network, and its logits on disk.

What a teacher says about an image is the same in every training, so it is computed once for each view (the images as augmented in one
epoch) and kept, in files of CHUNK images. A run that was killed goes on after the last whole file; several processes can share the work.
"""

import contextlib
import hashlib
import inspect
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import SAMPLE_NAME, Images, augment, normalize, stratified
from data.hub import HUB_ID, class_name, fetched_before, hub_reached, refuse_full_disk
from errors import InputError, first_line
from m29_inference import student
from m29_inference.int8 import quiet
from m29_inference.training import fast_format, fingerprint
from paths import DAMAGED, DATA, atomic_path

CHUNK = 2000  # images a file: seconds of our network, two minutes of a Vision Transformer on two cores
WIDTHS = (64, 128, 384)  # of our own teacher, two million parameters; for the drawn sample it is the network of student.py
GATE = 500  # test images on which a teacher is measured before anything is computed with it
UNCHANGED = -1  # the view without augmentation
VIEWS_SEED = 0  # of the augmentation, which is the same for all students: so are the teacher's logits


@dataclass
class Teacher:
    """What gives logits (n, classes), in the data's order of classes, for uint8 images (n, 3, 32, 32)."""

    name: str
    module: nn.Module
    prepare: Callable[[torch.Tensor], torch.Tensor]  # uint8 images -> what the module takes
    device: torch.device
    preparation: str = "normalize"  # in words what `prepare` does, and what else is no weight: activations, the order of classes
    batch: int = 250
    training: dict = field(default_factory=dict)  # epochs and train_s, where it was trained here

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """float32 (n, classes), on the CPU."""
        parts = []
        with torch.inference_mode(), torch.autocast(**fast_format(self.device)):
            for some in images.split(self.batch):
                parts.append(self.module(self.prepare(some.to(self.device))).float().cpu())
        return torch.cat(parts)

    def fingerprint(self) -> str:
        """Of all its numbers, its number format, and how images are prepared and classes ordered: another teacher has another one."""
        return hashlib.sha256(f"{self.preparation} {CODE} {fast_format(self.device)} {fingerprint(self.module)}".encode()).hexdigest()[:16]


# ---- which teacher ---------------------------------------------------------------------------------------------------


class Mirrored(nn.Module):
    """The mean of a network's logits for an image and for its mirror image: twice the work, and right more often."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.network(images) + self.network(images.flip(3))) / 2


class Pretrained(nn.Module):
    """A classifier of the library transformers as a plain network: what its processor made of images -> logits (n, classes)."""

    def __init__(self, classifier: nn.Module, order: list[int]) -> None:
        super().__init__()
        self.classifier, self.order = classifier, order

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classifier(pixel_values=pixels).logits[:, self.order]


def own_teacher(data: dict[str, Images], widths: tuple, epochs: int | None, seed: int, device: torch.device) -> Teacher:
    """Our network of these widths, trained on these data on first use; it looks at every image in both directions."""
    network, rows = student.trained_student(data, epochs, seed, device, widths)

    def prepare(images: torch.Tensor) -> torch.Tensor:
        return normalize(images).contiguous(memory_format=torch.channels_last)

    took = {"epochs": len(rows), "train_s": rows[-1]["train_s"]}
    return Teacher("teacher", Mirrored(network).eval(), prepare, device, training=took)


def load_pretrained(source: str):
    """The image processor and the classifier of a folder or an id of the hub; InputError in two seconds where there is none."""
    here = Path(source).exists()
    if not hub_reached() and not here and not fetched_before(source, "models"):  # for a folder, too: -data may be an id of the hub
        raise InputError(
            f"-teacher {source}: no such folder, and the Hugging Face hub cannot be reached: give a folder that "
            "save_pretrained() wrote, or leave -teacher out, then one is trained here"
        )
    with quiet():
        try:
            from transformers import AutoImageProcessor, AutoModelForImageClassification, logging
        except ImportError as error:
            raise InputError(f"transformers is missing ({error}): pip install -r requirements.txt") from error
        logging.set_verbosity_error()
        if here:
            logging.disable_progress_bar()
        try:
            classifier = AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32)  # a file may hold bfloat16
            return AutoImageProcessor.from_pretrained(source), classifier.eval()
        except Exception as error:  # the library raises errors of many kinds
            refuse_full_disk(error)
            where = "no image classifier in this folder" if here else "not to be had from the hub"
            # the library says which in a report that it prints
            why = "its weights have other sizes than its config.json says" if "mismatched" in str(error) else first_line(error)
            raise InputError(f"-teacher {source}: {where} ({why})") from error


def pretrained_teacher(source: str, processor, classifier: nn.Module, data: Images, device: torch.device) -> Teacher:
    """A classifier with the classes of `data`, whatever their order; InputError where they are others."""
    order = match_classes(source, classifier.config.id2label, data)

    def prepare(images: torch.Tensor) -> torch.Tensor:
        return processor(images=images, return_tensors="pt", device=device)["pixel_values"]

    settings = f"{processor.to_json_string()} {classifier.config.to_json_string()} {order} transformers {version('transformers')}"
    return Teacher(source, Pretrained(classifier, order).to(device).eval(), prepare, device, settings, batch=50)


def match_classes(source: str, names: dict[int, str], data: Images) -> list[int]:
    """The teacher's output for each class of the data, by name; in its own order where it names them LABEL_0, LABEL_1 ..."""
    classes, names = data.classes, {number: str(name) for number, name in names.items()}
    if len(names) != len(classes):
        raise InputError(f"-teacher {source} knows {len(names):,} classes, the data have {len(classes)}: give one fine-tuned on these data")
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names.values()):
        print(f"{source} does not name its classes: taken in the data's order, which its accuracy will confirm or not")
        return list(range(len(classes)))
    index = {class_name(name): number for number, name in names.items()}
    if missing := [name for name in classes if class_name(name) not in index]:
        hint = f"; these are the classes of {SAMPLE_NAME}, give -data {HUB_ID}" if data.name == SAMPLE_NAME else ""
        raise InputError(f"-teacher {source} does not know {', '.join(missing)}: its classes are {', '.join(names.values())}{hint}")
    return [index[class_name(name)] for name in classes]


def find_teacher(args, data: dict[str, Images], real: bool, pretrained) -> Teacher:
    """The teacher, after its accuracy was measured; InputError when that is less than -min_teacher_accuracy."""
    if pretrained:
        teacher = pretrained_teacher(args.teacher, *pretrained, data["test"], args.device)
    elif real:
        teacher = own_teacher(data, WIDTHS, args.teacher_epochs, args.seed, args.device)
    else:
        teacher = own_teacher(data, student.WIDTHS, args.teacher_epochs or (4 if args.quick else student.EPOCHS), args.seed, args.device)
    some = stratified(data["test"], min(GATE, len(data["test"])))
    parts = tqdm(some.images.split(teacher.batch), "measuring the teacher", unit="batch", leave=False)
    reached = (torch.cat([teacher.logits(part) for part in parts]).argmax(1) == some.labels).double().mean().item()
    print(f"{teacher.name}: {reached:.1%} of {len(some)} test images right")
    if reached < args.min_teacher_accuracy:
        raise InputError(
            f"{teacher.name} is right for {reached:.1%} of the test images, less than -min_teacher_accuracy {args.min_teacher_accuracy}: "
            "a student would learn its errors"
        )
    return teacher


# ---- its logits, kept ------------------------------------------------------------------------------------------------


# What makes logits out of images, read now, for the files may be edited while they are computed: of another code they are others.
CODE = [inspect.getsource(part) for part in (Teacher.logits, Mirrored, Pretrained, own_teacher, pretrained_teacher, augment, normalize)]


def cache_folder(teacher: Teacher, data: Images) -> Path:
    """A folder for this teacher, these images and their augmentation: logits of others are never taken for theirs."""
    digest = hashlib.sha256(f"{teacher.fingerprint()} {VIEWS_SEED}".encode() + data.images.numpy().tobytes())
    return DATA / "teacher_logits" / digest.hexdigest()[:16]


def chunks(data: Images) -> list[range]:
    """The places of the images of each file."""
    return [range(first, min(first + CHUNK, len(data))) for first in range(0, len(data), CHUNK)]


def view_of(data: Images, view: int, chunk: range) -> torch.Tensor:
    """The images of `chunk` as they are in epoch `view` of a student's training."""
    indices = torch.arange(chunk.start, chunk.stop)
    images = data.images[indices]
    return images if view == UNCHANGED else augment(images, indices, VIEWS_SEED, view, len(data))


def read_chunk(folder: Path, view: int, chunk: range) -> torch.Tensor | None:
    """float16 (images of the chunk, classes); None where there is no whole file, or one of another CHUNK."""
    with contextlib.suppress(*DAMAGED), np.load(chunk_file(folder, view, chunk)) as arrays:
        logits = torch.from_numpy(arrays["logits"])
        return logits if len(logits) == len(chunk) else None
    return None


def chunk_file(folder: Path, view: int, chunk: range) -> Path:
    return folder / f"view{view:+04}_{chunk.start:06}.npz"


def compute_logits(teacher: Teacher, data: Images, views: list[int], folder: Path, rank: int = 0, processes: int = 1) -> None:
    """Compute the chunks that are missing or damaged; of `processes` that share the work each takes its part."""
    jobs = [(view, chunk) for view in views for chunk in chunks(data)][rank::processes]
    missing = [job for job in jobs if read_chunk(folder, *job) is None]
    if 0 < len(missing) < len(jobs):
        print(f"logits of {len(jobs) - len(missing)} of {len(jobs)} chunks were computed before")
    for view, chunk in tqdm(missing, "logits of the teacher", unit="chunk", leave=False, disable=rank > 0):
        logits = teacher.logits(view_of(data, view, chunk)).half().numpy()
        with atomic_path(chunk_file(folder, view, chunk)) as temporary:
            np.savez(temporary, logits=logits)


def cached_logits(teacher: Teacher, data: Images, views: list[int]) -> dict[int, torch.Tensor]:
    """For each view the teacher's logits of all images, float16 (n, classes); says how long it took to compute them."""
    folder, begin = cache_folder(teacher, data), time.perf_counter()
    compute_logits(teacher, data, views, folder)
    print(f"the teacher's logits of {len(data):,} images, {len(views)} view{'s' * (len(views) > 1)}: {time.perf_counter() - begin:.1f} s")
    return {view: torch.cat([read_chunk(folder, view, chunk) for chunk in chunks(data)]) for view in views}


def share_logits(teacher: Teacher, wanted: list[tuple[Images, list[int]]]) -> NoReturn:
    """Compute this process's part of the teacher's logits of the images in these views, and end."""
    rank, processes = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    for images, views in wanted:
        compute_logits(teacher, images, views, cache_folder(teacher, images), rank, processes)
    print(f"rank {rank} of {processes}: its part of the logits is on disk; when all are done, run the same without torchrun")
    sys.exit()
