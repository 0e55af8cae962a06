"""Other runtimes' int8, for comparison: ONNX Runtime and OpenVINO, each tuned as its documentation says (requirements-peers.txt).

Both get the same network, the same images to calibrate with and the same number of threads. ONNX Runtime: quantize and dequantize
in the graph, a scale a channel for weights, after its own shape inference and simplification; where there is no VNNI weights of 7 bits,
without which its sums overflow there. OpenVINO: NNCF's default algorithm, which corrects biases as well, latency hint. A peer that is
missing or fails is named, with the reason, and left out.
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from errors import first_line
from m29_inference.int8 import ANY_BATCH, quiet, sums_overflow


class Peer(NamedTuple):
    """A network converted for another runtime: what loads it, for a shape of images and a number of threads, and MB as saved."""

    load: Callable[[torch.Size, int], Callable[[torch.Tensor], torch.Tensor]]
    size_mb: float


def convert_for_peers(network: nn.Module, calibration: list[torch.Tensor], folder: Path) -> dict[str, Peer]:
    """The converted network by name of the peer, of those that can do it."""
    found = {}
    for name, convert in {"int8, ONNX Runtime": onnx_runtime, "int8, OpenVINO": openvino}.items():
        try:
            with quiet(), contextlib.redirect_stdout(io.StringIO()):
                found[name] = convert(network, calibration, folder)
        except ImportError as error:
            print(f"{name} is left out: {error.name or error} is not installed (requirements-peers.txt)")
        except Exception as error:  # each library has its own, and an operation that it does not know
            print(f"{name} is left out: it cannot convert this network ({first_line(error)})")
    return found


def load_peers(converted: dict[str, Peer], images: torch.Tensor) -> dict:
    """{name: function of a batch as large as `images`, with the threads set now}, of the peers that can do it."""
    functions = {}
    for name, peer in converted.items():
        try:
            function = peer.load(images.shape, torch.get_num_threads())
            function(images)
            functions[name] = function
        except Exception as error:  # each library has its own
            tqdm.write(f"{name} is left out at batch {len(images)}: it fails ({first_line(error)})")
    return functions


def onnx_runtime(network: nn.Module, calibration: list[torch.Tensor], folder: Path) -> Peer:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        batches = iter(calibration)

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    exported, prepared, quantized = (str(folder / f"{name}.onnx") for name in ("float", "prepared", "int8"))
    torch.onnx.export(
        network,
        (calibration[0].repeat(2, 1, 1, 1),),
        exported,
        input_names=["images"],
        dynamic_shapes=ANY_BATCH,
        dynamo=True,
        verbose=False,
    )
    quant_pre_process(exported, prepared)
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": sums_overflow()}
    quantize_static(prepared, quantized, Reader(), quant_format=QuantFormat.QDQ, **options)

    def load(shape: torch.Size, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return Peer(load, Path(quantized).stat().st_size / 1e6)


def openvino(network: nn.Module, calibration: list[torch.Tensor], folder: Path) -> Peer:
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    model = openvino.convert_model(network, example_input=calibration[0], input=[-1, *calibration[0].shape[1:]])
    quantized = nncf.quantize(model, nncf.Dataset(calibration, lambda batch: batch.numpy()), subset_size=len(calibration))

    file = folder / "openvino.xml"  # the graph; the weights stand beside it
    openvino.save_model(quantized, file, compress_to_fp16=False)  # as the others keep what is left in float

    def load(shape: torch.Size, threads: int):
        fixed = quantized.clone()
        fixed.reshape(list(shape))
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        compiled = openvino.Core().compile_model(fixed, "CPU", options)
        return lambda images: torch.from_numpy(compiled(images.numpy())[0])

    return Peer(load, sum(part.stat().st_size for part in (file, file.with_suffix(".bin"))) / 1e6)
