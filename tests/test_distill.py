"""distill.py, teacher.py and student.py: the loss, teachers of other kinds, logits kept on disk, and trainings that were killed."""

import errno
import json
import os
import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PATIENCE_S
from torch import nn

import machine
from cifar10 import SAMPLE_NAME, ConvNet, Images, load_cifar10, normalize, stratified
from data.sample import SAMPLE_CLASSES, cifar10_sample
from errors import InputError, one_sentence
from m29_inference import distill, distill_losses, distill_report, student, training
from m29_inference import teacher as teachers
from m29_inference.distill import distillation_loss, mixed_loss
from m29_inference.distill_losses import LOSSES
from m29_inference.distill_report import ALONE, DISTILLED, gain, say
from m29_inference.network import new_network, whitening_filters
from m29_inference.teacher import UNCHANGED, Teacher, cached_logits, match_classes
from m29_inference.training import CPU, MOST_EPOCHS, PLATEAU, converged_at, hard_loss, rate, train, training_file
from paths import DATA, ROOT
from timing import Timing

SCRIPT = "m29_inference/distill.py"
SAMPLE = Images(torch.zeros(0), torch.zeros(0), SAMPLE_CLASSES, SAMPLE_NAME)


def random_logits(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(*shape, generator=generator), 3 * torch.randn(*shape, generator=generator)


def noise(n: int) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(
        torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(n) % 10, tuple("abcdefghij"), "noise"
    )


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_divergence_of_softened_classes(temperature):
    student, teacher = random_logits(64, 10)
    loss = distillation_loss(student, teacher, temperature)
    assert loss > 0 and distillation_loss(teacher, teacher, temperature).abs() < 1e-6
    assert (distillation_loss(student[:1], teacher[:1], temperature) >= 0).all()
    soft = (teacher / temperature).softmax(1)
    cross_entropy = nn.functional.cross_entropy(student / temperature, soft)
    entropy = -(soft * soft.log()).sum(1).mean()
    assert loss.item() == pytest.approx(temperature**2 * (cross_entropy - entropy).item(), rel=1e-5)
    log_student, log_teacher = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    library = nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    assert loss.item() == pytest.approx(temperature**2 * library.item(), rel=1e-5)
    swapped = nn.functional.kl_div(log_teacher, log_student, reduction="batchmean", log_target=True)
    assert abs(swapped / library - 1) > 1e-3  # so that swapped arguments would be seen here


def test_its_gradient_keeps_its_size_at_any_temperature():
    """d loss / d logits = T (softmax(s / T) - softmax(t / T)) / n, which for large T no longer depends on T."""
    student, teacher = random_logits(64, 10)
    sizes = {}
    for temperature in (1.0, 20.0, 100.0):
        logits = student.clone().requires_grad_()
        distillation_loss(logits, teacher, temperature).backward()
        expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)) / len(student)
        assert torch.allclose(logits.grad, expected, atol=1e-6)
        sizes[temperature] = logits.grad.norm().item()
    assert sizes[100.0] == pytest.approx(sizes[20.0], rel=0.1) and 0.1 < sizes[100.0] / sizes[1.0] < 10


def test_alpha_weighs_the_teacher_and_the_labels():
    logits, teacher = random_logits(4, 10)
    labels, indices = torch.tensor([1, 2, 3, 4]), torch.tensor([7, 0, 3, 5])
    views = {view: torch.zeros(8, 10) for view in (0, 1)}
    views[1][indices] = teacher

    def loss(alpha, epoch, views):
        return mixed_loss(logits, labels, indices, epoch, views, SimpleNamespace(alpha=alpha, temperature=2.0))

    soft, hard = distillation_loss(logits, teacher, 2.0), hard_loss(logits, labels, indices, 1)
    assert torch.allclose(loss(1.0, 1, views), soft) and torch.allclose(loss(0.0, 1, views), hard)
    assert torch.allclose(loss(0.25, 1, views), 0.25 * soft + 0.75 * hard) and not torch.allclose(loss(1.0, 0, views), soft)
    assert torch.allclose(loss(1.0, 5, {UNCHANGED: views[1]}), soft)  # -views once: the same in every epoch


def test_a_gain_has_the_interval_of_students_t():
    mean, half = gain([0.01, 0.02, 0.03])
    assert mean == pytest.approx(0.02) and half == pytest.approx(4.303 * 0.01 / 3**0.5)
    for n, t in ((2, 12.706), (4, 3.182), (5, 2.776), (10, 2.262), (20, 2.262)):  # more than ten: a little too wide
        values = [float(i) for i in range(n)]
        assert gain(values)[1] == pytest.approx(t * statistics.stdev(values) / n**0.5)


def test_the_band_of_a_curve_is_from_the_worst_seed_to_the_best():
    runs = [[{"accuracy": a}, {"accuracy": a + 0.1}] for a in (0.2, 0.3, 0.7)]
    figure = distill_report.plot_curves({ALONE: runs}, 0.9)
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == pytest.approx((0.2, 0.8))
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([0.4, 0.5])


def test_what_the_teacher_knows_is_softened_and_needs_no_image_of_each_class(capsys):
    """Two images of class 0, one of class 1, none of class 2; at T = 2 the logits 2 log p stand for p."""
    chances = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.25, 0.63, 0.12]])
    data = Images(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 0, 1]), ("a", "b", "c"), "made")
    figure = distill_report.plot_knowledge(data, 2 * chances.log(), 2.0)
    shares = torch.tensor(figure.axes[0].images[0].get_array().data)
    torch.testing.assert_close(shares, torch.tensor([[0, 2 / 3, 1 / 3], [25 / 37, 0, 12 / 37], [0, 0, 0]]))
    assert "at T = 2, b is a bit like a (25.0%), a is a bit like b (20.0%), b is a bit like c (12.0%)" in capsys.readouterr().out
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.count("label: ") for title in titles].count(1) == 3  # three images, six places
    assert titles[1].startswith("label: a\na 60%\nb 30%")  # the one that it is least sure of


def test_an_epoch_is_tested_as_the_network_will_be_used(tmp_path):
    """In eval mode, which learns nothing of the test images; and the recipe is the one that the README's numbers come from."""
    data, file = noise(512), tmp_path / "kept.pt"
    network = new_network((8, 8, 8), data, 0)
    [row] = training.train(network, data, 1, 0, CPU, test=data, file=file)
    assert int(network.stages[0].norm1.num_batches_tracked) == 2  # steps of 256
    with torch.inference_mode():
        right = network.eval()(normalize(data.images)).argmax(1) == data.labels
    assert row["accuracy"] == right.double().mean()
    [group] = torch.load(file, weights_only=True)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (5e-4, 0.9, True)


def test_a_quick_run_sees_all_classes_of_sorted_data():
    few = student.quick_part({name: Images(torch.zeros(6000, 1), torch.arange(6000) // 600, (), "sorted") for name in ("train", "test")})
    assert [(len(part), len(part.labels.unique())) for part in few.values()] == [(4096, 10), (500, 10)]


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.010, 0.012, 0.011], "+1.10 points, 95 % interval +0.85 to +1.35: better"),
        ([-0.010, -0.012, -0.011], "-1.10 points, 95 % interval -1.35 to -0.85: worse"),
        ([0.010, -0.012, 0.011], "cannot tell"),
        ([0.004, 0.004], "+0.40 points, 95 % interval +0.40 to +0.40: cannot tell"),  # one number twice is no measure of chance
    ],
)
def test_the_verdict_on_the_gain(capsys, gains, said):
    curves = {ALONE: [[{"accuracy": 0.8}]] * len(gains), DISTILLED: [[{"accuracy": 0.8 + gain}] for gain in gains]}
    rows = [{"model": model, "accuracy": run[-1]["accuracy"], "train_s": 1.0} for model, runs in curves.items() for run in runs]
    row = say([{"model": "teacher", "accuracy": 0.9}, *rows], curves)
    printed = capsys.readouterr().out.strip()
    assert printed.endswith(said) and f"seed by seed: {', '.join(f'{100 * gain:+.2f}' for gain in gains)} points" in printed
    assert row["accuracy_by_seed"] == pytest.approx(gains) and row["accuracy"] == pytest.approx(sum(gains) / len(gains))


def test_a_distilled_step_is_compared_with_a_plain_one(monkeypatch, capsys):
    times = {ALONE: Timing([4.0, 5.0, 8.0]), DISTILLED: Timing([5.0, 5.5, 12.0])}
    monkeypatch.setattr(distill_report, "measure_alternately", lambda *_: times)
    assert distill_report.say_cost({}, CPU) == 1.25
    assert "takes 1.25 times as long as a plain one (1.10 to 1.50 in 9 rounds in turn: longer)" in capsys.readouterr().out


def test_the_fast_format_is_compared_with_the_plain_one(monkeypatch, capsys):
    times = {"plain": Timing([8.0, 8.0, 9.0]), "fast": Timing([4.0, 2.0, 2.0])}
    monkeypatch.setattr(student, "measure_alternately", lambda *_, repeats: times)
    monkeypatch.setattr(student, "training_step", lambda *_: lambda: 2.3)
    row = student.compare_formats(student.WIDTHS, None, CPU)
    assert row["x_plain"] == 4 and row["images_per_s"] / row["images_per_s_plain"] == 4
    assert "4.00x plain float32 (2.00 to 4.50, faster)" in capsys.readouterr().out


@pytest.mark.parametrize(("quick", "given", "least"), [(True, None, 0.2), (False, None, 0.6), (True, 0.5, 0.5)])
def test_a_teacher_of_a_quick_run_need_not_be_good(monkeypatch, quick, given, least):
    """Ours has seen 4,096 images four times then, which makes for half of the photographs."""

    class Asked(Exception):
        pass

    def find(args, *_):
        raise Asked(args.min_teacher_accuracy)

    monkeypatch.setattr(distill, "find_teacher", find)
    monkeypatch.setattr(distill, "load_cifar10", lambda *_: {"train": noise(512), "test": noise(50)})
    args = Namespace(
        teacher="train", views=None, data=None, quick=quick, losses=False, limit=None, epochs=None, widths=None, min_teacher_accuracy=given
    )
    with pytest.raises(Asked) as asked:
        distill.main(args)
    assert asked.value.args == (least,)


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_stem_whitens_and_is_not_trained():
    data = noise(256)
    data.images[:, 1:] = data.images[:, :1] // 2 + data.images[:, 1:] // 2  # colours that are alike
    filters = whitening_filters(data.images)
    seen = nn.functional.conv2d(normalize(data.images), filters)  # (n, 24, 31, 31)
    seen = seen.transpose(0, 1).flatten(1)
    assert torch.allclose(seen[:12] @ seen[:12].T / seen.shape[1], torch.eye(12), atol=0.01) and torch.equal(seen[:12], -seen[12:])
    network = new_network((8, 8, 8), data, seed=0)
    before = {name: value.clone() for name, value in network.named_parameters()}
    assert torch.equal(before["stem.weight"], filters)
    train(network, data, 1, 0, CPU)
    assert [name for name, value in network.named_parameters() if torch.equal(value, before[name])] == ["stem.weight"]
    again = new_network((8, 8, 8), data, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in again.named_parameters())


def test_the_plateau_ends_the_full_rate_and_as_many_epochs_follow():
    falling = [{"loss": 2 * 0.9**epoch} for epoch in range(6)]
    assert converged_at(falling) is None
    flat = [*falling, {"loss": falling[-1]["loss"]}]
    assert converged_at(flat) is None  # since two epochs ago it has fallen by a tenth
    flat.append({"loss": falling[-1]["loss"] * (1 - PLATEAU / 2)})
    assert converged_at(flat) == 16 and converged_at([*flat, *falling]) == 16  # and stays so
    assert converged_at([{"loss": 0.9**epoch} for epoch in range(MOST_EPOCHS // 2 - 1)]) is None
    assert converged_at([{"loss": 0.9**epoch} for epoch in range(MOST_EPOCHS)]) == MOST_EPOCHS  # it would fall for ever
    assert [rate(progress, 16) for progress in (0.5, 1, 8, 12, 16)] == [0.5, 1, 1, 0.5, 0]
    assert rate(0.25, None) == 0.25 and rate(30, None) == 1


def test_how_long_a_training_to_convergence_took_is_said(capsys):
    losses = [1.0, 0.5, 0.3, 0.299, 0.298, 0.297, *6 * [0.2]]
    rows = [{"loss": loss, "train_s": 10.0 * (epoch + 1)} for epoch, loss in enumerate(losses)]
    assert converged_at(rows) == converged_at(rows[:5]) == 10
    training.say_convergence(rows[:10], None)
    said = (
        "converged: 5 epochs at the full learning rate, the loss fell by less than 2% in the last two of them; 5 while the rate fell to 0"
    )
    assert capsys.readouterr().out == f"{said}; 100 s\n"
    training.say_convergence(rows, 12)  # which the user wanted
    training.say_convergence(MOST_EPOCHS * [{"loss": 0.1, "train_s": 1.0}], None)
    assert capsys.readouterr().out.startswith(f"stopped before it had converged: {MOST_EPOCHS // 2} epochs at the full")


def test_a_training_that_was_killed_ends_with_the_same_bits(tmp_path):
    class Killed(Exception):
        pass

    def run(file, kill_in=None, epochs=3):
        torch.manual_seed(0)
        network = ConvNet((8, 8, 8), "batch")

        def loss_of(logits, labels, indices, epoch):
            if epoch == kill_in:
                raise Killed
            return hard_loss(logits, labels, indices, epoch)

        return network, train(network, noise(512), epochs, 0, CPU, loss_of=loss_of, test=noise(64), file=file)

    whole, rows = run(None)
    for kill_in in (0, 2):
        file = tmp_path / f"{kill_in}.pt"
        with pytest.raises(Killed):
            run(file, kill_in)
        again, rows_again = run(file)
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
        assert [row["loss"] for row in rows_again] == [row["loss"] for row in rows] and [row["epoch"] for row in rows_again] == [1, 2, 3]
        assert rows_again[-1]["train_s"] > rows_again[0]["train_s"]


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    def loss_of(logits, labels, indices, epoch):
        return hard_loss(logits, labels, indices, epoch) * (torch.nan if epoch == 1 else 1)

    file = tmp_path / "net.pt"
    with pytest.raises(InputError, match=r"its loss is nan in epoch 2: lower its LEARNING_RATE, 0\.2"):
        train(ConvNet((8, 8, 8), "batch"), noise(256), None, 0, CPU, loss_of=loss_of, file=file)
    assert [row["epoch"] for row in torch.load(file, weights_only=True)["rows"]] == [1]


def test_a_full_disk_costs_the_kept_file_and_not_the_training(tmp_path, monkeypatch, capsys):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write)
    rows = train(ConvNet((8, 8, 8), "batch"), noise(256), 2, 0, CPU, file=tmp_path / "net.pt")
    assert len(rows) == 2 and list(tmp_path.iterdir()) == []
    assert "warning: epoch 2 was not kept in " in (said := capsys.readouterr().err) and "No space left on device" in said


def test_another_recipe_is_another_training(monkeypatch):
    """Images, loss, device, number format and constants: whatever changes one of them trains anew."""
    data, changed = {"train": noise(20), "test": noise(10)}, {"train": noise(20), "test": noise(11)}
    files = [
        training_file(data, CPU, 1),
        training_file(data, CPU, 2),
        training_file(changed, CPU, 1),
    ]
    files.append(training_file(data, CPU, 1, distill.LOSS_CODE))
    with monkeypatch.context() as patched:
        patched.setattr(training, "RECIPE", [*training.RECIPE[:-1], "another normalize()"])
        files.append(training_file(data, CPU, 1))
    files.append(training_file(data, torch.device("mps"), 1))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 77)
        files.append(training_file(data, CPU, 1))
    for module, name, value in ((training, "PLATEAU", 0.5), (torch, "__version__", "9.9"), (machine, "cpu_name", lambda: "another")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            files.append(training_file(data, CPU, 1))
    assert any("def answers(" in part for part in training.RECIPE)  # which the kept accuracies come from
    assert len(set(files)) == len(files) and training_file(data, CPU, 1) == files[0]


def test_a_gpu_without_bfloat16_of_its_own_computes_in_float32(monkeypatch):
    for theirs, enabled in ((lambda including_emulation=True: including_emulation, False), (lambda: True, True)):  # new and old torch
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", theirs)
        assert training.fast_format(torch.device("cuda"))["enabled"] == enabled
    assert not training.fast_format(torch.device("mps"))["enabled"]


def test_a_file_of_other_widths_or_with_a_flipped_bit_is_not_taken_even_in_part(tmp_path, capsys):
    def run(file, widths=(8, 16, 8)):
        torch.manual_seed(0)
        network = ConvNet(widths, "batch")
        assert len(train(network, noise(256), 1, 0, CPU, file=file)) == 1
        return network.state_dict()

    whole = run(tmp_path / "whole.pt")
    file = tmp_path / "net.pt"
    run(file, (8, 8, 8))
    others = [file.read_bytes()]
    others.append(bytearray((tmp_path / "whole.pt").read_bytes()))
    place = others[1].index(whole["stages.1.norm1.weight"].numpy().tobytes())
    others[1][place + 3] ^= 1
    for content in others:
        file.write_bytes(content)
        capsys.readouterr()
        again = run(file)
        assert f"{file} is damaged or of another network: trained anew" in capsys.readouterr().out
        assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.fixture(scope="module")
def few_shapes(tmp_path_factory) -> str:
    """A folder with the first of the drawn shapes, two batches to train with and 100 to test, so that a training takes seconds."""
    folder = tmp_path_factory.mktemp("few") / "sample"
    folder.mkdir()
    for split, count in {"train": 512, "test": 100}.items():
        with np.load(cifar10_sample() / f"{split}.npz") as arrays:
            np.savez(folder / f"{split}.npz", **{name: arrays[name][:count] for name in arrays})
    return str(folder)


def test_kill_9_and_again(start_in_fork, run_script, results, tmp_path, monkeypatch, few_shapes):
    flags = ("-quick", "-widths", "8", "8", "8", "-num_threads", "1", "-data", few_shapes)
    place = {"COURSE_DATA": str(tmp_path / "killed")}
    process, folder = start_in_fork("m29_inference/student.py", *flags, **place), tmp_path / "killed" / "students"
    while not list(folder.glob("[!.]*.pt")):  # nor the one that is being written
        assert process.is_alive(), process.output()
        time.sleep(0.01)
    process.kill()
    process.join()
    done = run_script("m29_inference/student.py", *flags, **place)
    assert done.returncode == 0 and "trained before" in done.stdout, done.stderr
    *rows, speed = json.loads((results / "student.json").read_text())["rows"]
    assert speed["x_plain"] > 0 and (results / "student_accuracy.png").exists()

    monkeypatch.setattr(training, "DATA", tmp_path / "whole")
    torch.set_num_threads(1)
    _, undisturbed = student.trained_student(student.quick_part(load_cifar10(few_shapes)), 2, 0, CPU, (8, 8, 8))
    kept = ("epoch", "loss", "accuracy")
    assert [[row[key] for key in kept] for row in rows] == [[row[key] for key in kept] for row in undisturbed] and len(rows) == 2


def test_as_many_of_each_class():
    data = noise(400)
    data.labels = torch.tensor([0] * 300 + [1] * 100)
    some = stratified(data, 120)
    assert some.labels.tolist() == [0] * 60 + [1] * 60 and torch.equal(some.images[:60], data.images[:60])
    with pytest.raises(InputError, match="only 400 training images"):
        stratified(data, 401)


# ---- the teacher's logits --------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A teacher that counts the images it is asked about, and a cache of its own with 20 images a file."""
    monkeypatch.setattr(teachers, "DATA", tmp_path)
    monkeypatch.setattr(teachers, "CHUNK", 20)

    def build(seed: int) -> Teacher:
        torch.manual_seed(seed)
        network = ConvNet((8, 8, 8), "batch").eval()
        teacher = Teacher("counted", network, lambda images: images.float() / 255, CPU)
        teacher.asked, compute = 0, teacher.logits

        def logits(images):
            teacher.asked += len(images)
            return compute(images)

        teacher.logits = logits
        return teacher

    return build


def test_our_own_teacher_looks_in_both_directions(monkeypatch):
    torch.manual_seed(0)
    network = ConvNet((8, 8, 8), "batch").eval()
    network.head.weight.data *= 1000  # noise looks much the same from both sides
    monkeypatch.setattr(student, "trained_student", lambda *_: (network, [{"train_s": 1.0}]))
    teacher, images = teachers.own_teacher({}, (8, 8, 8), 1, 0, CPU), noise(8).images
    one_way = Teacher("one way", network, teacher.prepare, CPU)
    both = (one_way.logits(images) + one_way.logits(images.flip(3))) / 2
    assert torch.allclose(teacher.logits(images), both, rtol=0.02) and torch.equal(teacher.logits(images), teacher.logits(images.flip(3)))
    assert not torch.allclose(both, one_way.logits(images), rtol=0.02)
    assert teacher.fingerprint() != one_way.fingerprint()  # the same numbers, other logits
    assert teacher.training == {"epochs": 1, "train_s": 1.0}


def test_the_teacher_sees_what_the_student_sees(monkeypatch, tmp_path):
    """Epoch by epoch the same augmented images, whatever the student's seed."""
    data, seen = noise(512), []
    real = training.normalize

    def watch(images):
        seen.append(images)
        return real(images)

    monkeypatch.setattr(training, "DATA", tmp_path)
    monkeypatch.setattr(training, "normalize", watch)
    args = SimpleNamespace(widths=(8, 8, 8), device=CPU, temperature=4.0, alpha=0.9)
    distill.train_student(
        args, {"train": data, "test": noise(1)}, seed=3, epochs=2, views={0: torch.zeros(512, 10), 1: torch.zeros(512, 10)}, key=""
    )
    steps = [images for images in seen if len(images) == 256]
    assert len(steps) == 4
    for epoch in range(2):
        view = teachers.view_of(data, epoch, range(512))
        order = training.epoch_order(3, epoch, 512)
        assert torch.equal(torch.cat(steps[2 * epoch :][:2]), view[order])


def test_logits_are_computed_once_and_a_damaged_or_missing_chunk_again(counted, tmp_path):
    data, teacher = noise(50), counted(0)
    first = cached_logits(teacher, data, [0, 1, UNCHANGED])
    assert teacher.asked == 150 and not torch.equal(first[0], first[1])
    assert torch.allclose(first[UNCHANGED].float(), Teacher.logits(teacher, data.images), atol=1e-2)
    files = sorted(tmp_path.glob("teacher_logits/*/*.npz"))
    assert len(files) == 9
    files[0].unlink()
    damaged = bytearray(files[4].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    files[4].write_bytes(damaged)
    files[8].write_bytes(files[8].read_bytes()[:40])
    again = cached_logits(teacher, data, [0, 1, UNCHANGED])
    assert 150 < teacher.asked <= 150 + 60 and all(torch.equal(again[view], first[view]) for view in first)


def test_on_a_full_disk_the_logits_that_are_kept_stay_kept(counted, monkeypatch, capsys):
    data, teacher, whole = noise(50), counted(0), np.savez

    def full(file, **arrays):
        whole(file, **arrays)
        if "view+001" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space") as caught:
        cached_logits(teacher, data, [0, 1])
    one_sentence(caught.type, caught.value, caught.tb)
    assert "error: the disk is full (" in capsys.readouterr().err
    kept = list(teachers.cache_folder(teacher, data).iterdir())
    assert kept and all("view+000" in file.name for file in kept)
    monkeypatch.setattr(np, "savez", whole)
    teacher.asked = 0
    cached_logits(teacher, data, [0, 1])
    assert teacher.asked == 50  # the second view's


def test_another_size_of_chunk_or_another_augmentation_gives_no_other_images_logits(counted, monkeypatch):
    data, teacher = noise(50), counted(0)
    first = cached_logits(teacher, data, [0])
    monkeypatch.setattr(teachers, "CHUNK", 10)
    assert torch.equal(cached_logits(teacher, data, [0])[0], first[0])
    folder = teachers.cache_folder(teacher, data)
    monkeypatch.setattr(teachers, "CODE", [*teachers.CODE[:-1], "another normalize()"])
    assert teachers.cache_folder(teacher, data) != folder


def test_a_chunk_with_any_byte_changed_is_computed_again_or_the_same(tmp_path):
    file, logits = teachers.chunk_file(tmp_path, 0, range(4)), torch.randn(4, 10).half()
    np.savez(file, logits=logits.numpy())
    whole = file.read_bytes()
    for place in range(len(whole)):  # names, sizes, the way of compression, checksums, numbers
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        read = teachers.read_chunk(tmp_path, 0, range(4))
        assert read is None or torch.equal(read, logits), place


def test_logits_of_another_teacher_or_of_other_images_are_not_taken(counted):
    data, one, other = noise(20), counted(0), counted(1)
    first, second = (cached_logits(teacher, data, [0])[0] for teacher in (one, other))
    assert (one.asked, other.asked) == (20, 20) and not torch.equal(first, second)
    changed = noise(20)
    changed.images[3, 0, 0, 0] ^= 1
    cached_logits(one, changed, [0])
    assert one.asked == 40


def test_several_processes_share_the_work(counted, tmp_path):
    data, teacher = noise(50), counted(0)
    for rank in range(3):
        teachers.compute_logits(teacher, data, [0, 1], tmp_path / "shared", rank, 3)
    assert teacher.asked == 100 and len(list((tmp_path / "shared").iterdir())) == 6


@pytest.mark.parametrize(("flag", "asked"), [(None, ["train", "test"]), ("sweep", ["train"]), ("losses", ["train"])])
def test_processes_share_the_logits_that_will_be_read(monkeypatch, flag, asked):
    """Only the comparison asks the teacher about the test images."""
    data, shared = {"train": noise(256), "test": noise(10)}, {}

    def share(teacher, wanted):
        shared.update({split: views for images, views in wanted for split in data if images is data[split]})
        raise SystemExit

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distill, "load_cifar10", lambda *_: data)
    monkeypatch.setattr(distill, "load_pretrained", lambda *_: "a Vision Transformer")
    monkeypatch.setattr(distill, "find_teacher", lambda *_: None)
    monkeypatch.setattr(distill, "share_logits", share)
    flags = dict.fromkeys(("limit", "views", "widths", "data", "min_teacher_accuracy"))
    args = Namespace(**flags, teacher="vit", epochs=2, quick=False, sweep=flag == "sweep", losses=flag == "losses", device=CPU)
    with pytest.raises(SystemExit):
        distill.main(args)
    assert shared == {split: [UNCHANGED] for split in asked}


# ---- teachers of other kinds -----------------------------------------------------------------------------------------


def test_classes_are_matched_by_name():
    def match(names: dict, *classes: str, name: str = "noise") -> list[int]:
        return match_classes("t", names, Images(torch.zeros(0), torch.zeros(0), classes, name))

    assert match({0: "Dog", 1: "plane", 2: "cat"}, "airplane", "cat", "dog") == [1, 2, 0]
    assert match({0: "LABEL_0", 1: "LABEL_1"}, "airplane", "cat") == [0, 1]
    assert match({0: 1, 1: 0}, "0", "1") == [1, 0]  # a config.json may hold numbers
    with pytest.raises(InputError, match=r"does not know cat: its classes are tench, dog$"):
        match({0: "tench", 1: "dog"}, "cat", "dog")
    with pytest.raises(InputError, match=r"these are the classes of the drawn sample, give -data uoft-cs/cifar10$"):
        match({0: "tench", 1: "dog"}, "cat", "dog", name=SAMPLE_NAME)
    with pytest.raises(InputError, match="knows 1,000 classes, the data have 10"):
        match({number: str(number) for number in range(1000)}, *SAMPLE_CLASSES)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    """A folder with a Vision Transformer of random weights, its classes in another order than the data's."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    names = dict(enumerate(reversed(SAMPLE_CLASSES)))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=48, patch_size=16, id2label=names, label2id={name: number for number, name in names.items()}, **sizes)
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def test_a_vision_transformer_in_a_folder_is_a_teacher(tiny_vit):
    from PIL import Image

    processor, classifier = teachers.load_pretrained(str(tiny_vit))
    teacher = teachers.pretrained_teacher(str(tiny_vit), processor, classifier, SAMPLE, CPU)
    images = noise(3).images
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with torch.inference_mode():
        direct = classifier(**processor(images=pictures, return_tensors="pt")).logits.flip(1)  # the course's own way
    assert torch.allclose(teacher.logits(images), direct, atol=0.05)  # bfloat16 where the CPU has it
    assert np.corrcoef(teacher.logits(images).flatten(), direct.flatten())[0, 1] > 0.99


def test_a_checkpoint_in_bfloat16_is_one_too(tiny_vit, tmp_path):
    processor, classifier = teachers.load_pretrained(str(tiny_vit))
    processor.save_pretrained(tmp_path)
    classifier.to(torch.bfloat16).save_pretrained(tmp_path)
    teacher = teachers.pretrained_teacher("half", *teachers.load_pretrained(str(tmp_path)), SAMPLE, CPU)
    assert teacher.logits(noise(3).images).shape == (3, 10) and len(teacher.fingerprint()) == 16


def test_weights_of_other_sizes_than_the_config_says_are_said(tiny_vit, tmp_path):
    for file in tiny_vit.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content.replace(b'"intermediate_size": 32', b'"intermediate_size": 48'))
    with pytest.raises(InputError, match=r"no image classifier in this folder \(its weights have other sizes than its config.json says\)"):
        teachers.load_pretrained(str(tmp_path))


def test_other_names_of_the_classes_make_another_teacher(tiny_vit):
    processor, classifier = teachers.load_pretrained(str(tiny_vit))
    one = teachers.pretrained_teacher("t", processor, classifier, SAMPLE, CPU).fingerprint()
    assert teachers.pretrained_teacher("elsewhere", processor, classifier, SAMPLE, CPU).fingerprint() == one
    classifier.config.id2label = {number: classifier.config.id2label[9 - number] for number in range(10)}
    assert teachers.pretrained_teacher("t", processor, classifier, SAMPLE, CPU).fingerprint() != one


NO_NETWORK = """
import socket, sys, time
socket.create_connection = lambda *_, **__: time.sleep(60)  # as where packets are lost
import cifar10, errors, data.hub
from m29_inference import teacher

def refused(load, source):
    begin = time.monotonic()
    try:
        load(source)
    except errors.InputError as error:
        print(f"{time.monotonic() - begin} {error}")

teacher.load_pretrained(sys.argv[1])
import datasets, huggingface_hub
assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
refused(cifar10.load_cifar10, "nobody/fetched")
for load in (teacher.load_pretrained, cifar10.load_cifar10):
    data.hub.hub_reached.cache_clear()
    refused(load, "nobody/nothing")
"""


def test_without_network_an_id_of_the_hub_is_refused_within_two_seconds(tiny_vit, tmp_path):
    """And a teacher in a folder does not make data of the hub wait: the libraries ask once, at their import, whether there is a network."""
    (tmp_path / "datasets--nobody--fetched").mkdir()  # what a download leaves that broke off
    command, environment = [sys.executable, "-c", NO_NETWORK, str(tiny_vit)], {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    broken, *unknown = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert float(broken[0]) < 10 and "nobody/fetched: no such folder, and not to be had from the hub" in broken[1]
    for seconds, said in unknown:
        assert 1.4 < float(seconds) < 2 and "nobody/nothing: no such folder, and the Hugging Face hub cannot be reached" in said
    assert len(unknown) == 2


def test_the_run_with_it_and_its_refusal(run_in_fork, check_refusals, results, tiny_vit):
    check_refusals(SCRIPT, {("-quick", "-teacher", str(tiny_vit)): (1, "less than -min_teacher_accuracy 0.2")})
    flags = ("-quick", "-teacher", tiny_vit, "-min_teacher_accuracy", "0", "-epochs", "1", "-limit", "600")
    share = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / SCRIPT, *flags]
    done = subprocess.run(share, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    kept = {file: file.stat().st_mtime_ns for file in DATA.glob("teacher_logits/*/*.npz")}
    done = run_in_fork(SCRIPT, *flags)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert kept and kept == {file: file.stat().st_mtime_ns for file in DATA.glob("teacher_logits/*/*.npz")}
    rows = json.loads((results / "distill.json").read_text())["rows"]
    assert rows[0]["model"] == "teacher" and rows[0]["parameters"] != rows[1]["parameters"] == 76_266


def test_the_run_of_a_learner(run_script, results):
    done = run_script(SCRIPT, "-quick")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    rows = json.loads((results / "distill.json").read_text())["rows"]
    assert [(row["model"], row.get("seed")) for row in rows] == [
        ("teacher", None),
        *[(m, s) for m in ("student", "student + KD") for s in (0, 1)],
        ("student + KD less student", None),
    ]
    assert rows[-1]["step_ratio"] > 0 and rows[-1]["accuracy_by_seed"] == [
        rows[3 + s]["accuracy"] - rows[1 + s]["accuracy"] for s in (0, 1)
    ]
    assert {"model", "seed", "epochs", "accuracy", "parameters", "gmacs", "latency_ms", "size_mb", "train_s"} == set(rows[1])
    assert rows[0]["epochs"] == 4 and rows[0]["train_s"] > 0 and set(rows[0]) == set(rows[1]) - {"seed"}
    assert "95 % interval" in done.stdout and "is a bit like" in done.stdout
    step = r"a distilled step takes \d\.\d+ times as long as a plain one \(.* in 9 rounds in turn: (longer|less|cannot tell)\)"
    assert re.search(step, done.stdout)
    assert all((results / f"distill_{name}.png").exists() for name in ("curves", "knowledge"))


def test_the_sweep_tries_temperatures_and_alphas(monkeypatch, tmp_path):
    monkeypatch.setattr("common.RESULTS", tmp_path)
    given = {
        "data": None,
        "teacher": "train",
        "teacher_epochs": None,
        "min_teacher_accuracy": 0.0,
        "views": None,
        "limit": None,
        "widths": None,
        "temperature": 4.0,
        "alpha": 0.9,
        "losses": False,
    }
    args = Namespace(**given, epochs=1, seeds=[0], seed=0, sweep=True, quick=True, show=False, device=CPU)
    rows = distill.main(args)
    assert len({(row.get("temperature"), row.get("alpha")) for row in rows}) == 3 and (tmp_path / "distill_sweep.png").exists()
    args.sweep, args.losses = False, True
    alone, right, wrong = distill.main(args)
    assert (alone["loss"], right["loss"]) == ("student", "as it should be") and (tmp_path / "distill_losses.png").exists()
    assert wrong["gradient_of_labels"] == pytest.approx(right["gradient_of_labels"] / 10, rel=1e-4)  # ten classes


def test_each_loss_is_a_training_of_its_own():
    data, args = {"train": noise(4)}, SimpleNamespace(widths=(8, 8, 8), device=CPU, temperature=4.0, alpha=0.9)
    files = set()

    def remember(*_, file, **__):
        files.add(file)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "train", remember)
        for loss, code in distill_losses.CODE.items():
            distill.train_student(args, {"train": data["train"], "test": data["train"]}, 0, 1, {0: torch.zeros(4, 10)}, "key", loss, code)
        both, views = {"train": data["train"], "test": data["train"]}, {0: torch.zeros(4, 10)}
        distill.train_student(args, both, 0, 1, views, "key")
        assert len(files) == 5  # this one is the first's
        distill.train_student(args, both, 0, 1, views, "another teacher, or other views of it")
        for name, value in (("temperature", 2.0), ("alpha", 0.5)):
            distill.train_student(SimpleNamespace(**{**vars(args), name: value}), both, 0, 1, views, "key")
        distill.train_student(args, both, 1, 1, views, "key")
        distill.train_student(args, both, 0, 1, None, "key")
    assert len(files) == 10


def test_wrong_losses_are_told_by_their_values():
    """What is 0 for equal logits and lowest there, and how large the gradient is, by hand."""
    student, teacher = random_logits(32, 10)
    labels = torch.arange(32) % 10
    asked = {name: distill_losses.question(partial(loss, temperature=4.0), student, teacher, labels) for name, loss in LOSSES.items()}
    right, mean, plain, swapped, unbounded = asked.values()
    for row in (right, mean, plain, swapped):
        assert abs(row["at_equal"]) < 1e-5 and row["followed"] > -1e-5
    assert right["followed"] < 0.01
    assert mean["gradient_of_labels"] == pytest.approx(right["gradient_of_labels"] / 10, rel=1e-4)
    assert plain["gradient_of_labels"] == pytest.approx(right["gradient_of_labels"] / 16, rel=1e-4)
    assert unbounded["followed"] < -100 and unbounded["followed"] < unbounded["at_equal"]


@pytest.mark.parametrize(
    "name, losses, epochs", [("noise", False, None), ("noise", True, 4), (SAMPLE_NAME, False, 4), (SAMPLE_NAME, True, 4)]
)
def test_photographs_are_learnt_to_convergence_but_where_losses_are_compared(monkeypatch, name, losses, epochs):
    images = Images(noise(256).images, noise(256).labels, tuple("abcdefghij"), name)
    monkeypatch.setattr(distill, "load_cifar10", lambda *_: {"train": images, "test": images})
    monkeypatch.setattr(distill, "find_teacher", lambda *_: None)
    for module, function in ((distill, "compare"), (distill_losses, "compare_losses")):
        monkeypatch.setattr(module, function, lambda args, data, teacher, epochs: epochs)
    flags = dict.fromkeys(("epochs", "limit", "views", "widths", "data", "min_teacher_accuracy"))
    args = Namespace(**flags, teacher="train", quick=False, sweep=False, losses=losses, device=CPU)
    assert distill.main(args) == epochs


def test_killed_at_the_logits_and_while_distilling_it_ends_with_the_same_bits(
    start_in_fork, run_in_fork, results, tmp_path, monkeypatch, few_shapes
):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = {"epochs": 2, "teacher_epochs": 1, "min_teacher_accuracy": 0.0, "limit": 512, "data": few_shapes}
    words = ["-quick", "-num_threads", "1", *(word for flag, value in flags.items() for word in (f"-{flag}", str(value)))]
    for pattern, count in {"teacher_logits/*/*.npz": 1, "students/*.pt": 3}.items():  # the teacher, a student alone, one distilled
        process = start_in_fork(SCRIPT, *words, COURSE_DATA=str(killed))
        while len([file for file in killed.glob(pattern) if not file.name.startswith(".")]) < count:  # those are being written
            assert process.is_alive(), process.output()
            time.sleep(0.01)
        process.kill()
        process.join()
    done = run_in_fork(SCRIPT, *words, COURSE_DATA=str(killed))
    assert done.returncode == 0 and "trained before" in done.stdout, done.stderr
    rows = json.loads((results / "distill.json").read_text())["rows"]

    monkeypatch.setattr(training, "DATA", whole)
    monkeypatch.setattr(teachers, "DATA", whole)
    monkeypatch.setattr(distill, "say_cost", lambda *_: None)  # it takes longest and changes nothing
    others = {"teacher": "train", "seeds": [0, 1], "seed": 0, "temperature": 4.0, "alpha": 0.9, "views": None, "widths": None}
    others |= {"sweep": False, "losses": False}
    torch.set_num_threads(1)
    undisturbed = distill.main(Namespace(**flags, **others, quick=True, show=False, device=CPU))
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in undisturbed] and len(rows) == 6
    files = {folder: sorted(file.name for file in (folder / "students").iterdir()) for folder in (killed, whole)}
    assert files[killed] == files[whole] and len(files[whole]) == 5
    for name in files[whole]:
        one, other = (torch.load(folder / "students" / name, weights_only=True)["network"] for folder in (killed, whole))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_bad_input_is_said(check_refusals, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {
        ("-seeds", "3"): (2, "at least two are needed"),
        ("-seeds", "0", "0", "1"): (2, "each another one"),
        ("-sweep", "-seeds", "0", "1", "2"): (2, "argument -seeds: has no effect with -sweep"),
        ("-teacher", "somewhere", "-teacher_epochs", "2"): (2, "argument -teacher_epochs: of our own teacher"),
        ("-alpha", "1.5"): (2, "a share between 0 and 1"),
        ("-temperature", "0"): (2, "a number above 0"),
        ("-temperature", "1e200"): (2, "'1e200' is not allowed: a number from 0.1 to 100 is expected"),
        ("-teacher", str(tmp_path / "empty")): (1, "no image classifier in this folder"),
        ("-teacher", "nobody/nothing"): (1, "no such folder, and the Hugging Face hub cannot be reached"),
        ("-quick", "-limit", "20000"): (1, "there are only 10,000 training images"),
        ("-quick", "-limit", "100"): (1, "-limit 100 is too small: a step of training takes 256 images"),
    }
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # nobody listens there
    check_refusals(SCRIPT, cases, **nowhere)
    check_refusals(SCRIPT, {("-quick",): (1, "every process would train it anew")}, RANK="0", WORLD_SIZE="2")
