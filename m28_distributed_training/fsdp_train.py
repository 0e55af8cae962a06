"""Train one network that no process holds as a whole: fully sharded training, FSDP2's fully_shard.

    python m28_distributed_training/fsdp_train.py                              memory a process beside DDP's, the same parameters
    python m28_distributed_training/fsdp_train.py -widths 64 128 512           a network of 3.2 M parameters
    python m28_distributed_training/fsdp_train.py -checkpoint fsdp.pt -resume -max_restarts 3    survives kill -9; not beside DDP then
    torchrun --nproc-per-node 2 m28_distributed_training/fsdp_train.py

With DDP every process keeps all parameters, all gradients and all of the optimizer's state. Here each keeps 1 / N of the three. Before
a stage of the network computes, its parameters are gathered from all processes (all-gather), and forgotten again afterwards; after its
backward pass each process receives only its own part of the summed gradients (reduce-scatter). That moves three times (N - 1) / N of
the parameters' bytes a step, with gloo on CPUs four times (traffic.py says why), DDP's all-reduce twice. The loop is ddp_train.py's;
the lines that differ are marked with  # sharded
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import ConvNet, load_cifar10
from common import parse, print_table, save_results
from m28_distributed_training.checkpoint import load_checkpoint, save_checkpoint
from m28_distributed_training.ddp_train import Reports, catch_sigterm, evaluate, fingerprint, micro_batches
from m28_distributed_training.group import Stopped, print0, said_once, several_machines
from m28_distributed_training.launch import launch
from m28_distributed_training.traffic import BytesSent, ddp_bytes, fsdp_bytes, on_loopback, parameter_bytes
from m28_distributed_training.training_flags import check, run_settings, training_parser

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the first process collects the parts, the others get nothing
STEPS = 40  # where neither -steps nor -epochs says how many


def train(args) -> None:
    """Train sharded, then the same steps with DDP, compare parameters and memory. Every process runs this."""
    with said_once():
        data = load_cifar10(args.data, args.batch_size)
    stop = catch_sigterm()
    sharded = train_once(args, data, stop, shard=True)
    report(args, data, sharded, None if args.checkpoint else train_once(args, data, stop, shard=False))


def shard_network(network: nn.Module, args) -> nn.Module:
    """Leave each process 1 / N of every parameter; each stage is gathered by itself, so that never the whole network is there."""
    mesh = init_device_mesh(args.device.type, (dist.get_world_size(),))
    for stage in network.stages:
        fully_shard(stage, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def train_once(args, data: dict, stop: list, shard: bool) -> dict:
    """The loop of ddp_train.py, sharded or not: what each process holds and sends, and the parameters at the end."""
    steps = args.steps or args.epochs * (len(data["train"]) // args.batch_size)
    settings = run_settings(args, data["train"], steps, "fsdp_train")
    torch.manual_seed(args.seed)  # the same first parameters in all processes, sharded or not
    network = ConvNet(args.widths, "group").to(args.device)
    P = parameter_bytes(network)
    model = shard_network(network, args) if shard else DistributedDataParallel(network)  # sharded
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)  # keeps two numbers a parameter
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    reports = Reports(args, stop)
    first = resume(args, settings, model, optimizer, scheduler) if shard else 0
    mean_loss, held, sent, wire, stopped, kept = None, {}, BytesSent(), None, False, False
    said = {"desc": "sharded" if shard else "DDP", "unit": "step", "disable": dist.get_rank() != 0}
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, **said)):
        with sent if step == first else contextlib.nullcontext():  # counts what the first step sends
            for number, (images, labels) in enumerate(micro_batches(data["train"], step, args), 1):
                last = number == args.accumulate
                if shard:
                    model.set_requires_gradient_sync(last)  # sharded: as DDP's no_sync()
                else:
                    model.require_backward_grad_sync = last
                with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                    loss = nn.functional.cross_entropy(model(images), labels) / args.accumulate
                loss.backward()
                reports.losses.append(loss.detach())
        optimizer.step()
        held, wire = held or held_bytes(model, optimizer, sent), wire or on_loopback()  # after the first step
        optimizer.zero_grad()
        scheduler.step()
        due = (step + 1) % args.every == 0 or step + 1 == steps
        if step >= reports.next or due:
            mean_loss, stopped = reports.agree(step, [local(parameter) for parameter in model.parameters()])
            bar.set_postfix(loss=f"{mean_loss:.3f}")
        if shard and args.checkpoint and (due or stopped):
            kept = save(args, step + 1, settings, model, optimizer, scheduler)
        if stopped:
            raise Stopped(step + 1, steps, kept)
    held = held or held_bytes(model, optimizer, sent)  # where a finished run was resumed
    moved = {"ring_mb": sent.by_ring(dist.get_world_size()) / 1e6 or None, "formula_mb": formula(args, P, shard) / 1e6}
    moved["wire_mb"] = wire_mb(args, wire, steps - first - 1)
    return {"held": held, **moved, "parameters": full_parameters(model), "loss": mean_loss}


def wire_mb(args, before: int | None, steps: int) -> float | None:
    """MB that each process sent in a step, with what other programs sent over the loopback interface; None where not only steps did."""
    if before is None or steps < 1 or args.checkpoint or args.backend != "gloo" or several_machines():
        return None
    return (on_loopback() - before) / steps / dist.get_world_size() / 1e6


def formula(args, P: int, shard: bool) -> int:
    """Bytes that a process sends in a step, with P bytes of parameters."""
    world = dist.get_world_size()
    return fsdp_bytes(world, P, args.accumulate) if shard else ddp_bytes(world, P)


# ---- what a process holds, and the whole again ------------------------------------------------------------------------


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, sent: BytesSent) -> dict[str, int]:
    """Bytes that this process holds when a step is done: parameters, gradients, the optimizer's state, the buckets that DDP sends."""
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {
        "parameters": sum(local(parameter).nbytes for parameter in parameters),
        "gradients": sum(local(parameter.grad).nbytes for parameter in parameters if parameter.grad is not None),
        "optimizer": sum(local(value).nbytes for value in states),
        "buckets": sent.handed["allreduce_"],  # a second place for each gradient, which DDP keeps
    }


def full_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters by name, whole: collected from the processes where they are sharded."""
    named = {name.removeprefix("module."): parameter.detach() for name, parameter in model.named_parameters()}
    return {name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu() for name, tensor in named.items()}


def save(args, step: int, settings: dict, model, optimizer, scheduler) -> bool:
    """Collect the parts on the first process, which writes them; False where it could not."""
    network_state, optimizer_state = get_state_dict(model, optimizer, options=WHOLE)  # sharded: all processes take part
    if dist.get_rank() == 0:
        state = {"model": network_state, "optimizer": optimizer_state, "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}
        return save_checkpoint(args.checkpoint, {"step": step, "settings": settings, **state})
    return True


def resume(args, settings: dict, model, optimizer, scheduler) -> int:
    """Give each process its part of the newest checkpoint, on request; the step to go on with."""
    state = load_checkpoint(args.checkpoint, settings) if args.checkpoint and args.resume else None
    if state is None:
        return 0
    whole = StateDictOptions(full_state_dict=True)  # sharded: each takes its own part out of the whole
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=whole)
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    print0(f"resumed at step {state['step']} from {args.checkpoint}")
    return state["step"]


def report(args, data: dict, sharded: dict, whole: dict | None) -> None:
    """Accuracy, memory and bytes of the runs in one table, and whether both ended with the same parameters."""
    world, rows = dist.get_world_size(), []
    for name, run in {"DDP": whole, "sharded": sharded}.items():
        if run is None:
            continue
        network = ConvNet(args.widths, "group").to(args.device)
        network.load_state_dict(run["parameters"])
        correct = evaluate(network, data["test"], args)
        held = {f"{key}_mb": count / 1e6 for key, count in run["held"].items()}
        row = {"variant": name, "processes": world, **held, "held_mb": sum(held.values())}
        row |= {key: run[key] for key in ("ring_mb", "formula_mb", "wire_mb")}
        row |= {"loss": run["loss"], "accuracy": correct / len(data["test"])}
        rows.append(row | {"parameters_sha256": fingerprint(network)})
    if dist.get_rank():
        return
    print(f"each of {world} processes, {args.num_threads} threads; MB held at the end of a step, and sent in one: by rings (what is handed")
    print("over, counted; and by formula), and on the wire")
    print_table([{key: value for key, value in row.items() if key != "parameters_sha256"} for row in rows])
    if whole:
        pairs = [(sharded["parameters"][name], tensor) for name, tensor in whole["parameters"].items()]
        difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        same = "the same bits" if difference == 0 else f"they differ by at most {difference:.1e}"
        print(
            f"parameters of both after the last step: {same}; a sharded process holds {rows[1]['held_mb'] / rows[0]['held_mb']:.2f}x DDP's"
        )
    print(f"parameters sha256 {rows[-1]['parameters_sha256']}")
    save_results(__file__, args, rows)


if __name__ == "__main__":
    parser = training_parser(__doc__, STEPS)
    args = parse(parser)
    if args.show:
        parser.error("argument -show: this script draws no picture")
    args.steps = args.steps or (None if args.epochs else STEPS)
    check(args)
    launch(train, args)
