"""The exercise's augmentation as one compiled loop: RandomAffine(5, (0.1, 0.1), (0.5, 2.0)), division by 255, change of layout.

Value for value what torchvision computes on a PIL image for the same parameters, nearest pixel, black outside the image
(`loading_ladder.py` compares them before it times anything). numba compiles it on first use and keeps the result; while it runs, it
does not hold Python's lock, so that threads work side by side.
"""

import numpy as np

try:
    from numba import njit
except ImportError:  # NumPy warps then, several times slower
    njit = None

DEGREES, SHIFT, ZOOM = 5, 0.1, (0.5, 2.0)  # of the exercise's RandomAffine
BYTE, WHITE = np.uint32(255), np.float32(255)


def as_words(pixels: np.ndarray, height: int, width: int, offset: int = 0) -> np.ndarray:
    """See RGB bytes as one 32-bit number a pixel: its three bytes and the first of the next pixel, which nobody looks at.

    The reader gets all three colours with one load instead of three. The last pixel reaches one byte beyond the image, so
    `pixels`, uint8, holds one byte more than the images in it.
    """
    return np.ndarray((height, width), np.uint32, pixels, offset=offset, strides=(3 * width, 3))


def random_affine(rng: np.random.Generator, n: int, height: int, width: int) -> np.ndarray:
    """Parameters of n draws from RandomAffine(5, (0.1, 0.1), (0.5, 2.0)): (n, 4) of degrees, right, down in pixels, zoom."""
    angle = rng.uniform(-DEGREES, DEGREES, n)
    right = np.round(rng.uniform(-SHIFT * width, SHIFT * width, n))
    down = np.round(rng.uniform(-SHIFT * height, SHIFT * height, n))
    return np.stack([angle, right, down, rng.uniform(*ZOOM, n)], axis=1)


def inverse_matrices(parameters: np.ndarray, height: int, width: int) -> np.ndarray:
    """For each output pixel the input pixel it shows: (n, 6) matrices a b c d e f in 16.16 fixed point, as PIL computes them.

    x_in = (a x + b y + c) >> 16 and y_in = (d x + e y + f) >> 16, rotation and zoom about the image's centre, the pixel's centre
    at + 0.5. Fixed point is PIL's choice (libImaging/Geometry.c, affine_fixed); with it our pixels are the same as PIL's.
    """
    angle, right, down, zoom = parameters.T
    cos, sin = np.cos(np.radians(angle)) / zoom, np.sin(np.radians(angle)) / zoom
    x, y = width * 0.5, height * 0.5
    c = cos * (-x - right) + sin * (-y - down) + x
    f = -sin * (-x - right) + cos * (-y - down) + y
    c, f = c + cos * 0.5 + sin * 0.5, f - sin * 0.5 + cos * 0.5
    return np.floor(np.stack([cos, sin, c, -sin, cos, f], axis=1) * 65536 + 0.5).astype(np.int64)


def _inside(start: int, step: int, size: int, length: int) -> tuple[int, int]:
    """First x and the one after the last, of 0 ... length - 1, for which 0 <= (start + step * x) >> 16 < size."""
    last = (size << 16) - 1
    if step == 0:
        return (0, length) if 0 <= start <= last else (0, 0)
    if step > 0:
        first, end = -(start // step), (last - start) // step + 1
    else:
        first, end = -((last - start) // -step), start // -step + 1
    return min(max(first, 0), length), min(max(end, 0), length)


def _warp_into(words: np.ndarray, matrix: np.ndarray, out: np.ndarray) -> None:
    """Warp one image and write it as float32: nearest pixel, black outside, divided by 255.

    words: (height, width) uint32, the image's pixels, red in the lowest byte (see `as_words`); matrix: 6 int64 of
    `inverse_matrices`; out: (3, height, width) float32. One row at a time: the part of the row that lies inside the image is
    computed, so that no pixel needs a test; its pixels are collected, then split into the three planes by vector instructions.
    """
    height, width = words.shape
    a, b, c, d, e, f = matrix
    row = np.empty(out.shape[2], np.uint32)
    for y in range(out.shape[1]):
        x_in, y_in = c + b * y, f + e * y
        first_x, end_x = inside(x_in, a, width, row.size)
        first_y, end_y = inside(y_in, d, height, row.size)
        first, end = max(first_x, first_y), max(max(first_x, first_y), min(end_x, end_y))
        row[:first] = 0
        row[end:] = 0
        x_in += a * first
        y_in += d * first
        for x in range(first, end):
            row[np.uint64(x)] = words[np.uint64(y_in >> 16), np.uint64(x_in >> 16)]  # unsigned: no test for negative indices
            x_in += a
            y_in += d
        red, green, blue = out[0, y], out[1, y], out[2, y]
        for x in range(row.size):
            red[x] = np.float32(np.int32(row[x] & BYTE)) / WHITE
            green[x] = np.float32(np.int32((row[x] >> np.uint32(8)) & BYTE)) / WHITE
            blue[x] = np.float32(np.int32((row[x] >> np.uint32(16)) & BYTE)) / WHITE


def warp_with_numpy(words: np.ndarray, matrix: np.ndarray, out: np.ndarray) -> None:
    """What `warp_into` computes, in whole-image steps of NumPy: shorter, and used where numba is missing."""
    height, width = words.shape
    y, x = np.mgrid[: out.shape[1], : out.shape[2]]
    x_in, y_in = ((step_x * x + step_y * y + start) >> 16 for step_x, step_y, start in matrix.reshape(2, 3))
    shown = (x_in >= 0) & (x_in < width) & (y_in >= 0) & (y_in < height)
    pixels = np.where(shown, words[y_in.clip(0, height - 1), x_in.clip(0, width - 1)], 0)
    for channel in range(3):
        np.divide(pixels >> (8 * channel) & 255, np.float32(255), out=out[channel], casting="same_kind")


def compiled(function):
    """The function compiled by numba, kept beside this file or in the user's home; where neither may be written, for this run only."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # "no locator available"
        return njit(nogil=True)(function)


if njit:
    inside = compiled(_inside)
    warp_into = compiled(_warp_into)
else:
    warp_into = warp_with_numpy
