"""Prune a network: set weights to zero, see what has changed and what has not, and make it permanent.

    python m29_inference/prune.py                          the exercises step by step, on LeNet and on the trained CIFAR-10 student
    python m29_inference/prune.py -amount 0.5              with half of the weights
    python m29_inference/prune.py -accuracy                accuracy over sparsity, before and after fine-tuning; a figure
    python m29_inference/prune.py -formats                 file size and latency of a sparse network, format by format; two figures
    python m29_inference/prune.py -structured              whole channels, really removed: latency, MACs, accuracy; two figures

torch.nn.utils.prune does not remove a weight. It moves `weight` to the parameter `weight_orig`, adds a buffer `weight_mask` of zeros and
ones, and computes `weight` as their product before every forward pass. So a pruned network first grows, and runs as long as before.
"Unstructured" pruning zeroes single weights; "structured" pruning takes whole channels, which can then be cut out of the tensors.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import parse, positive_int, print_table, save_results, share
from m29_inference.student import copy_of, cpu_parser, student_and_data
from m29_inference.training import accuracy

AMOUNT = 0.3  # share of the weights, where -amount does not say it


class LeNet(nn.Module):
    """The network of the exercise: grey images (n, 1, 32, 32) -> logits (n, 10). LeCun et al. 1998, with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv1(images)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


# ---- what the exercises look at --------------------------------------------------------------------------------------


def prunable(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that have a weight to prune, by name: convolutions and linear layers, without those that are never trained."""
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [(name, module) for name, module in layers if any(value.requires_grad for value in module.parameters())]


def sparsity(module: nn.Module, name: str = "weight") -> float:
    """Share of zeros in what the layer computes with."""
    values = getattr(module, name)
    return (values == 0).double().mean().item()


def sparsity_by_layer(network: nn.Module) -> list[dict]:
    """A row a layer and one for all of them: weights, zeros, sparsity."""
    rows = [
        {"layer": name, "weights": module.weight.numel(), "zeros": int((module.weight == 0).sum())} for name, module in prunable(network)
    ]
    rows.append({"layer": "all", "weights": sum(row["weights"] for row in rows), "zeros": sum(row["zeros"] for row in rows)})
    return [row | {"sparsity": row["zeros"] / row["weights"]} for row in rows]


def tensors(module: nn.Module) -> str:
    """The names of a layer's parameters and buffers, and their sizes."""
    parameters = ", ".join(f"{name} {tuple(value.shape)}" for name, value in module.named_parameters())
    buffers = ", ".join(f"{name} {tuple(value.shape)}" for name, value in module.named_buffers())
    return f"  parameters: {parameters}\n  buffers:    {buffers or 'none'}"


# ---- the exercises, in order -----------------------------------------------------------------------------------------


def one_layer(net: LeNet, amount: float) -> None:
    """Random weights of the first convolution, then the smallest of its biases."""
    print(f"conv1 before\n{tensors(net.conv1)}")
    prune.random_unstructured(net.conv1, name="weight", amount=amount)
    print(f"after random_unstructured(conv1, 'weight', {amount}): {sparsity(net.conv1):.1%} zeros, and two tensors for one")
    print(tensors(net.conv1))
    prune.l1_unstructured(net.conv1, name="bias", amount=amount)  # L1: the smallest absolute values
    print(f"after l1_unstructured(conv1, 'bias', {amount}): {int((net.conv1.bias == 0).sum())} of {len(net.conv1.bias)} biases are 0")
    prune.random_unstructured(net.conv1, name="weight", amount=amount)
    print(f"the weight once more: {sparsity(net.conv1):.1%} zeros, since {amount:.0%} of what was left are taken\n")


def whole_net(amount: float) -> None:
    """The smallest weights of every layer; and why the loop over all modules stops."""
    net = LeNet()
    try:
        for _, module in net.named_modules():
            prune.l1_unstructured(module, name="weight", amount=amount)
    except AttributeError as error:
        print(f"a loop over named_modules() stops: {error}. The first module is the network itself, a container without weight")
    for _, module in prunable(net):
        prune.l1_unstructured(module, name="weight", amount=amount)
    print(f"a loop over the layers that have a weight: {sparsity_by_layer(net)[-1]['sparsity']:.1%} zeros\n")


def traps() -> None:
    """Four that every user steps into once: what `amount` means, where the zeros are, deepcopy, the memory layout."""
    for amount, kind in ((1, "an int is a count"), (1.0, "a float is a share")):
        net = LeNet()
        prune.random_unstructured(net.fc3, name="weight", amount=amount)
        print(f"amount={amount}: {int((net.fc3.weight == 0).sum())} of {net.fc3.weight.numel()} weights, {kind}")
    counted = sum(int((values == 0).sum()) for values in net.parameters())
    print(f"zeros in its parameters(): {counted}, in what fc3 computes with: {int((net.fc3.weight == 0).sum())}. They come from the mask")
    print(f"copy.deepcopy of a pruned network: {refusal(copy.deepcopy, net)}. Copy before, or build it anew and load its state_dict")
    net = LeNet().to(memory_format=torch.channels_last)
    layers = [(module, "weight") for _, module in prunable(net)]
    said = refusal(prune.global_unstructured, layers, pruning_method=prune.L1Unstructured, amount=0.5)
    print(f"global_unstructured on a network in channels_last: {said}. Prune in PyTorch's own layout, change it afterwards\n")


def refusal(function, *values, **options) -> str:
    """The error of a call, in a line; that it works where another torch has none."""
    try:
        function(*values, **options)
    except RuntimeError as error:
        return f'RuntimeError, "{str(error).split(". ")[0]}"'
    return "works with this torch"


def by_kind(net: nn.Module) -> list[dict]:
    """Convolutions and linear layers differently: in LeNet the latter hold most weights."""
    for _, module in prunable(net):
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, name="weight", amount=0.2)
        else:
            prune.random_unstructured(module, name="weight", amount=0.4)
    print("20 % of each convolution by size, 40 % of each linear layer at random")
    rows = sparsity_by_layer(net)
    print_table(rows)
    return rows


def all_together(net: nn.Module, amount: float) -> list[dict]:
    """The smallest weights of the whole network, wherever they are: the total is exact, the layers differ."""
    layers = ()
    for _, module in prunable(net):
        layers += ((module, "weight"),)
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=amount)
    rows = sparsity_by_layer(net)
    print(f"global_unstructured on a tuple of {len(layers)} pairs (layer, 'weight'): {amount:.0%} is the total, not what each layer loses")
    print_table(rows)
    return rows


def remove_masks(net: nn.Module) -> None:
    for _, module in prunable(net):
        prune.remove(module, "weight")
        with torch.no_grad():
            module.weight += 0.0  # the mask made -0.0 of negative weights, which is another pattern of bits than 0.0


def make_permanent(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """remove() multiplies the mask into the weight and forgets it: the zeros stay, the second tensor goes."""
    first = prunable(net)[0][1]
    before = tensors(first)
    remove_masks(net)
    print(f"\nbefore remove()\n{before}\nafter remove(): {sparsity_by_layer(net)[-1]['sparsity']:.1%} zeros, as before\n{tensors(first)}")
    trained = copy.deepcopy(net)  # which works again, without masks
    nn.functional.cross_entropy(trained(images), labels).backward()
    torch.optim.SGD(trained.parameters(), lr=1e-3).step()
    left = sparsity_by_layer(trained)[-1]["sparsity"]
    print(f"one step of training now: {left:.1%} zeros are left. Fine-tune before remove(), while the mask holds them\n")


# ---- a trained network -----------------------------------------------------------------------------------------------


def main(args) -> list[dict]:
    torch.manual_seed(args.seed)
    net = LeNet()
    print(f"LeNet: {sum(parameter.numel() for parameter in net.parameters()):,} parameters\n")
    one_layer(net, args.amount)
    whole_net(args.amount)
    traps()
    by_kind(LeNet())
    print()
    net = LeNet()
    all_together(net, args.amount)
    make_permanent(net, torch.randn(32, 1, 32, 32), torch.arange(32) % 10)
    network, data = student_and_data(args)
    trained = copy_of(network)

    def row(method: str, net: nn.Module) -> dict:
        return {"method": method, "sparsity": sparsity_by_layer(net)[-1]["sparsity"], "accuracy": accuracy(net, data["test"])}

    rows = [row("none", network)]
    print(f"\nthe trained student on {data['test'].name}, before: {rows[0]['accuracy']:.2%} right")
    by_kind(network)
    rows.append(row("by kind", network))
    print()
    all_together(trained, args.amount)
    rows.append(row("global", trained))
    remove_masks(trained)
    rows.append(row("global, removed", trained))
    print_table(rows)
    return rows


if __name__ == "__main__":
    parser = cpu_parser(__doc__)
    flag = parser.add_argument
    flag("-amount", type=share, help=f"share of the weights to prune, step by step (default: {AMOUNT})")
    part = parser.add_mutually_exclusive_group().add_argument
    part("-accuracy", action="store_true", help="accuracy over sparsity")
    part("-formats", action="store_true", help="file size and latency, format by format")
    part("-structured", action="store_true", help="remove whole channels")
    flag("-data", help="folder or hub id of CIFAR-10 (default: data/cifar10 where it was downloaded, else drawn shapes)")
    flag("-epochs", type=positive_int, help="of fine-tuning (default: 3 for -accuracy, 6 for -structured)")
    args = parse(parser)
    if args.epochs and not (args.accuracy or args.structured):
        parser.error("argument -epochs: of fine-tuning, so it has no effect without -accuracy or -structured")
    run, measures = main, args.accuracy or args.formats or args.structured
    if measures and args.amount is not None:
        parser.error("argument -amount: of the exercises step by step, so it has no effect with -accuracy, -formats or -structured")
    args.amount = AMOUNT if args.amount is None else args.amount
    if measures:
        from m29_inference import prune_accuracy, prune_formats, prune_structured  # which import this file

        module = prune_accuracy if args.accuracy else prune_formats if args.formats else prune_structured
        run = module.measure
    rows = run(args)
    save_results(__file__, args, rows)
