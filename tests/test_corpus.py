"""Folders of clips as samples: read, cut, encoded once; what cannot be used is named and passed over."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atlasvid_cli import corpus, digests, footage
from atlasvid_cli.encode import encode_clips
from atlasvid_cli.errors import InputError
from atlasvid_cli.plan import Request, make_plan
from atlasvid_cli.presets import load_preset, preset_names
from atlasvid_cli.session import Session
from atlasvid_cli.video import write_video


@pytest.fixture(scope="module")
def session(random_preset):
    return Session(str(random_preset))


def clip(path, seconds, size=(160, 128), fps=16, seed=0):
    """Colours that drift, with a bright bar that moves over them."""
    width, height = size
    count = round(seconds * fps)
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(1, 3, 1, 1, generator=generator).repeat(count, 1, height, width) * 0.5
    for i in range(count):
        frames[i, :, :, (4 * i) % width : (4 * i) % width + 16] += 0.4
    write_video(path, iter(frames), width=width, height=height, fps=fps, frame_count=count)
    return path


def pairs(folder, **seconds):
    for i, (name, length) in enumerate(seconds.items()):
        clip(folder / f"{name}.mp4", length, seed=i)
        (folder / f"{name}.txt").write_text(f"clip {name}\n")
    return folder


@given(st.integers(1, 400), st.integers(1, 12), st.integers(1, 4))
def test_pieces_are_as_long_as_they_may_be(frames, k, step):
    longest = k * step + 1
    pieces = corpus.cut(frames, longest, step + 1, step)
    assert sum(pieces) <= frames and all(p <= longest and p % step == 1 % step and p > step for p in pieces)
    assert all(a == longest for a, _ in pairwise(pieces))
    assert frames - sum(pieces) <= step  # what is left is no piece


def test_a_folder_and_an_index_say_the_same(tmp_path, console, capsys):
    pairs(tmp_path, a=0.5, b=0.5)
    clip(tmp_path / "silent.mp4", 0.5)
    (tmp_path / "notes.md").write_text("no clip")
    found = corpus.read_index(tmp_path, console)
    assert [(e.path.name, e.caption) for e in found] == [("a.mp4", "clip a"), ("b.mp4", "clip b")]
    warned = capsys.readouterr().err
    assert "silent.mp4" in warned and "silent.txt" in warned and "notes" not in warned
    index = tmp_path / "index.jsonl"
    index.write_text("".join(json.dumps({"video": e.path.name, "caption": e.caption}) + "\n" for e in found) + "\n")
    assert corpus.read_index(index, console) == found


@pytest.mark.parametrize("line", ["no json", '"text"', '{"video": "a.mp4"}', '{"video": 3, "caption": "x"}'])
def test_a_bad_index_line_is_named(tmp_path, console, line):
    index = tmp_path / "index.jsonl"
    index.write_text(json.dumps({"video": "a.mp4", "caption": "x"}) + "\n" + line)
    with pytest.raises(InputError, match="line 2"):
        corpus.read_index(index, console)
    with pytest.raises(InputError, match="absent"):
        corpus.read_index(tmp_path / "absent", console)


def test_stage_1_gets_the_clip_at_the_proxys_rate(session, tmp_path, console, monkeypatch):
    """Two pieces of 13 frames at 4 fps, then what is left."""
    monkeypatch.setattr(corpus, "proxy_latents", lambda preset: 4)
    pairs(tmp_path, a=8.5)
    [samples] = corpus.load_samples(session, "proxy", tmp_path, tmp_path / "work", console)
    assert [s["latents"].shape[1] for s in samples] == [4, 4, 2]
    assert {s["caption"] for s in samples} == {"clip a"}
    _, _, h, w = samples[0]["latents"].shape
    assert h * w <= 4 * session.preset.proxy.base_tokens and w / h == pytest.approx(1.25, rel=0.35)
    source = footage.open_clip(tmp_path / "a.mp4")
    frames = torch.stack(list(footage.read_clip(source, Fraction(4), 26, (w * 16, h * 16))), 1)
    second = encode_clips(session.vae(), frames[None, :, 13:26])[0]
    tolerance = 2e-3 if session.vae().dtype == torch.float32 else 2e-2  # kept as fp16
    torch.testing.assert_close(samples[1]["latents"].float(), second, atol=tolerance, rtol=tolerance)


def test_stage_2_gets_crops_with_their_proxies(session, tmp_path, console):
    pairs(tmp_path, a=4.3)
    [samples] = corpus.load_samples(session, "detail", tmp_path, tmp_path / "work", console)
    latents, tokens = session.preset.training_crop
    assert len(samples) == 2  # of 33 frames at 16 fps
    for sample in samples:
        ratio = int(sample["ratio"])
        assert ratio in (2, 4)
        side = tokens * session.preset.geometry.patch
        assert sample["latents"].shape[1:] == (latents, side, side)
        assert sample["proxy_4"].shape[1:] == (3, side // ratio, side // ratio)
        assert sample["proxy_1"].shape[1:] == (latents, side // ratio, side // ratio)


def test_a_clip_of_many_pieces_has_every_ratio_the_largest_twice(session, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_detail_sample", lambda vae, frames, ratio, r: (len(list(frames)), ratio))
    pairs(tmp_path, a=15.0)
    made = corpus.encode_for_detail(None, session.preset, footage.open_clip(tmp_path / "a.mp4"))
    ratios = session.preset.training_ratios
    turns = len(ratios) + 1
    assert len(made) >= turns
    assert sorted(ratio for _, ratio in made[:turns]) == sorted([*ratios, ratios[-1]])


def listed(path, sha256="0", size=(160, 128)):
    """A clip of one piece of stage 2, of which nothing is read."""
    seconds = Fraction(21, 10)
    return footage.Clip(path, sha256, *size, seconds, Fraction(0), Fraction(2), Fraction(16), None, False)


def test_every_corpus_has_the_largest_ratio_however_few_its_clips(session, tmp_path, console, monkeypatch):
    """The preset itself would not take an adapter that never saw it. Here the first clip of each cannot be read."""

    def opened(path):
        if path.stem == "!":
            raise InputError("no video")
        return listed(path, footage.content(path))

    monkeypatch.setattr(corpus, "load_vae", lambda folder: SimpleNamespace(to=lambda device: None))
    monkeypatch.setattr(corpus, "open_clip", opened)
    monkeypatch.setattr(corpus, "read_clip", lambda *a, **k: iter(()))
    monkeypatch.setattr(
        corpus, "_detail_sample", lambda vae, frames, ratio, r: ({"latents": torch.zeros(1)}, {"ratio": str(ratio)})
    )
    drawn = []
    for number in range(40):
        folder, count = tmp_path / str(number), 1 + number % 4
        folder.mkdir()
        for name in ("!", *range(count)):
            (folder / f"{name}.mp4").write_text(f"{number} {name}")
            (folder / f"{name}.txt").write_text("a clip")
        (folder / "index.jsonl").write_text(2 * (json.dumps({"video": "0.mp4", "caption": "a clip"}) + "\n"))
        for data in (folder, folder / "index.jsonl", folder):  # the last from the cache
            groups = corpus.load_samples(session, "detail", data, tmp_path / "work", console)
            trained, _ = corpus.split_groups(groups)
            ratios = [Fraction(sample["ratio"]) for sample in trained]
            assert len(ratios) == (count if data is folder else 2) and max(ratios) == session.preset.training_ratios[-1]
        drawn += ratios
    assert len(list(tmp_path.glob("work/*/*.safetensors"))) == len(drawn)  # each clip is encoded once
    assert set(drawn) == set(session.preset.training_ratios)


def test_a_clip_is_read_once_to_be_known(session, tmp_path, console, monkeypatch):
    reads, read = [], digests._read
    monkeypatch.setattr(digests, "_read", lambda path: reads.append(path.name) or read(path))
    corpus.load_samples(session, "proxy", pairs(tmp_path, a=1.5), tmp_path / "work", console)
    assert reads.count("a.mp4") == 1


def test_a_slow_clip_is_named_once_where_its_frames_are_repeated(session, tmp_path, console, capsys):
    clip(tmp_path / "a.mp4", 2.5, fps=8)
    index = tmp_path / "index.jsonl"
    index.write_text("".join(json.dumps({"video": "a.mp4", "caption": told}) + "\n" for told in "xy"))
    for stage, count in (("proxy", 0), ("detail", 1), ("detail", 1)):  # the last from the cache
        assert len(corpus.load_samples(session, stage, index, tmp_path / "work", console)) == 2
        said = capsys.readouterr().err
        assert said.count("a.mp4 has 8 frames a second where training takes 16") == said.count("warning") == count


def test_an_hdr_clip_is_named(session, tmp_path, console, capsys, monkeypatch):
    pairs(tmp_path, a=2.1)
    opened = footage.open_clip
    monkeypatch.setattr(corpus, "open_clip", lambda path: replace(opened(path), is_hdr=True))
    for _ in range(2):  # the second time from the cache
        corpus.load_samples(session, "proxy", tmp_path, tmp_path / "work", console)
        assert "a.mp4 is HDR" in capsys.readouterr().err
        monkeypatch.setattr(corpus, "open_clip", lambda path: pytest.fail("opened again"))


def test_a_crop_is_never_enlarged_and_its_proxy_shows_the_same(session, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(corpus, "encode_clips", lambda vae, x: seen.append(x[0]) or x)
    monkeypatch.setattr(footage, "_fit", lambda *a, real=footage._fit: seen.append(a[3].zoom) or real(*a))
    source = footage.open_clip(clip(tmp_path / "a.mp4", 2.2, size=(512, 256)))
    corpus.encode_for_detail(None, session.preset, source)
    zooms = {z for z in seen if isinstance(z, float)}
    assert len(zooms) == 1 and 1 <= zooms.pop() <= 2
    dense, sparse, small = (x for x in seen if torch.is_tensor(x))
    assert torch.equal(sparse, small[:, ::4])
    ratio = dense.shape[-1] // small.shape[-1]
    boxed = torch.nn.functional.avg_pool2d(dense.transpose(0, 1), ratio).transpose(0, 1)
    assert (boxed - small).abs().mean() < 0.02


def test_what_cannot_be_used_is_named_and_passed_over(session, tmp_path, console, capsys):
    pairs(tmp_path, good=2.5, short=0.9)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.txt").write_text("broken")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.txt").write_text("a folder")
    for stage in ("proxy", "detail"):
        groups = corpus.load_samples(session, stage, tmp_path, tmp_path / "work", console)
        assert [g[0]["caption"] for g in groups] == ["clip good"]
        warned = capsys.readouterr().err
        assert all(f"{name}.mp4" in warned for name in ("broken", "short", "folder"))
        assert "3 of 4 clips were skipped" in warned
    for stage, width, said in (("detail", 96, "96x64: detail needs"), ("proxy", 48, "48x32: its proxy needs")):
        clip(tmp_path / "good.mp4", 2.5, size=(width, width // 3 * 2))
        with pytest.raises(InputError, match="no clip that can be used"):
            corpus.load_samples(session, stage, tmp_path, tmp_path / "work", console)
        assert f"good.mp4 is {said}" in capsys.readouterr().err


def test_footage_of_the_size_that_a_model_was_trained_at_is_large_enough(tmp_path, monkeypatch):
    """Of 854x480 too: a grid of whole tokens is a little larger."""
    monkeypatch.setattr(corpus, "encode_stream", lambda vae, frames: torch.zeros(1))
    monkeypatch.setattr(corpus, "read_clip", lambda *a, **k: iter(()))
    sizes = dict.fromkeys(preset_names(), ((832, 480), (854, 480), (480, 854), (1920, 1080)))
    sizes |= {"wan2.2-5b": ((1280, 704), (704, 1280), (1280, 720)), "tiny": ((384, 224), (400, 225))}
    for name, preset in ((name, load_preset(name)) for name in sizes):
        for size in sizes[name]:
            assert corpus.encode_for_proxy(None, preset, listed(tmp_path, size=size))
    preset = load_preset("wan2.1-1.3b")
    with pytest.raises(InputError, match="640x360: its proxy needs"):
        corpus.encode_for_proxy(None, preset, listed(tmp_path, size=(640, 360)))


def test_latents_are_made_once_a_content_and_caption_apart(session, tmp_path, console, monkeypatch):
    pairs(tmp_path, a=1.5, b=1.5)
    work = tmp_path / "work"
    first = corpus.load_samples(session, "proxy", tmp_path, work, console)
    for name in ("load_vae", "open_clip"):
        monkeypatch.setattr(corpus, name, lambda _: pytest.fail("loaded or opened again"))
    (tmp_path / "a.mp4").rename(tmp_path / "c.mp4")
    (tmp_path / "c.txt").write_text("told anew")
    again = corpus.load_samples(session, "proxy", tmp_path, work, console)
    assert [g[0]["caption"] for g in again] == ["clip b", "told anew"]
    assert torch.equal(again[1][0]["latents"], first[0][0]["latents"])
    monkeypatch.undo()
    [damaged, _] = sorted(work.glob("latents-*/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    mended = corpus.load_samples(session, "proxy", tmp_path, work, console)
    assert all(torch.equal(a[0]["latents"], b[0]["latents"]) for a, b in zip(again, mended, strict=True))
    monkeypatch.setattr(corpus, "RECIPE", corpus.RECIPE + 1)  # other cuts or crops are not these
    corpus.load_samples(session, "proxy", tmp_path, work, console)
    assert len(list(work.glob("latents-*/*.safetensors"))) == 4


@pytest.mark.parametrize("size", [(1280, 720), (720, 1280), (960, 720)])
@pytest.mark.parametrize("name", preset_names())
def test_a_proxy_is_trained_at_the_size_that_a_render_samples(name, size, tmp_path, monkeypatch):
    preset, seen = load_preset(name), []

    def read(source, fps, count, pixels):
        seen.append(pixels)
        return iter([torch.zeros(3, 1, 1)] * count)

    monkeypatch.setattr(corpus, "read_clip", read)
    monkeypatch.setattr(corpus, "encode_stream", lambda vae, frames: torch.zeros(1))
    corpus.encode_for_proxy(None, preset, listed(tmp_path, size=(2 * size[0], 2 * size[1])))
    grid = make_plan(Request(name, 2160 * size[0] // size[1], 2160, Fraction(3))).proxy.grid
    token = preset.geometry.token_pixels
    assert seen == [(grid.w * token, grid.h * token)]


def test_a_caption_that_cannot_be_read_is_named(tmp_path, console, capsys):
    pairs(tmp_path, a=0.5, b=0.5)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    assert [e.path.name for e in corpus.read_index(tmp_path, console)] == ["a.mp4"]
    assert "b.txt cannot be read" in capsys.readouterr().err


def test_an_empty_caption_is_named_and_skipped(session, tmp_path, console, capsys):
    pairs(tmp_path, a=2.1, b=2.1)
    (tmp_path / "b.txt").write_text(" \n")
    groups = corpus.load_samples(session, "proxy", tmp_path, tmp_path / "work", console)
    assert [g[0]["caption"] for g in groups] == ["clip a"] and "its caption is empty" in capsys.readouterr().err


def test_some_of_every_tenth_clip_are_held_out_whole():
    groups = [[{"n": (i, j)} for j in range(3)] for i in range(21)]
    trained, held_out = corpus.split_groups(groups)
    assert {s["n"][0] for s in held_out} == {9, 19} and not {9, 19} & {s["n"][0] for s in trained}


def test_a_clip_of_several_captions_or_names_is_trained_on_or_held_out(session, tmp_path, console):
    pairs(tmp_path, **{f"clip{i}": 1.5 for i in range(10)})
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "clip0.mp4").read_bytes())
    videos = [(f"clip{i}.mp4", f"{i} {told}") for told in "ab" for i in range(9, -1, -1)] + [("copy.mp4", "0 c")]
    index = tmp_path / "index.jsonl"
    index.write_text("".join(json.dumps({"video": v, "caption": c}) + "\n" for v, c in videos))
    trained, held_out = corpus.split_groups(corpus.load_samples(session, "proxy", index, tmp_path / "work", console))
    assert {s["caption"] for s in held_out} == {"0 a", "0 b", "0 c"}
    assert len({s["caption"] for s in trained}) == 18


def test_sizes_of_the_embedded_preset_are_those_it_was_trained_with():
    from atlasvid_cli import dataset
    from atlasvid_cli.presets import load_preset

    tiny = load_preset("tiny")
    assert tiny.training_crop == ((dataset.CLIP_FRAMES - 1) // 4 + 1, dataset.DETAIL_TOKENS)
    assert set(tiny.training_ratios) == set(dataset.DETAIL_RATIOS)
    assert (corpus.proxy_latents(tiny) - 1) * 4 + 1 == 49
    assert math.isclose(tiny.fps, dataset.FPS)
