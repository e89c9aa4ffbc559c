"""Small tools that reference formats share: dense bit packing, storage dtypes, k-means, nearest centroids."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20  # entries of a distance table held at a time


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., n]`` (any integer dtype, values below ``2^bits``) to uint8 ``[..., ceil(n * bits / 8)]``.

    Dense and little-endian: code ``i`` starts at bit ``i * bits`` of its row, low bit first, crossing bytes.
    """
    count = codes.shape[-1]
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    padded = torch.nn.functional.pad(codes.long(), (0, -count % 8)).unflatten(-1, (-1, 8))
    if bits < 8:  # eight codes are `bits` bytes and fit a word
        word = (padded << torch.arange(8, device=codes.device) * bits).sum(-1)
        out = word[..., None] >> torch.arange(bits, device=codes.device) * 8 & 255
    else:
        single = padded[..., None] >> torch.arange(bits, device=codes.device) & 1
        out = (single.flatten(-2).unflatten(-1, (-1, 8)) << torch.arange(8, device=codes.device)).sum(-1)
    return out.flatten(-2)[..., : packed_bytes(count, bits)].to(torch.uint8).contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """`pack_bits` undone: int64 codes ``[..., count]``."""
    if bits == 8:
        return packed[..., :count].long()
    whole = -(-count // 8) * bits
    padded = torch.nn.functional.pad(packed.long(), (0, whole - packed.shape[-1])).unflatten(-1, (-1, bits))
    if bits < 8:
        word = (padded << torch.arange(bits, device=packed.device) * 8).sum(-1)
        out = word[..., None] >> torch.arange(8, device=packed.device) * bits & 2**bits - 1
    else:
        single = padded[..., None] >> torch.arange(8, device=packed.device) & 1
        out = (single.flatten(-2).unflatten(-1, (8, bits)) << torch.arange(bits, device=packed.device)).sum(-1)
    return out.flatten(-2)[..., :count]


def half(dtype: torch.dtype | None) -> torch.dtype:
    """The 16-bit dtype in which codebooks, factors and outliers of a model of ``dtype`` are stored."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` rounded to ``dtype`` (saturating at its largest number), in their own dtype."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype).to(values.dtype)


def agrees(noted: Tensor, w: Tensor) -> Tensor:
    """Where ``w`` is the value noted for it, up to the rounding of a method that took differences with it."""
    return (noted - w).abs() <= 64 * torch.finfo(w.dtype).eps * w.abs().amax()


def sample(points: Tensor, weight: Tensor | None, k: int) -> tuple[Tensor, Tensor | None]:
    """At most 64 of ``points [n, d]`` for each of ``k`` centroids (4 where those are many), always the same ones."""
    limit = max(4 * k, min(64 * k, 1 << 15))
    if len(points) <= limit:
        return points, weight
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:limit].to(points.device)
    return points[chosen], None if weight is None else weight[chosen]


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index ``[n]`` of the nearest of ``centroids [k, d]`` for each of ``points [n, d]``, in squared distance."""
    half_norm = centroids.square().sum(1) / 2
    rows = max(1, _CHUNK // len(centroids))
    return torch.cat([torch.addmm(half_norm, part, centroids.T, alpha=-1).argmin(1) for part in points.split(rows)])


def kmeans(points: Tensor, k: int, weight: Tensor | None = None, iterations: int = 12, seed: int = 0) -> Tensor:
    """Centroids ``[k, d]`` of ``points [n, d]`` by Lloyd's algorithm, optionally with a ``weight [n]`` per point.

    Deterministic for a seed. Clusters that run empty are moved onto the points that are worst served. With no more
    points than clusters the points are the centroids and the rest are zero.
    """
    if len(points) <= k:
        return torch.cat([points, points.new_zeros(k - len(points), points.shape[1])])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(points), generator=generator)[:k].to(points.device)
    centroids = points[chosen].clone()
    weight = points.new_ones(len(points)) if weight is None else weight.to(points)
    for _ in range(iterations):
        index = nearest(points, centroids)
        mass = weight.new_zeros(k).index_add_(0, index, weight)
        total = torch.zeros_like(centroids).index_add_(0, index, points * weight[:, None])
        moved = torch.where(mass[:, None] > 0, total / mass.clamp_min(torch.finfo(mass.dtype).tiny)[:, None], centroids)
        empty = (torch.bincount(index, minlength=k) == 0).nonzero()[:, 0]
        if len(empty):
            cost = (points - centroids[index]).square().sum(1) * weight
            moved[empty] = points[cost.topk(len(empty)).indices]
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids
