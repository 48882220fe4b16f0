"""Images for studies: twelve outlines that are easily confused, in any colour, one over another.

The outline alone tells the class: hue, texture and ground are drawn without a look at it. On a
grid, every box lies on multiples of 16 px, the stride of `tiny`'s RoI map. Rounding a box to that
map then moves nothing, so what RoIAlign wins there is not the rounding of boxes.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import replace

import numpy as np

from pipelines.pack.outlines import OUTLINES, Outline
from pipelines.pack.person import person
from pipelines.pack.placed import (
    MIN_PIXELS,
    Canvas,
    Drawn,
    Mask,
    Placed,
    Points,
    crowd,
    polygon_mask,
    rounded,
)
from pipelines.pack.shapes import enlarge

CATEGORIES = ("person", *OUTLINES)
GRID_PX = 16
PERSON_RATE = 0.25  # COCO's is 0.30 of the objects
CROWD_RATE = 0.03
# As shares of the long side. COCO has smaller ones too, which would be under a cell of the map.
SMALLEST, LARGEST = 0.14, 0.34  # half of an object's height
FEWEST, MOST = 2, 5  # objects of an image
BESIDE_RATE = 0.42  # of objects that are put near another one
ROOMS = 6  # places to choose from for the others
MIN_VISIBLE = 0.4  # of an object's pixels; no new object may hide more of another one
CONTRAST = 0.35  # least distance of an object's colour from its ground, of sqrt(3) at most


def draw_scene(rng: np.random.Generator, size: int, *, outlines: int, on_grid: bool) -> Drawn:
    """uint8 (H, W, 3) with `size` as its long side, and its objects."""
    short = round(size * rng.choice([0.75, 0.875, 1.0]))
    if on_grid:
        short -= short % GRID_PX
    height, width = (size, short) if rng.random() < 0.5 else (short, size)
    image = _ground(rng, height, width)
    objects: list[Placed] = []
    if rng.random() < CROWD_RATE:  # first, so that it lies behind everything
        category = int(rng.integers(1, outlines))
        many = crowd(rng, category, OUTLINES[CATEGORIES[category]](), height, width)
        if many.whole >= MIN_PIXELS:
            _paint(rng, image, many.mask)
            objects.append(many)
    wanted = int(rng.integers(FEWEST, MOST + 1))
    for _ in range(wanted * 4):  # an attempt may find no room
        if sum(not placed.crowd for placed in objects) >= wanted:
            break
        _try_object(rng, image, objects, outlines, on_grid)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), objects


def _try_object(
    rng: np.random.Generator, image: Canvas, objects: list[Placed], outlines: int, on_grid: bool
) -> None:
    """Draws an object over the others unless it would hide too much of one."""
    height, width = image.shape[:2]
    long_side = max(height, width)
    category, outline, points = _object(rng, outlines)
    radius = long_side * math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST)))
    if points is not None:
        radius = max(radius, 0.14 * long_side)  # limbs are thin
    matrix = radius * _deformation(rng, mirrored=points is None and bool(rng.random() < 0.5))
    centre = _centre(rng, objects, radius, height, width)
    outline = [part @ matrix + centre for part in outline]
    points = None if points is None else points @ matrix + centre
    if on_grid:
        offset, scale = _onto_grid(np.concatenate(outline), height, width)
        outline = [part * scale + offset for part in outline]
        points = None if points is None else points * scale + offset
    polygons = [rounded(part, width, height) for part in outline]
    mask = polygon_mask(polygons, height, width)
    if mask.sum() < MIN_PIXELS or any(_spoilt(other, mask, on_grid) for other in objects):
        return
    _paint(rng, image, mask)
    objects[:] = [replace(other, mask=other.mask & ~mask) for other in objects]
    objects.append(Placed(category, polygons, mask, int(mask.sum()), keypoints=points))


def _object(rng: np.random.Generator, outlines: int) -> tuple[int, Outline, Points | None]:
    """Category, outline, and the keypoints of a person."""
    if rng.random() < PERSON_RATE:
        return 0, *person(rng)
    category = int(rng.integers(1, outlines))
    return category, OUTLINES[CATEGORIES[category]](), None


def _deformation(rng: np.random.Generator, *, mirrored: bool) -> Points:
    """(2, 2): stretched, sheared, turned a little; most things in photographs stand upright."""
    turn, shear = rng.uniform(-0.3, 0.3), rng.uniform(-0.15, 0.15)
    stretch = np.diag([rng.uniform(0.75, 1.1) * (-1 if mirrored else 1), rng.uniform(0.8, 1.0)])
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return np.asarray(stretch @ np.array([[1.0, 0.0], [shear, 1.0]]) @ rotation)


def _centre(
    rng: np.random.Generator, objects: list[Placed], radius: float, height: int, width: int
) -> Points:
    """Where there is room, or beside another object: things meet as often as in photographs."""
    margin = 0.6 * radius
    low, high = np.array([margin, margin]), np.array([width - margin, height - margin])
    if not objects:
        return rng.uniform(low, high)
    boxes = [np.concatenate(other.polygons) for other in objects]
    if rng.random() > BESIDE_RATE:
        places = rng.uniform(low, high, (ROOMS, 2))
        middles = np.array([(box.min(0) + box.max(0)) / 2 for box in boxes])
        room = np.linalg.norm(places[:, None] - middles, axis=2).min(1)
        return np.asarray(places[int(room.argmax())])
    corners = boxes[int(rng.integers(len(boxes)))]
    nearest, farthest = corners.min(0), corners.max(0)
    angle = rng.uniform(0, 2 * math.pi)
    reach = (farthest - nearest) / 2 + rng.uniform(0.3, 1.0) * radius
    centre = (nearest + farthest) / 2 + reach * [math.cos(angle), math.sin(angle)]
    return np.asarray(np.clip(centre, low, high))


def _onto_grid(corners: Points, height: int, width: int) -> tuple[Points, Points]:
    """Offset and scale that move the corners' box to the nearest box of whole cells."""
    low, high = corners.min(0), corners.max(0)
    cells = np.array([width, height]) // GRID_PX
    first = np.clip(np.round(low / GRID_PX), 0, cells - 1)
    last = np.clip(np.round(high / GRID_PX), first + 1, cells)
    scale = (last - first) * GRID_PX / (high - low)
    return first * GRID_PX - low * scale, scale


def _spoilt(other: Placed, mask: Mask, on_grid: bool) -> bool:
    """Whether an object with this mask would hide too much of the other."""
    seen = other.mask & ~mask
    if seen.sum() < MIN_VISIBLE * other.whole:
        return True
    if not on_grid or other.crowd or not (other.mask & mask).any():
        return False
    # The box of a hidden object is that of its pixels, and a tip of its outline may cover none.
    rows, columns = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    corners = np.concatenate(other.polygons)
    return not np.allclose(box, [*corners.min(0), *corners.max(0)], rtol=0, atol=0.01)


# --- appearance -----------------------------------------------------------------------------------


def _colour(rng: np.random.Generator) -> Points:
    """Any hue, mostly saturated."""
    hsv = rng.uniform(), rng.uniform(0.25, 0.95), rng.uniform(0.2, 0.95)
    return np.array(colorsys.hsv_to_rgb(*hsv))


def _ground(rng: np.random.Generator, height: int, width: int) -> Canvas:
    """Patches of two colours, noise at three scales, and grain."""
    first, second = _colour(rng), _colour(rng)
    share = enlarge(rng.normal(0.5, 0.5, (4, 4, 1)), height, width).clip(0, 1)
    ground = first * share + second * (1 - share)
    for cells, strength in ((8, 0.07), (20, 0.06), (48, 0.04)):
        ground += enlarge(rng.normal(0, strength, (cells, cells, 3)), height, width)
    return np.asarray(ground + rng.normal(0, 0.03, (height, width, 1)))


def _paint(rng: np.random.Generator, image: Canvas, mask: Mask) -> None:
    """Fills the mask with stripes, spots or a slope of two colours unlike its ground."""
    behind = image[mask].mean(0)
    colours = [_colour(rng) for _ in range(8)]
    fitting = [c for c in colours if np.linalg.norm(c - behind) >= CONTRAST]
    first = fitting[0] if fitting else max(colours, key=lambda c: float(np.linalg.norm(c - behind)))
    second = first + 0.35 * (_colour(rng) - first)
    y, x = np.nonzero(mask)
    turn, wave, phase = rng.uniform(0, math.pi), rng.uniform(0.3, 1.2), rng.uniform(0, 6)
    along, across = (
        x * math.cos(turn) + y * math.sin(turn),
        y * math.cos(turn) - x * math.sin(turn),
    )
    match int(rng.integers(3)):
        case 0:
            share = np.sin(along * wave + phase)
        case 1:
            share = np.sin(along * wave + phase) * np.sin(across * wave)
        case _:
            share = np.interp(along, [along.min(), along.max() + 1], [-1, 1])
    mixed = first + (0.5 + 0.5 * share)[:, None] * (second - first)
    image[mask] = mixed + rng.normal(0, 0.03, (len(x), 1))
