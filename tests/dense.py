"""DESIGN §4 word by word, to measure the model's forward by: both streams under full attention with masks, by
diffusers' modules, with nothing of the package's windows, positions or blocks."""

import math
from fractions import Fraction

import torch
from torch.nn.functional import scaled_dot_product_attention

from atlasvid_cli.shapes import Grid


def rotated(x, *places):
    """Wan's rotary embedding of x (L, heads, d) at places (L,) along t, h, w, from its definition."""
    dim = x.shape[-1]
    sizes = (dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6))
    angles = [
        at.double()[:, None] * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
        for at, size in zip(places, sizes, strict=True)
    ]
    turn = torch.polar(torch.tensor(1.0).double(), torch.cat(angles, 1))[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).float()


def windows_of(grid, shape, shifted):
    """The window (its first token and its end along each axis) of each token: (L, 3, 2)."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in (grid.t, grid.h, grid.w)), indexing="ij")
    axes = []
    for at, size, length in zip((t, h, w), (grid.t, grid.h, grid.w), shape, strict=True):
        number = math.ceil(size / length)  # as few as can be, each as long as the others but for rounding down
        borders = [math.floor(Fraction(size, number) * k) for k in range(number + 1)]
        if shifted and number > 1:
            borders = [0, *(math.floor(Fraction(size, number) * (k + Fraction(1, 2))) for k in range(number)), size]
        borders = torch.tensor(borders)
        after = torch.searchsorted(borders, at.flatten(), right=True)
        axes.append(torch.stack((borders[after - 1], borders[after]), -1))
    return torch.stack(axes, 1)


def seen_of_proxy(window, below, ratio, time_ratio, margin):
    """Whether a window [(first, end) along t, h, w] sees each token of the proxy: those over it and `margin` more, in a
    box of one size for all windows of its shape, moved inward at a border."""
    axes = []
    for (first, end), size, side, by in zip(
        window, (below.t, below.h, below.w), margin, (time_ratio, ratio, ratio), strict=True
    ):
        if by is time_ratio and len(axes) == 0:  # a proxy latent holds its group's end; the first one is a group itself
            over, count = (
                math.ceil(first / by),
                max(len({math.ceil(i / by) for i in range(s, s + end - first)}) for s in range(by + 1)),
            )
        else:
            over, count = math.floor(first / by), math.ceil((end - first) / by) + 1
        count = min(size, count + 2 * side)
        begin = min(max(0, over - side), size - count)
        at = torch.arange(size)
        axes.append((at >= begin) & (at < begin + count))
    return (axes[0][:, None, None] & axes[1][:, None] & axes[2]).flatten()


def dense_velocity(
    model, latents, timestep, padded, proxy, ratio, time_ratio, margin, proxy_window, centre, layouts, phase
):
    """Velocity (C, T, H, W) of `latents` guided by `proxy`."""
    streams = []
    for x, time in ((latents, timestep), (proxy, 0)):
        embedded = model.patch_embedding(x[None])[0]
        grid = Grid(*embedded.shape[1:])
        temb, modulations, text, _ = model.condition_embedder(torch.tensor([time]), padded, None)
        places = [p.flatten() for p in torch.meshgrid(*map(torch.arange, (grid.t, grid.h, grid.w)), indexing="ij")]
        streams.append((grid, embedded.flatten(1).mT, temb, modulations.unflatten(1, (6, -1)), text, places))
    (grid, x, temb, _, _, (t, h, w)), (below, y, *_, (pt, ph, pw)) = streams
    group = pt * time_ratio - (pt > 0) * ((time_ratio - 1) / 2 if centre else 0)
    seen_at = group, (ph + 0.5) * float(ratio) - 0.5, (pw + 0.5) * float(ratio) - 0.5
    states = [x, y]
    for i, block in enumerate(model.blocks):
        attn, heads = block.attn1, block.attn1.heads
        made = []
        for state, (_, _, _, modulations, _, _) in zip(states, streams, strict=True):
            shift, scale, *_ = (block.scale_shift_table + modulations)[0]
            normed = block.norm1(state) * (1 + scale) + shift
            q, k, v = attn.norm_q(attn.to_q(normed)), attn.norm_k(attn.to_k(normed)), attn.to_v(normed)
            made.append([part.unflatten(-1, (heads, -1)) for part in (q, k, v)])
        (q, k, v), (pq, pk, pv) = made
        boxes = windows_of(grid, *layouts[(i + phase) % len(layouts)])
        own = (boxes[:, None] == boxes[None]).all(-1).all(-1)
        guides = {key: seen_of_proxy(key, below, ratio, time_ratio, margin) for key in set(map(as_key, boxes))}
        mask = torch.cat((own, torch.stack([guides[as_key(box)] for box in boxes])), 1)
        keys = torch.cat((rotated(k, t, h, w), rotated(pk, *seen_at)))
        attended = attention(rotated(q, t, h, w), keys, torch.cat((v, pv)), mask)
        boxes = windows_of(below, proxy_window, shifted=i % 2 == 1)
        inside, stage_1 = (boxes[:, None] == boxes[None]).all(-1).all(-1), (pt * time_ratio, ph, pw)
        guided = attention(rotated(pq, *stage_1), rotated(pk, *stage_1), pv, inside)
        for n, (out, (_, _, _, modulations, text, _)) in enumerate(zip((attended, guided), streams, strict=True)):
            _, _, gate, shift, scale, ffn_gate = (block.scale_shift_table + modulations)[0]
            state = states[n] + attn.to_out[0](out) * gate
            state = state + block.attn2(block.norm2(state)[None], text, None, None)[0]
            states[n] = state + block.ffn(block.norm3(state) * (1 + scale) + shift) * ffn_gate
    shift, scale = (model.scale_shift_table + temb[:, None])[0]
    out = model.proj_out(model.norm_out(states[0]) * (1 + scale) + shift)
    out = out.view(grid.t, grid.h, grid.w, 2, 2, -1).permute(5, 0, 1, 3, 2, 4)
    return out.reshape(-1, grid.t, grid.h * 2, grid.w * 2)


def as_key(box):
    return tuple(map(tuple, box.tolist()))


def attention(q, k, v, mask):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask)[0].transpose(0, 1).flatten(1)
