"""Save a training run so that kill -9 at any moment loses at most `-every` steps, and go on from there to the same last bit.

One file holds everything that the next step depends on: model, optimizer, scheduler, step, random state, and the settings that must
not change on the way. It is written beside the old one and moved over it, so that there is always one that is whole. The first
process of each machine writes one; on resuming, the newest of all machines is sent to everybody: a machine that was away catches up.
The random state is that of the writer's CPU, which sets nothing here but first parameters: order and augmentation are functions of the
step. A network with dropout would need one for each process, and torch.cuda.get_rng_state() for each GPU.
"""

import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import positive_int
from errors import InputError, first_line
from m28_distributed_training.group import local_rank
from paths import DAMAGED, atomic_path, check_file_place, check_zip

FORMAT = "course-m28-checkpoint-1"
PARTS = {"step", "settings", "model", "optimizer", "scheduler", "rng"}
EVERY = 20  # steps from one checkpoint to the next, where -every does not say it


def add_checkpoint_flags(parser) -> None:
    parser.add_argument("-checkpoint", type=Path, metavar="FILE", help="save model, optimizer, scheduler and step here as training goes")
    parser.add_argument("-every", type=positive_int, help=f"steps from one checkpoint to the next (default: {EVERY})")
    parser.add_argument("-resume", action="store_true", help="go on from -checkpoint FILE where there is one, else begin")


def check_file(file: Path, resume: bool) -> None:
    """Raise InputError before the training where no checkpoint could be written, or what is there would be lost."""
    check_file_place("-checkpoint", file)
    if isinstance(found := read_checkpoint(file), str):
        raise InputError(found)
    if found and not resume:
        raise InputError(f"-checkpoint {file} is there, of step {found['step']}: give -resume to go on from it, or remove it to begin anew")


def save_checkpoint(file: Path, state: dict) -> bool:
    """Write `state` on the first process of each machine; False, and a warning, where the disk is full: the old file then stays.

    InputError where another run has written its own there since this one began.
    """
    if local_rank(dist.get_rank()):
        return True
    check_settings(file, saved_settings(file) or state["settings"], state["settings"])
    content = io.BytesIO()  # torch's own writer says nothing of a full disk when it fails on one
    torch.save({"format": FORMAT, **state}, content)
    try:
        with atomic_path(file) as temporary:
            temporary.write_bytes(content.getbuffer())
    except (OSError, InputError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        said = f"warning: no checkpoint at step {state['step']}: {file} cannot be written ({reason}); the training goes on"
        tqdm.write(said, file=sys.stderr)  # not behind the progress bar
        return False
    return True


def load_checkpoint(file: Path, settings: dict) -> dict | None:
    """The newest state among all machines, None where there is none; InputError when it is damaged or of another run.

    Called by all processes together. `settings` are those of this run: a state saved with others is refused, with the reason.
    """
    state = read_checkpoint(file)
    if isinstance(state, dict):
        try:
            check_settings(file, state["settings"], settings)
        except InputError as error:  # on this machine perhaps alone: its file shall not be written over
            state = str(error)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, state["step"] if isinstance(state, dict) else state)  # a step, a complaint or None from each process
    if complaints := [complaint for complaint in found if isinstance(complaint, str)]:
        raise InputError(complaints[0])
    if found.count(None) == len(found):
        return None
    newest = max(range(len(found)), key=lambda rank: -1 if found[rank] is None else found[rank])
    box = [state if dist.get_rank() == newest else None]
    dist.broadcast_object_list(box, src=newest)
    return box[0]


def read_checkpoint(file: Path) -> dict | str | None:
    """The file's content, None where there is no file, and where it cannot be used a sentence that says why."""
    if not file.exists():
        return None
    try:
        check_zip(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        return f"-checkpoint {file} cannot be read ({error.strerror})"
    except DAMAGED:
        return f"-checkpoint {file} is damaged or no checkpoint: remove it to begin anew, or give another one"
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= PARTS or not isinstance(state["settings"], dict):
        return f"-checkpoint {file} is not a checkpoint of these scripts: give another file"
    return state


def saved_settings(file: Path) -> dict | None:
    """Those of the run that wrote the file, without reading its numbers; None where there is none, or none that can be read."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["settings"]
    except DAMAGED:
        return None


def check_settings(file: Path, saved: dict, wanted: dict) -> None:
    """Raise InputError, naming the flags, when going on would not end where the uninterrupted run would have ended."""
    other = [key for key in wanted if key != "world" and saved.get(key) != wanted[key]]
    if other:
        said = ", ".join(f"{key} {saved.get(key)} there and {wanted[key]} here" for key in other)
        raise InputError(f"-checkpoint {file} belongs to another run: {said}; give the same flags or another file")
    if saved["world"] != wanted["world"] and wanted["micro_batches"] > 2:  # two numbers have one sum, three have several in floating point
        raise InputError(
            f"-checkpoint {file} was written by {saved['world']} processes, these are {wanted['world']}: with {wanted['micro_batches']} "
            "micro-batches a step the sum would be taken in another order; only with 2 it is exact"
        )
