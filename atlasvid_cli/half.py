"""A second first level for the VAE's encoder, which takes frames half as large.

What a detail level starts from is enlarged at least twofold, so that it shows no more at its own size than at half of
it, and the first level does most of an encoder's work. This one is trained to give what that one gives
(`train_encoder.distil_entry`); deeper levels are the encoder's own.
"""

from copy import deepcopy
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import AvgDown3D, WanCausalConv3d
from torch import nn

Module = Any  # diffusers' modules, whose attributes are not typed


class HalfEncoder(nn.Module):
    """An encoder of Wan 2.2's kind whose first level keeps height and width, and is not trained yet."""

    def __init__(self, encoder: Module) -> None:
        super().__init__()
        old, first = encoder.conv_in, deepcopy(encoder.down_blocks[0])
        self.conv_in = WanCausalConv3d(old.in_channels, old.out_channels, (1, 3, 3), padding=(0, 1, 1))
        shortcut = first.avg_shortcut
        first.avg_shortcut = AvgDown3D(shortcut.in_channels, shortcut.out_channels, shortcut.factor_t, factor_s=1)
        first.downsampler.resample = nn.Identity()
        self.to(old.weight)
        self.down_blocks = nn.ModuleList([first, *encoder.down_blocks[1:]])
        self.mid_block, self.norm_out, self.conv_out = encoder.mid_block, encoder.norm_out, encoder.conv_out

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters that are not the encoder's, by name."""
        return {n: p for n, p in self.named_parameters() if n.startswith(("conv_in.", "down_blocks.0."))}
