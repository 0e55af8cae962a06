"""Drawn faces: what data/sample.py fills its stand-in for LFW with.

A face is a list of parts, back to front, in units of half a head; what tells people apart comes from their name, what tells
images of one person apart (pose, mood, clothes, room, light) from name and number.
"""

from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw

STEMS = ["Ad", "Bel", "Cor", "Dal", "El", "Fen", "Gil", "Ir", "Kal", "Mar", "Nor", "Ol", "Ros", "Sil", "Um", "Vin"]
ENDINGS = ["a", "en", "is", "o", "ara", "el", "an", "i", "us", "une"]
TREES = ["Ash", "Birch", "Clover", "Elder", "Fern", "Hazel", "Ivy", "Maple", "Oak", "Thorn"]
TOWNS = ["by", "dale", "ford", "ham", "ley", "more", "ton", "wood"]
SKINS = ["#ffe0cc", "#f7cfb0", "#eebb96", "#dca57c", "#c68a5e", "#a66b45", "#80502f", "#5d3a24"]
HAIRS = ["#1d1a1c", "#33241d", "#573825", "#84532c", "#b5772f", "#dfb364", "#b2492a", "#8c8c93", "#d9d6cc", "#6b3d5e"]
CLOTHS = ["#d8574b", "#e9a13b", "#f0d35b", "#5fa55a", "#3c8d8a", "#4a7fc1", "#6a5aa8", "#c06a9b", "#f3efe6", "#3b4252", "#8a5a44"]
WALLS = ["#c9d8d3", "#e8d9bf", "#b9cbe0", "#dcc3c9", "#a9b99a", "#d7cfe3", "#8fa6ad", "#c79f7f", "#6f8296", "#e9e4d8"]
IRISES = ["#3b2416", "#5a3a1d", "#3f6b4a", "#3c6a9b", "#59676e"]
STYLES = ["bald", "short", "short", "short", "spiky", "curly", "curly", "bob", "long", "long", "bun"]
TRAITS = {"width": (72, 86), "jaw": (5, 30), "eye": (90, 115), "apart": (30, 36), "brow": (3, 7), "mouth": (24, 34), "parting": (-50, 50)}

CIRCLE = np.exp(2j * np.pi * np.arange(49) / 48)  # points x + iy, y down; multiplying turns and enlarges them, adding moves them
BOX = np.sign(CIRCLE.real) * abs(CIRCLE.real) ** 0.7 + 1j * np.sign(CIRCLE.imag) * abs(CIRCLE.imag) ** 0.7
LOWER, UPPER = CIRCLE[:25], CIRCLE[24:]


def shade(colour: str, factor: float, tint: tuple = (0, 0, 0)) -> tuple[int, ...]:
    """Darker (factor < 1) or lighter form of a colour, with a tint added."""
    return tuple(min(255, round(value * factor + add)) for value, add in zip(ImageColor.getrgb(colour), tint, strict=True))


def person(seed: int, name: str) -> SimpleNamespace:
    """What all images of one person share."""
    rng = Random(f"{seed} {name}")
    who = SimpleNamespace(**{trait: rng.uniform(*percent) / 100 for trait, percent in TRAITS.items()})
    who.skin, who.hair, who.iris, who.style = (rng.choice(values) for values in (SKINS, HAIRS, IRISES, STYLES))
    who.beard = rng.random() < 0.4 and who.style in ("bald", "short", "spiky")
    who.glasses, who.freckles, who.earrings = (rng.random() < share for share in (0.25, 0.2, 0.2))
    who.head = CIRCLE.real * (1 - who.jaw * np.maximum(CIRCLE.imag, 0) ** 2) + 1j * CIRCLE.imag
    return who


def body_and_head(who: SimpleNamespace, rng: Random) -> list[tuple]:
    """Parts from back to front, each (colour, x, y, width, height, form, line) as `paint` takes them."""
    (cloth, trim), dark, edge = rng.sample(CLOTHS, 2), shade(who.hair, 0.85), shade(who.skin, 0.78)
    cheek = LOWER[::-1]  # upper edge of a beard
    stripes = [(1.75, 1.41), (1.97, 1.59), (2.19, 1.69), (2.41, 1.74)] if rng.random() < 0.4 else []
    hair = {
        "bald": [],
        "curly": [(dark, 0.95 * z.real, 0.95 * z.imag - 0.22, 0.32, 0.32) for z in CIRCLE[::3]],
        "bob": [(dark, 0, -0.02, who.width + 0.25, 1.1, BOX)],
        "long": [(dark, 0, 0.35, who.width + 0.24, 1.45, BOX)],
        "bun": [(dark, 0, -1.2, 0.36, 0.34), (dark, 0, -0.2, who.width + 0.06, 0.74)],
    }
    return [
        *hair.get(who.style, [(dark, 0, -0.2, who.width + 0.06, 0.74)]),
        (cloth, 0, 2.55, 1.75, 1.25, BOX),
        *[(trim, 0, y, reach, 0.04, BOX) for y, reach in stripes],
        (trim, 0, 1.32, 0.5, 0.3),
        (shade(who.skin, 0.93), 0, 1.22, 0.4, 0.3),
        (shade(who.skin, 0.8), 0, 0.95, 0.36, 0.5, BOX),  # the neck, in the shadow of the chin
        *[("#f2c94c", who.width + 0.02, 0.34, 0.06, 0.06)] * who.earrings,
        (edge, who.width, 0.08, 0.15, 0.23),
        (who.skin, who.width, 0.08, 0.12, 0.2),
        (edge, 0, 0, who.width + 0.02, 1.02, who.head),
        (who.skin, 0, 0, who.width, 1, who.head),
        (shade(who.skin, 0.75, (58, 22, 22)), 0.48, 0.34, 0.16, 0.12),  # cheeks
        *[(dark, 0, 0.15, who.width, 0.85, np.r_[who.head[:25], 0.8 * cheek.real + 0.32j * cheek.imag])] * who.beard,
    ]


def features(who: SimpleNamespace, rng: Random) -> list[tuple]:
    """What moves across the head as it turns: mouth, nose, eyes, glasses."""
    x, smile, laugh, lift = who.apart, rng.uniform(0.02, 0.18), rng.choice((0, 0, 0.12, 0.2, 0.27)), rng.uniform(-0.05, 0.06)
    eyes = [
        (shade(who.skin, 0.62), x, 0, 0.165 * who.eye, 0.145 * who.eye),
        ("#fbfaf5", x, 0.015, 0.15 * who.eye, 0.125 * who.eye),
        (who.iris, x, 0.015, 0.095 * who.eye, 0.105 * who.eye),
        ("#15110f", x, 0.015, 0.052, 0.058),
        ("white", x + 0.035, -0.03, 0.028, 0.028),
    ]
    mouth = [
        ("#7c2f33", 0, 0.49, who.mouth + 0.02, laugh + 0.03, LOWER),
        ("#fffdf8", 0, 0.5, who.mouth - 0.02, 0.09, LOWER),
        ("#e07a7a", 0, 0.48 + 0.8 * laugh, 0.45 * who.mouth, 0.25 * laugh),
    ]
    return [
        *[(shade(who.skin, 0.7), 0.48 + 0.12 * z.real, 0.27 + 0.08 * z.imag, 0.018, 0.018) for z in CIRCLE[:48:9] if who.freckles],
        *[(shade(who.hair, 0.8), 0, 0.5, 0.36, 0.11, UPPER)] * who.beard,
        *(mouth if laugh else [("#8a3d3f", 0, 0.5, who.mouth, smile, LOWER, 0.05)]),
        (shade(who.skin, 0.65), 0, 0.22, 0.13, 0.1, LOWER[2:23], 0.045),
        *([("#2b2326", x, 0.03, 0.14, 0.08, UPPER, 0.045)] if rng.random() < 0.06 else eyes),
        (shade(who.hair, 0.75), x, -0.2 - lift, 0.19, 0.09, UPPER[3:22], who.brow),
        *[("#2b2326", x, 0.02, x - 0.03, 0.22, BOX, 0.035), ("#2b2326", 0, 0, 0.04, 0.02, UPPER, 0.035)] * who.glasses,
    ]


def hair_in_front(who: SimpleNamespace, rng: Random) -> list[tuple]:
    """A cap of hair, its lower edge highest at the parting, with locks, curls or strands."""
    if who.style == "bald":
        return []
    x, depth = np.linspace(1.07, -1.07, 13), 0.55 if who.style in ("bob", "long", "bun") else 0.4
    hairline = x + 1j * np.minimum(depth * np.abs(x - who.parting) ** 1.5 - 0.75, -0.05)
    cap = (who.hair, 0, 0, who.width, 1, np.r_[1.08 * UPPER.real + 1j * (1.06 * UPPER.imag - 0.06), hairline])
    spikes = [(who.hair, 0, 0, 1, 1, x - 0.75j + [-0.17, 0.17, 0.25 * x - (0.63 - 0.3 * x**2) * 1j]) for x in np.linspace(-0.6, 0.6, 6)]
    curls = [(shade(who.hair, rng.uniform(0.9, 1.1)), 0.9 * z.real, 0.92 * z.imag - 0.05, 0.2, 0.2) for z in UPPER[2:23:2]]
    strands = [(shade(who.hair, 1.25), 0, -0.3, w * who.width, 0.68, UPPER[6:19], 0.02) for w in (0.33, 0.57, 0.76)]
    return [cap, *{"spiky": spikes, "curly": curls}.get(who.style, strands)]


def paint(pen: ImageDraw.ImageDraw, centre: complex, unit: complex, colour, x, y, width, height, form=CIRCLE, line=0.0) -> None:
    """Fill a form, or draw its outline, in units of half a head from the head's centre; what has x > 0 comes on both sides."""
    for side in (1, -1) if x > 0 else (1,):
        points = centre + unit * (side * (x + width * form.real) + 1j * (y + height * form.imag))
        pixels = points.view(float).tolist()
        if line:
            pen.line(pixels, colour, round(line * abs(unit)))
        else:
            pen.polygon(pixels, colour)


@cache
def stage(number: int) -> tuple[Image.Image, Image.Image]:
    """A room out of focus, 700 x 700, and what the camera adds, 250 x 250: light from one side and grain, around 128."""
    rng, wall = Random(number), WALLS[number % len(WALLS)]
    room = Image.new("RGB", (60, 60), wall)
    for _ in range(20):
        x, y, size = rng.randrange(60), rng.randrange(60), rng.uniform(2, 9)
        colour = shade(rng.choice([wall, wall, rng.choice(CLOTHS)]), rng.uniform(0.7, 1.15))
        ImageDraw.Draw(room).rectangle((x, y, x + size, y + 2 * size), colour)
    slope = np.exp(2j * np.pi * rng.random()) * np.linspace(-22, 22, 250)
    film = 128 + slope.real + slope.imag[:, None] + np.random.default_rng(number).normal(0, 3, (250, 250))
    return room.resize((700, 700), Image.Resampling.BICUBIC), Image.fromarray(film.clip(0, 255).astype(np.uint8)).convert("RGB")


def draw_face(seed: int, name: str, number: int) -> Image.Image:
    """One image of a person, 250 x 250, drawn twice as large and averaged; a function of its arguments alone."""
    who, rng = person(seed, name), Random(f"{seed} {name} {number}")
    room, film = stage(rng.randrange(30))
    left, top, yaw = rng.randrange(200), rng.randrange(200), rng.uniform(-0.16, 0.16)
    canvas = room.crop((left, top, left + 500, top + 500))
    centre = complex(250 + rng.uniform(-14, 14), 240 + rng.uniform(-12, 12))
    unit = rng.uniform(124, 142) * np.exp(1j * rng.gauss(0, 0.07))
    pen = ImageDraw.Draw(canvas)
    for parts, shift in ((body_and_head, 0), (features, yaw), (hair_in_front, 0)):
        for part in parts(who, rng):
            paint(pen, centre + shift * unit, unit, *part)
    return ImageChops.add(canvas.reduce(2), film, 1, -128)


def save_face(seed: int, name: str, number: int, path: Path) -> None:
    draw_face(seed, name, number).save(path, quality=75)


def people(images: int, seed: int) -> list[tuple[str, int]]:
    """(name, number) of every image; as in LFW most people have one, few have many: P(n or more) is about n^-1.6."""
    rng, found, i = Random(seed), [], 0
    while len(found) < images:
        first, tree, town = STEMS[i % 16] + ENDINGS[i // 16 % 10], TREES[(i + i // 160) % 10], TOWNS[(i // 10 + i // 1600) % 8]
        count = min(int((1 - rng.random()) ** (-1 / 1.6)), 530, images - len(found))
        found += [(f"{first}_{tree}{town}{i // 12_800 or ''}", number + 1) for number in range(count)]
        i += 1
    return found
