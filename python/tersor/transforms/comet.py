"""COMET: four-bit inputs, and eight bits for the blocks of channels that outliers are gathered in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.integer import quantize_activations
from ..formats.mixed import BLOCK, MixedInputs
from ..methods.base import Method
from ..registry import register_method
from .group import Group
from .steps import Permute


@register_method("comet")
@dataclass(frozen=True)
class Comet(Method):
    """Fine-grained mixed-precision inputs, FMPQ (arXiv 2410.12168): ``comet:W4Ax``.

    Channels whose largest magnitude over the calibration data is more than ``ratio`` times the median channel's are
    outliers. A permutation gathers them in as few blocks of 128 channels as hold them, which get eight bits; all others
    get four. At most ``share`` of the blocks (one at least) are wide for outliers: the largest go first. Then blocks
    are widened, by the size of their channels, while rounding the sampled inputs changes the layers' output by more
    than ``limit`` (relative, root mean square; 1 widens none). The permutation runs online,
    as the input is rounded, and once for all layers that share it. Both rules are ours; the paper's scales are of 128
    channels (``W4Ax[act_group=128]``).

    ValueError for formats other than W?Ax.
    """

    ratio: float = 8.0
    share: float = 0.2
    limit: float = 1.0

    needs = frozenset({"abs_max", "inputs"})
    transforms = True
    chooses = False

    def __post_init__(self):
        if not self.ratio >= 1 or not 0 <= self.share <= 1:
            raise ValueError(f"options 'ratio' and 'share': found {self.ratio} and {self.share}, accepted are 1 or "
                             "more, and 0 to 1")
        if not self.limit > 0:
            raise ValueError(f"option 'limit': found {self.limit}, accepted are positive relative errors")

    def transform(self, group: Group) -> str:
        for name, fmt in group.formats.items():
            if not isinstance(fmt, MixedInputs):
                raise ValueError(f"comet: layer {name!r}: found format {fmt}, accepted are W?Ax such as W4Ax")
        most = self.require(group.stats, "abs_max").abs_max
        outliers = (most > self.ratio * most.median()).nonzero().flatten()
        blocks = -(-len(most) // BLOCK)
        wide = min(-(-len(outliers) // BLOCK), max(1, int(self.share * blocks)))
        order = most.argsort(descending=True, stable=True)
        gathered = wide
        if self.limit < 1:
            wide = self._widened(group, order, wide, blocks)
        for name in group.formats:
            group.stored[name] = {"block_bits": block_bits(blocks, wide)}
        if not wide:
            return "comet: no outlier channels"
        first = order[: len(outliers) if wide == gathered else BLOCK * wide].cpu()
        rest = torch.ones(len(most), dtype=torch.bool).index_fill_(0, first, False).nonzero().flatten()
        group.insert(Permute(torch.cat([first, rest]).to(most.device)))
        return f"comet: {len(outliers)} outlier channels, {wide} of {blocks} blocks in eight bits"

    def _widened(self, group: Group, order: Tensor, wide: int, blocks: int) -> int:
        """How many blocks get eight bits until rounding the inputs, in this order, costs the outputs no more than
        ``limit``."""
        fmt = next(iter(group.formats.values())).inner
        x = self.require(group.stats, "inputs").inputs.float()[:, order]
        w = torch.cat([group.weight(name).float() for name in group.formats])[:, order]
        most = self.limit * F.linear(x, w).norm()

        def change(bits: Tensor) -> Tensor:
            return quantize_activations(x, 4, fmt.act_group, fmt.act_clip, block_bits=bits.to(x.device)) - x

        narrow, exact = change(block_bits(blocks, 0)), change(block_bits(blocks, blocks))
        narrow[:, : BLOCK * wide] = exact[:, : BLOCK * wide]
        error = F.linear(narrow, w)
        while wide < blocks and error.norm() > most:
            block = slice(BLOCK * wide, BLOCK * (wide + 1))
            error += F.linear(exact[:, block] - narrow[:, block], w[:, block])
            wide += 1
        return wide


def block_bits(blocks: int, wide: int) -> Tensor:
    bits = torch.full((blocks,), 4, dtype=torch.uint8)
    bits[:wide] = 8
    return bits
