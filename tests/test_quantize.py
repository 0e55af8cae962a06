"""quantize.py: the arithmetic against torch's, its bounds, integer sums, and the run of a learner."""

import json
import re
import warnings

import pytest
import torch

from m29_inference import quantize as exercise
from m29_inference.quantize import dequantize, integer_product, levels, quantize, scale_and_zero_point

SCRIPT = "m29_inference/quantize.py"


def numbers(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_by_hand():
    scale, zero_point = scale_and_zero_point(torch.tensor(-1.0), torch.tensor(4.1), 8)
    assert scale.item() == pytest.approx(0.02) and zero_point.item() == -78  # -128 + 1 / 0.02
    assert quantize(torch.tensor([-1.0, 0.0, 0.02, 4.1, 99.0]), scale, zero_point).tolist() == [-128, -78, -77, 127, 127]
    assert levels(2) == (-2, 1)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_error_is_at_most_half_a_scale_and_zero_is_exact(bits):
    x = numbers(100_000)
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), bits)
    q = quantize(x, scale, zero_point, bits)
    assert q.dtype == torch.int8 and q.min() >= levels(bits)[0] and q.max() <= levels(bits)[1] and len(q.unique()) <= 2**bits
    assert (dequantize(q, scale, zero_point) - x).abs().max() <= scale * 0.5001
    assert dequantize(quantize(torch.zeros(1), scale, zero_point, bits), scale, zero_point) == 0


def test_it_is_what_torch_computes():
    x = numbers(1_000_000)
    scale, zero_point = scale_and_zero_point(x.min(), x.max())
    fake = torch.fake_quantize_per_tensor_affine(x, scale.item(), zero_point.item(), -128, 127)
    off = ((dequantize(quantize(x, scale, zero_point), scale, zero_point) - fake).abs() > scale * 0.01).sum()
    assert off < 20  # ties
    if hasattr(torch, "quantize_per_tensor"):
        with warnings.catch_warnings(action="ignore"):
            theirs = torch.quantize_per_tensor(x, scale.item(), zero_point.item(), torch.qint8).int_repr()
        steps = (theirs.int() - quantize(x, scale, zero_point).int()).abs()
        assert steps.max() <= 1 and (steps > 0).sum() < 20


def test_the_courses_function_may_be_gone_or_wrong(monkeypatch):
    x = numbers(100)
    scale, zero_point = scale_and_zero_point(x.min(), x.max())
    monkeypatch.setattr(exercise, "quantize", lambda *args: quantize(*args) + 2)
    with pytest.raises(RuntimeError, match="computes something else"):
        exercise.in_the_courses_way(x, scale, zero_point)
    monkeypatch.delattr(torch, "quantize_per_tensor")
    assert "is gone from this torch" in exercise.in_the_courses_way(x, scale, zero_point)


def test_integer_sums_are_exact():
    x, w = numbers(4096), numbers(4096, seed=1)
    (sx, zx), (sw, zw) = (scale_and_zero_point(values.min(), values.max()) for values in (x, w))
    q, p = quantize(x, sx, zx), quantize(w, sw, zw)
    total = integer_product(q, zx, p, zw)
    assert total.dtype == torch.int32
    assert total == ((q.long() - zx) * (p.long() - zw)).sum()
    assert (total * (sx * sw)).item() == pytest.approx((dequantize(q, sx, zx) * dequantize(p, sw, zw)).sum().item(), rel=1e-5)


def test_errors_average_out_and_channels_help():
    sums = exercise.errors_of_sums(8, torch.Generator().manual_seed(0))
    growth = sums[-1]["rms_error"] / sums[0]["rms_error"]  # 1,024 times as many products
    assert 20 < growth < 50
    # each factor is off by an error of variance scale^2 / 12 and has variance 1, so a product is off by twice that
    assert sums[0]["rms_error"] == pytest.approx(10 / 255 * (16 * 2 / 12) ** 0.5, rel=0.1)
    tensor, channel = exercise.errors_by_granularity(8, torch.Generator().manual_seed(0))
    assert channel["worst_channel_error"] < tensor["worst_channel_error"] / 10
    eight, four, _ = exercise.errors_by_bits(x := numbers(10_000), x.min(), x.max())
    assert four["scale"] / eight["scale"] == pytest.approx(255 / 15) and eight["snr_db"] > four["snr_db"] + 20
    assert (eight["size_mb"], four["size_mb"]) == (0.01, 0.005)  # of 10,000 numbers


def test_a_smaller_range_pays_with_few_bits_alone():
    x, ends = numbers(100_000), (0.005, 0.995)
    whole, clipped = (exercise.errors_by_bits(x, x.quantile(low), x.quantile(high)) for low, high in ((0.0, 1.0), ends))
    gains = [less["snr_db"] - more["snr_db"] for less, more in zip(clipped, whole, strict=True)]
    assert all(less["scale"] < more["scale"] for less, more in zip(clipped, whole, strict=True)) and gains[0] < 0 < gains[1] < gains[2]


def test_a_tensor_of_zeros_stays_zeros():
    scale, zero_point = scale_and_zero_point(torch.tensor(0.0), torch.tensor(0.0))
    assert dequantize(quantize(torch.zeros(3), scale, zero_point), scale, zero_point).tolist() == [0, 0, 0]


def test_the_run_of_a_learner(run_script, results):
    done = run_script(SCRIPT, "-quick", "-clip", "0.9")
    assert done.returncode == 0, done.stderr
    assert "1,000 values outside the range saturate" in done.stdout and "times the error; sqrt would be 32" in done.stdout
    assert "DeprecationWarning" not in done.stderr
    rows = json.loads((results / "quantize.json").read_text())["rows"]
    assert {row["measured"] for row in rows} == {"bits", "granularity", "sum"}
    [eight] = [row for row in rows if row.get("bits") == 8]
    assert f"scale {eight['scale']:.6f}, zero point" in done.stdout  # -clip reaches the table of bits
    assert all((results / f"quantize_{name}.png").exists() for name in ("error", "sums"))


def test_a_range_that_must_hold_0_is_wider_than_what_was_clipped(run_in_fork):
    done = run_in_fork(SCRIPT, "-quick", "-clip", "0.5")
    said = int(re.search(r"([\d,]+) values outside the range saturate", done.stdout)[1].replace(",", ""))
    x = 1 + torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert said == ((x < 0) | (x > x.sort().values[round(0.75 * 9999)])).sum()
    assert "scale 0.0065" in done.stdout and "error at most 0.50 scale" in done.stdout


def test_bad_input_is_said(check_refusals):
    cases = {("-bits", "9"): (2, "-bits"), ("-clip", "0"): (2, "argument -clip: '0' is not allowed"), ("-clip", "2"): (2, "a share")}
    check_refusals(SCRIPT, cases)
