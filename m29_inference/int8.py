"""Turn a trained network into one that computes with int8, compile it, and keep it as one file.

Three steps, each of which is a program that works on a graph of operations. torch.export records the network's graph. torchao watches
some batches run through it, chooses a scale and a zero point for every tensor, and writes quantize and dequantize into the graph.
PyTorch's compiler finds these around a convolution or a linear layer and replaces the group by one int8 operation. Without the
third step nothing is gained: quantize, dequantize and a float convolution take longer than the convolution alone.

What AOTInductor writes is machine code with the weights inside: it needs neither torchao nor a compiler to run, but fits this kind of
CPU, this batch size and this number of threads. The graph, which int8_file.py keeps, is small, and for any batch size and system.
"""

import contextlib
import copy
import dataclasses
import functools
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from errors import InputError, first_line
from machine import cpu_has

ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)
SMALLEST_SCALE = 2**-60  # torchao's own 2**-12 is coarser than the activations of some networks, mobilenet_v3 for one


def activation_bits() -> int:
    """8, or 7 where the sum of two products would have to fit into 16 bits."""
    return 7 if sums_overflow() else 8


def has_vnni() -> bool:
    """Whether the processor adds up products of int8 numbers in 32 bits; older ones do it in 16, which two large products overflow."""
    return cpu_has("avx512_vnni") or cpu_has("avx_vnni")


def sums_overflow() -> bool:
    """Whether the sum of two large products is too much for the processor: on x86 without VNNI; elsewhere it has 32 bits or is a float."""
    return platform.machine().lower() in ("x86_64", "amd64") and not has_vnni()


@functools.cache
def why_not_compiled() -> str | None:
    """Why PyTorch's compiler can make no CPU code here, None where it can: a tiny program shows whether the C++ compiler works."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    chosen = os.environ.get("CXX") or default  # as torch._inductor chooses it
    # a path, with a blank in it perhaps, or a command with flags
    command = [chosen] if shutil.which(chosen) else shlex.split(chosen, posix=sys.platform != "win32")
    if not shutil.which(command[0]):
        return f"There is no C++ compiler here ({command[0]})"
    library = ["/LD", "/EHsc"] if sys.platform == "win32" else ["-shared", "-fPIC", "-o", "tiny.so"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tiny.cpp").write_text("#include <vector>\nint tiny() { return std::vector<int>(42).size(); }\n")
        done = subprocess.run([*command, *library, "tiny.cpp"], cwd=folder, capture_output=True, text=True, errors="replace")
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[0][:100]
    return f"The C++ compiler {' '.join(command)} does not work here ({said})" if done.returncode else None


def has_compiler() -> bool:
    """Whether there is a C++ compiler that works, without which PyTorch's compiler makes no CPU code."""
    return why_not_compiled() is None


def quiet() -> contextlib.ExitStack:
    """Without the warnings of libraries about their own plans; a learner can do nothing about them."""
    stack = contextlib.ExitStack()
    stack.enter_context(warnings.catch_warnings(action="ignore"))
    for name in ("torchao", "torch.export", "torch._inductor", "torch.utils._pytree", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return stack


# ---- from float to int8 ----------------------------------------------------------------------------------------------


def import_quantizer():
    """torchao's module for x86 CPUs; InputError where torchao is missing.

    Its import also makes the operations of an int8 graph known to torch: without it, the compiler would find no int8 pattern, silently.
    """
    try:
        with quiet():
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer
    except ImportError as error:
        raise InputError(f"torchao is missing ({error}): pip install -r requirements.txt") from error
    return x86_inductor_quantizer


def int8_recipe(keep_float: tuple[str, ...] = ()):
    """torchao's quantizer for x86 CPUs: a scale for each channel of a weight, one for each activation, both from what was observed.

    keep_float: names of layers that stay float32.
    """
    x86 = import_quantizer()
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=activation_bits() < 8)
    for part in ("input_activation", "weight"):
        spec = getattr(config, part)
        observer = spec.observer_or_fake_quant_ctr
        finer = functools.partial(observer.p.func, **{**observer.p.keywords, "eps": SMALLEST_SCALE})
        config = dataclasses.replace(config, **{part: dataclasses.replace(spec, observer_or_fake_quant_ctr=type(observer)(finer))})
    quantizer = x86.X86InductorQuantizer().set_global(config)
    for name in keep_float:
        quantizer.set_module_name_qconfig(name, None)
    return quantizer


def export_network(network: nn.Module, images: torch.Tensor, any_batch: bool = True) -> torch.export.ExportedProgram:
    """The graph of `network` in eval mode; InputError where it cannot be recorded."""
    try:
        # strict: the graph of a residual network that the default mode records cannot be quantized
        example = (images.repeat(2, 1, 1, 1) if any_batch else images,)  # of a single image it would conclude that there is always one
        return torch.export.export(network, example, strict=True, dynamic_shapes=ANY_BATCH if any_batch else None)
    except Exception as error:  # of torch.export's many kinds
        name = type(network).__name__
        raise InputError(f"{name} cannot be exported as one graph, so it cannot be quantized this way ({first_line(error)})") from error


def quantize_network(network: nn.Module, calibration: list[torch.Tensor], keep_float: tuple[str, ...] = ()) -> torch.fx.GraphModule:
    """The int8 graph of `network`, for any batch size; the batches of `calibration`, (n, 3, height, width), set the scales.

    InputError where torch cannot record the network or torchao cannot convert it.
    """
    recipe = int8_recipe(keep_float)
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    exported = export_network(copy.deepcopy(network).eval(), calibration[0])
    try:
        with quiet(), torch.no_grad():
            observed = prepare_pt2e(exported.module(), recipe)
            for images in tqdm(calibration, "calibrating", unit="batch", leave=False):
                observed(images)
            return drop_unused(convert_pt2e(norms_to_products(observed)))
    except Exception as error:  # of torchao, about an operation that it does not know
        raise InputError(f"torchao cannot convert {type(network).__name__} to int8 ({first_line(error)})") from error


def norms_to_products(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Write each batch normalization as x * scale + shift, a pair a channel, which is what it computes in eval mode.

    Those behind a convolution are part of its weights by now; this is for the others. convert_pt2e would look for them for 15 s.
    """
    held = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    for node in [node for node in graph.graph.nodes if node.target == torch.ops.aten.batch_norm.default]:
        x, epsilon = node.args[0], node.args[7]
        weight, bias, mean, variance = (held[source.target].detach() for source in node.args[1:5])
        scale = weight / torch.sqrt(variance + epsilon)
        for operation, value in {torch.ops.aten.mul.Tensor: scale, torch.ops.aten.add.Tensor: bias - mean * scale}.items():
            name = f"{node.name}_{operation.overloadpacket.__name__}"
            graph.register_buffer(name, value.view(-1, *[1] * (node.meta["val"].ndim - 2)))
            with graph.graph.inserting_before(node):
                x = graph.graph.call_function(operation, (x, graph.graph.get_attr(name)))
            x.meta = dict(node.meta)
        node.replace_all_uses_with(x)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def drop_unused(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Delete the float weights that the int8 graph no longer reads: they would be four fifths of the file."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(graph.get_submodule(owner), attribute)
    return graph


# ---- machine code ----------------------------------------------------------------------------------------------------


def compile_to_file(network: nn.Module, images: torch.Tensor, file: Path, marked: bool = False) -> Path:
    """Compile for batches of this very size and for the number of threads set now; returns the file. InputError where that fails.

    `marked`: with a mark around each call that torch.profiler times, on Linux and Windows.
    """
    settings = {"freezing": True, "cpp.enable_kernel_profile": marked}
    exported = export_network(network, images, any_batch=False)
    try:
        with quiet(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(exported, package_path=str(file), inductor_configs=settings)
    except RuntimeError as error:  # torch's compiler raises kinds of it
        raise InputError(f"it cannot be compiled here ({first_line(error)})") from error
    return file


def load_compiled(file: Path):
    """The network in `file`, a function of a batch; InputError where the system does not load code from the file's folder."""
    try:
        return torch._inductor.aoti_load_package(str(file))
    except (RuntimeError, OSError) as error:  # a folder of temporary files that is mounted noexec
        raise InputError(f"compiled code cannot be loaded here ({first_line(error)})") from error


def int8_calls(file: Path) -> list[str]:
    """The calls of int8 convolutions and linear layers in the C++ that the compiler wrote; none would mean that all is float after all."""
    with zipfile.ZipFile(file) as package:
        sources = [package.read(name).decode(errors="replace") for name in package.namelist() if name.endswith("wrapper.cpp")]
    return re.findall(r"aoti_torch_cpu__q(?:conv|linear)\w*\((?!\").*", "\n".join(sources))  # not the mark, which has the name in quotes
