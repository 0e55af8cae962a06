"""The file that an int8 network is kept in: its graph and its whole numbers, for any batch size, to be compiled where it is used."""

import io
import json
import re
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from errors import InputError
from m29_inference.int8 import activation_bits, export_network, import_quantizer, quiet
from paths import DAMAGED, atomic_path, check_zip

MADE_OF, BITS = "made_of", "activation_bits"  # the notes in it
# All that save_graph writes: numbers, and text. torch.export.load() reads other parts, too, unpickles them, or runs them as machine code.
PARTS = re.compile(
    r"\w+/(models/model\.json|data/(weights|constants)/(weight_\d+|tensor_\d+|model_weights_config\.json|model_constants_config\.json)"
    rf"|data/sample_inputs/model\.pt|extra/({MADE_OF}|{BITS})|archive_format|archive_version|byteorder|\.data/(version|serialization_id))"
)


def save_graph(graph: torch.fx.GraphModule, images: torch.Tensor, file: Path, made_of: str = "") -> Path:
    """Keep the int8 network itself, for any batch size, to be compiled where it is used. `made_of`: which float network it was."""
    with quiet(), torch.no_grad(), atomic_path(file) as temporary:
        exported = export_network(graph, images)
        exported.example_inputs = None  # they would go into the file
        for node in exported.graph.nodes:
            for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):  # where it came from
                node.meta.pop(note, None)
        content = io.BytesIO()  # torch's own writer does not say it when the disk is full
        torch.export.save(exported, content, extra_files={MADE_OF: made_of, BITS: str(activation_bits())})
        temporary.write_bytes(deflate_text(content).getbuffer())
    return file


def deflate_text(content: io.BytesIO) -> io.BytesIO:
    """The same zip file with the graph's text compressed, which would be a quarter of a small network's; the weights stay as they are."""
    smaller = io.BytesIO()
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(smaller, "w") as new:
        for name in old.namelist():
            entry = zipfile.ZipInfo(name)  # without the time, so that the same network is the same file
            new.writestr(entry, old.read(name), zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED)
    return smaller


def check_graph_file(file: Path) -> None:
    """InputError where there is no such file, a damaged one, or one for other processors: to be called before minutes are spent.

    Also for one with a part that could run code while it is read; save_graph writes none.
    """
    if Path(file).is_dir():
        raise InputError(f"-load {file} is a folder: give a file")
    if not Path(file).is_file():
        raise InputError(f"-load {file}: no such file")
    try:
        check_zip(file)
        with zipfile.ZipFile(file) as parts:
            [bits] = [parts.read(name) for name in parts.namelist() if name.endswith(f"/{BITS}")]
            foreign = [part.filename for part in parts.infolist() if not is_ours(part, parts)]
    except DAMAGED as error:
        raise InputError(f"{file} is damaged, or not a network that was kept with -save") from error
    if foreign:
        raise InputError(f"{file} is not a network that was kept with -save: {foreign[0]} could run any code when it is read")
    if bits == b"8" and activation_bits() == 7:
        raise InputError(f"{file} has activations of 8 bits, for processors with VNNI: here their sums would overflow, convert it anew")


def is_ours(part: zipfile.ZipInfo, parts: zipfile.ZipFile) -> bool:
    """Whether save_graph writes such a part: none of another name, no example images, no tensors whose list says that they are pickled."""
    if part.filename.endswith("_config.json"):
        pickled = any(tensor["use_pickle"] for tensor in json.loads(parts.read(part))["config"].values())
    else:
        pickled = "/sample_inputs/" in part.filename and part.file_size > 0
    return not pickled and PARTS.fullmatch(part.filename) is not None


def load_graph(file: Path) -> tuple[nn.Module, str]:
    """What save_graph kept, and `made_of`; InputError as of check_graph_file."""
    import_quantizer()
    check_graph_file(file)
    notes = {MADE_OF: ""}
    try:
        with quiet():
            graph = torch.export.load(file, extra_files=notes).module()
    except Exception as error:  # json's and torch's own
        raise InputError(f"{file} is damaged, or not a network that was kept with -save") from error
    return graph, notes[MADE_OF]
