import random

import numpy as np
import pytest
import torch

from atlasvid_cli import world
from atlasvid_cli.metrics import adherence, components, detect, edge_width, step_energy


def frames_at(scene, times, *window):
    pixels = world.render(scene, times, 160, 256, *window)
    return [((f + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for f in pixels.unbind(1)]


def frames_of(scene, seconds=4.0, count=5):
    return frames_at(scene, torch.linspace(0, seconds, count))


def seen(frames, seconds=4.0):
    return detect(frames, np.linspace(0, seconds, len(frames)).tolist())


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(11)
    return [world.sample_scene(rng, 1.6, 4.0, world.sample_attributes(rng, held_out=True)) for _ in range(60)]


def test_true_renders_score_nearly_all(scenes):
    scores = [adherence(seen(frames_of(s)), s.attributes) for s in scenes]
    for name in scores[0]:
        assert np.mean([s[name] for s in scores]) >= 0.97, name


def test_corrupted_renders_fail(scenes):
    scenes = scenes[:20]
    backwards = [adherence(seen(frames_of(s)[::-1]), s.attributes)["direction"] for s in scenes]
    frozen = [adherence(seen(frames_of(s)[:1] * 5), s.attributes)["direction"] for s in scenes]
    doubled = [
        adherence(seen([np.concatenate((f, f), axis=1) for f in frames_of(s)]), s.attributes)["count"] for s in scenes
    ]
    swapped = [adherence(seen([f[..., ::-1] for f in frames_of(s)]), s.attributes)["colour"] for s in scenes]
    assert not any(backwards) and not any(frozen)
    assert np.mean(doubled) < 0.05
    assert np.mean(swapped) < 0.6  # white, black, green and purple survive a swap of red and blue


def test_objects_that_a_bar_joins_are_two(scenes):
    def joined(scene):
        dx, dy = world.DIRECTIONS[scene.direction]
        colour = (np.array(world.COLOURS[scene.colour]) * 255).round()
        for t, frame in zip(np.linspace(0, 4, 5), frames_of(scene), strict=True):
            both = np.concatenate((frame, frame), axis=1)
            x, y = (round(160 * (at + d * scene.speed * t)) for at, d in zip(scene.start, (dx, dy), strict=True))
            both[y - 2 : y + 3, x : x + frame.shape[1]] = colour
            yield both

    found = [seen(list(joined(s))) for s in scenes[:20]]
    assert np.mean([d.count == 2 for d in found]) >= 0.95


def test_shapes_that_are_not_what_was_asked_for_fail(scenes):
    scenes = scenes[:30]

    def smeared(frame):  # a blob: every pixel takes the colour of one up to 24 px away
        rng = np.random.default_rng(0)
        moved = [np.clip(np.arange(n)[:, None] + rng.integers(-24, 25, (n, 1)), 0, n - 1) for n in frame.shape[:2]]
        return frame[moved[0], moved[1].T]

    upside_down = [f for s in scenes if s.shape == "triangle" for f in [[g[::-1] for g in frames_of(s)]]]
    assert upside_down and not any(seen(f).shape == "triangle" for f in upside_down)
    blobs = [adherence(seen([smeared(f) for f in frames_of(s, count=2)]), s.attributes)["shape"] for s in scenes]
    assert np.mean(blobs) < 0.2


@pytest.mark.parametrize("shown", [0.95, 0.85])
def test_a_ground_is_known_by_a_part_of_it(scenes, shown):
    """The top left of a frame, as videos show it of their proxies, in which patterns are larger."""
    found = []
    for scene in scenes:
        frames = frames_at(scene, torch.tensor([0.0, 2.0]), (0.0, 0.0, shown))
        found.append(seen(frames, 2.0).ground == scene.ground)
    assert np.mean(found) >= 0.97


def test_a_gradient_turned_by_a_quarter_is_none(scenes):
    gradients = [scene for scene in scenes if scene.ground == "gradient"][:5]
    turned = ([np.ascontiguousarray(np.rot90(f, -1)) for f in frames_of(scene)] for scene in gradients)
    assert gradients and all(seen(frames).ground != "gradient" for frames in turned)


def test_speed_is_measured(scenes):
    for scene in scenes[:10]:
        found = seen(frames_of(scene))
        extent = scene.aspect if world.DIRECTIONS[scene.direction][0] else 1.0
        assert found.speed == pytest.approx(scene.speed / extent, rel=0.05)


def test_a_steady_speed_is_and_a_changing_one_is_not(scenes):
    for scene in scenes[:10]:
        assert seen(frames_of(scene, count=9)).unsteady < 0.1
        assert seen(frames_at(scene, 4 * torch.linspace(0, 1, 9) ** 1.5)).unsteady > 0.15


def test_places_count_at_their_own_times(scenes):
    times = [0.0, 0.5, 0.75, 1.5, 2.0, 2.25, 3.0, 3.75, 4.0]
    for scene in scenes[:10]:
        assert detect(frames_at(scene, torch.tensor(times)), times).unsteady < 0.1


def test_what_fills_the_frame_is_no_object():
    red = np.full((90, 160, 3), (np.array(world.COLOURS["red"]) * 255).round(), np.uint8)
    assert seen([red] * 5).count == 0 and edge_width(red) is None


def test_components_of_a_ring_and_a_dot():
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[3:6, 3:6] = False
    mask[4, 4] = True
    dot, ring = sorted(components(mask))
    assert (dot.pixels, dot.box) == (1, (4, 4, 5, 5)) and (ring.pixels, ring.box) == (40, (1, 1, 8, 8))
    assert (ring.x, ring.y) == (4.0, 4.0)


def test_seams_are_seen_where_they_are(scenes):
    def energy(frames):
        return np.mean([step_energy(f, [32, 64, 96], [32, 96, 160], 32) for f in frames], axis=0)

    def with_seams(frame, code):
        seamed = frame.astype(np.int32)
        seamed[64:96] += code
        seamed[:, 96:160] -= code
        return seamed.clip(0, 255).astype(np.uint8)

    clean = [f for s in scenes for f in frames_of(s, count=1)]
    seamed = {code: energy([with_seams(f, code) for f in clean]) for code in (4, 30)}
    assert seamed[4][0] > 2 * energy(clean)[0] and seamed[30][0] > seamed[4][0]
    np.testing.assert_allclose(seamed[4][1:], energy(clean)[1:], rtol=0.01)


def test_a_step_counts_on_its_own_line_and_as_a_faint_one_at_most():
    ramp = np.arange(9, dtype=np.uint8)[:, None, None] ** 2 * np.ones((1, 9, 3), np.uint8)  # steps of 1, 3, 5, ...
    codes = np.sqrt(step_energy(ramp, [3], [], 5)) * 255
    assert codes.tolist() == pytest.approx([5, 7, 8, 8, 8])
    assert step_energy(np.zeros((8, 8, 3), np.uint8), [4], [4], 4).tolist() == [0.0] * 4


@pytest.mark.parametrize(("height", "sigmas"), [(270, (1.0, 2.0)), (540, (2.0, 4.0))])
def test_the_width_of_an_edge_grows_with_its_blur(scenes, height, sigmas):
    widths = {sigma: [] for sigma in (0.0, *sigmas)}
    for scene in scenes[:12]:
        pixels = world.render(scene, torch.tensor([1.0]), height, round(1.6 * height))[:, 0]
        for sigma, found in widths.items():
            reach = torch.arange(-12.0, 13.0)
            kernel = torch.exp(-reach.square() / (2 * sigma**2)) if sigma else (reach == 0).float()
            kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
            blurred = torch.nn.functional.pad(pixels[None], (12, 12, 12, 12), mode="replicate")
            for k in (kernel, kernel.transpose(2, 3)):
                blurred = torch.nn.functional.conv2d(blurred, k, groups=3)
            frame = ((blurred[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            found.append(edge_width(frame))
    assert np.median(widths[0.0]) < 2
    for sigma in sigmas:  # 2.56 sigma, of a straight edge
        assert np.median(widths[sigma]) == pytest.approx(2.56 * sigma, rel=0.25)


def test_an_empty_frame_has_no_edge():
    assert edge_width(np.full((90, 160, 3), 128, np.uint8)) is None
