from __future__ import annotations

import itertools

from pipelines.load.canvases import Canvas, chosen_canvases, smallest_holding

LANDSCAPE, PORTRAIT, CROWD = Canvas(800, 1088, 32), Canvas(1088, 800, 32), Canvas(800, 1088, 64)


def test_a_batch_goes_to_the_cheapest_canvas_that_holds_it():
    canvases = (Canvas(1088, 1088, 64), CROWD, LANDSCAPE, PORTRAIT)
    assert smallest_holding(canvases, Canvas(800, 1056, 16)) == LANDSCAPE
    assert smallest_holding(canvases, Canvas(800, 1056, 64)) == CROWD
    assert smallest_holding(canvases, Canvas(832, 1056, 64)) == Canvas(1088, 1088, 64)
    unseen = Canvas(800, 1344, 64)
    assert smallest_holding(canvases, unseen) == unseen
    assert smallest_holding((), LANDSCAPE) == LANDSCAPE


def test_one_canvas_holds_every_batch():
    assert chosen_canvases([LANDSCAPE, PORTRAIT, CROWD], 1) == (Canvas(1088, 1088, 64),)


def test_no_more_canvases_are_chosen_than_batches_need():
    needed = [LANDSCAPE] * 5 + [PORTRAIT] * 3 + [CROWD]
    largest = Canvas(1088, 1088, 64)
    # it holds six batches, LANDSCAPE only five
    assert chosen_canvases(needed, 2) == tuple(sorted([CROWD, largest]))
    assert chosen_canvases(needed, 9) == tuple(sorted([LANDSCAPE, PORTRAIT, CROWD, largest]))


def test_every_further_canvas_costs_fewer_pixels():
    sides = range(800, 1344, 32)
    needed = [Canvas(h, w, g) for h, w, g in itertools.product(sides, sides, (16, 32, 64))]
    pixels = []
    for most in range(1, 9):
        canvases = chosen_canvases(needed, most)
        assert len(canvases) == most
        padded = [smallest_holding(canvases, each) for each in needed]
        pixels.append(sum(canvas.height * canvas.width for canvas in padded))
    assert pixels == sorted(pixels, reverse=True)
