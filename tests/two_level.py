"""Weights in two levels of scales for tests of kernels, beside the integers that they stand for."""

import torch
from test_cpu_int_linear import pack

from tersor.formats.integer import tile_rows
from tersor.formats.two_level import most_group_scale, reach, store


class Weight:
    """Random codes (or ``codes``) in reach of their zero points. ``integers`` int64 ``[n, k]``: (code - zero point) *
    group scale; ``truth`` float64: times the channel scales, which are 1 with ``unit``."""

    def __init__(self, n, k, bits, group, symmetric=True, unit=False, codes=None, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.n, self.k, self.bits, self.group, self.scale_dtype = n, k, bits, group, torch.uint8
        size = group if 0 < group < k else k
        groups = -(-k // size)
        most = most_group_scale(bits)
        self.group_scales = torch.randint(1, most + 1, (n, groups), generator=random)
        self.group_scales[:, ::2] = most
        zeros = torch.randint(0, 2**bits, (n, groups), generator=random)
        zeros[: n // 2, 0] = 0
        zeros[n // 2 :, 0] = 2**bits - 1
        if symmetric:
            zeros.fill_(2 ** (bits - 1))
        index = torch.arange(k) // size
        if codes is None:
            codes = torch.randint(0, 2**bits, (n, k), generator=random)
        limit, zero = reach(self.group_scales)[:, index], zeros[:, index]
        codes = torch.minimum(torch.maximum(codes.long(), zero - limit), zero + limit)
        self.codes = codes.to(torch.uint8)
        self.integers = (codes - zero) * self.group_scales[:, index]
        assert int(self.integers.abs().max()) <= 127
        self.channels = (torch.rand(n, 1, generator=random) * 0.01 + 0.001).bfloat16().float()
        if unit:
            self.channels.fill_(1)
        self.truth = self.integers.double() * self.channels.double()
        self.qweight = pack(self.codes, bits)
        self.scales = store(self.group_scales, self.channels)
        self.zeros = None if symmetric else tile_rows(zeros.to(torch.uint8))
