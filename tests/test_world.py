import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from atlasvid_cli import world


@pytest.mark.parametrize("aspect", [16 / 9, 1.0, 9 / 16])
def test_objects_stay_in_frame_for_12_seconds(aspect):
    rng = random.Random(0)
    for _ in range(200):
        scene = world.sample_scene(rng, aspect, 12.0)
        dx, dy = world.DIRECTIONS[scene.direction]
        for t in (0.0, 12.0):
            x, y = scene.start[0] + dx * scene.speed * t, scene.start[1] + dy * scene.speed * t
            assert 0.999 * scene.size <= x <= aspect - 0.999 * scene.size
            assert 0.999 * scene.size <= y <= 1 - 0.999 * scene.size


def test_held_out_combinations_are_a_tenth_and_never_sampled_for_training():
    rng = random.Random(1)
    assert not any(world.is_held_out(world.sample_attributes(rng)) for _ in range(300))
    every = [
        (c, s, d, g, k)
        for c in world.COLOURS
        for s in world.SHAPES
        for d in world.DIRECTIONS
        for g in world.COLOURS
        for k in world.GROUNDS
        if c != g
    ]
    assert 0.08 < sum(map(world.is_held_out, every)) / len(every) < 0.12


@pytest.mark.parametrize("ground", world.GROUNDS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_large_render_downsampled_is_a_small_render(shape, ground):
    scene = world.sample_scene(random.Random(2), 1.6, 4.0, ("red", shape, "left", "green", ground))
    times = torch.tensor([1.0])
    small = world.render(scene, times, 40, 64)
    large = F.avg_pool2d(world.render(scene, times, 320, 512)[:, 0], 8)
    assert (small[:, 0] - large).abs().mean() < 0.02


def test_a_window_is_a_crop():
    scene = world.sample_scene(random.Random(3), 1.6, 4.0)
    whole = world.render(scene, torch.tensor([0.5]), 80, 128)
    part = world.render(scene, torch.tensor([0.5]), 40, 40, (0.25, 0.5, 0.5))
    torch.testing.assert_close(part, whole[..., 40:80, 20:60], atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [None, (0.3, 0.1, 0.5)])
@pytest.mark.parametrize("shape", world.SHAPES)
def test_what_changes_with_the_objects_colour_is_near_it(shape, window):
    scene = world.sample_scene(random.Random(5), 1.6, 4.0, ("red", shape, "left", "green", "hills"))
    times, side = torch.tensor([0.0, 2.0]), 16
    red, blue = (world.render(replace(scene, colour=c), times, 10 * side, 16 * side, window) for c in ("red", "blue"))
    touched = F.max_pool2d((red - blue).abs().amax(0), side) > 0
    near = world.near_object(scene, times, 10, 16, window)
    assert touched.any() and not (touched & ~near).any()
    assert (near & ~F.max_pool2d(touched.float(), 5, 1, 2).bool()).sum() == 0, "nor what is far from it"


def test_what_is_hard_is_drawn_more_often_for_training_alone():
    rng = random.Random(6)
    shares = {}
    for held_out in (False, True):
        drawn = [world.sample_attributes(rng, held_out) for _ in range(600)]
        shares[held_out] = sum(a[1] == "star" for a in drawn) / sum(a[1] == "ball" for a in drawn)
    assert shares[False] > 1.5 > shares[True]
