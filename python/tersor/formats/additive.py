"""AdditiveCodebook(M, B): groups of inputs as sums of M codebook vectors, the format of AQLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_format
from .base import Format, Params, Shape, Tensors, TensorSpec
from .bits import agrees, half, kmeans, nearest, pack_bits, packed_bytes, rounded, sample, unpack_bits

_CHUNK = 1 << 22  # entries of a score table held at a time


@dataclass(frozen=True)
class AdditiveCodebook(Format):
    """Every ``group`` weights along the input are ``scale[row] * sum_m codebook[m][code_m]`` (AQLM, arXiv 2401.06118).

    ``num_codebooks`` codebooks of ``2^nbits`` vectors; 16-bit codebooks and one 16-bit scale per row. Stored as
    ``codes`` uint8 ``[out, ceil(groups * num_codebooks * nbits / 8)]`` (dense, codebook fastest), ``codebooks``
    ``[num_codebooks, 2^nbits, group]``, ``scales [out, 1]``. `project` finds codes by beam search, and notes them in
    ``params["codes"] [out, groups, num_codebooks]``; values that the noted codes already give stay as they are.
    """

    num_codebooks: int = 2
    nbits: int = 8
    group: int = 8
    beam: int = 4

    def __post_init__(self):
        for name, low, high in (("num_codebooks", 1, 8), ("nbits", 1, 16), ("group", 1, 64), ("beam", 1, 256)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"found {name}={getattr(self, name)}, accepted are {low} to {high}")

    @property
    def block(self) -> int:
        return self.group

    def groups(self, columns: int) -> int:
        """Groups that cover ``columns`` inputs."""
        return math.ceil(columns / self.group)

    def vectors(self, w: Tensor) -> Tensor:
        """``[out, columns]`` as ``[out, groups, group]``, padded with zeros."""
        return F.pad(w, (0, -w.shape[1] % self.group)).unflatten(1, (-1, self.group))

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        """Scales are the rows' norms per group; the codebooks come from k-means on what the ones before leave."""
        store = half(dtype or w.dtype)
        scales = w.square().mean(1, keepdim=True).mul(self.group).sqrt().clamp_min(torch.finfo(store).smallest_normal)
        scales = rounded(scales, store)
        left, _ = sample(self.vectors(w / scales).flatten(0, 1), None, 2**self.nbits)
        codebooks = []
        for _ in range(self.num_codebooks):
            book = rounded(kmeans(left, 2**self.nbits), store)
            codebooks.append(book)
            left = left - book[nearest(left, book)]
        params = Params(dtype=store, scales=scales, codebooks=torch.stack(codebooks))
        params["codes"] = torch.zeros(w.shape[0], self.groups(w.shape[1]), self.num_codebooks, dtype=torch.int32)
        return params

    def decode(self, codes: Tensor, params: Mapping[str, Tensor], columns: int) -> Tensor:
        """Weights ``[out, columns]`` of ``codes [out, groups, num_codebooks]``."""
        books = params["codebooks"]
        total = books[0][codes[..., 0].long()]
        for m in range(1, self.num_codebooks):
            total = total + books[m][codes[..., m].long()]
        return total.flatten(1)[:, :columns] * params["scales"]

    def encode(self, w: Tensor, params: Params, *, importance: Tensor | None = None) -> Tensor:
        """Codes ``[out, groups, num_codebooks]`` by beam search, nearest in (weighted) squared distance."""
        target = self.vectors(w / params["scales"])
        if importance is None:
            return self._beam(target.flatten(0, 1), params["codebooks"]).unflatten(0, target.shape[:2])
        root = self.vectors(importance.to(w)[None])[0].sqrt()
        found = [self._beam(target[:, j] * root[j], params["codebooks"] * root[j]) for j in range(len(root))]
        return torch.stack(found, 1)

    def _beam(self, points: Tensor, books: Tensor) -> Tensor:
        size = books.shape[1]
        wide = min(self.beam if self.num_codebooks > 1 else 1, size)
        rows = max(1, _CHUNK // (size * wide))
        return torch.cat([self._beam_rows(part, books, wide) for part in points.split(rows)])

    def _beam_rows(self, points: Tensor, books: Tensor, wide: int) -> Tensor:
        codes = torch.zeros(len(points), 1, 0, dtype=torch.int32, device=points.device)
        left = points[:, None]  # [n, beam, group]
        for book in books:
            # |left - c|^2 for every beam and every entry
            score = left.square().sum(-1, keepdim=True) - 2 * left @ book.T + book.square().sum(1)
            best = score.flatten(1).topk(min(wide, score[0].numel()), largest=False).indices
            parent, entry = best // len(book), best % len(book)
            codes = torch.cat([codes.gather(1, parent[..., None].expand(-1, -1, codes.shape[2])),
                               entry[..., None].int()], 2)
            left = left.gather(1, parent[..., None].expand(-1, -1, left.shape[2])) - book[entry]
        return codes[:, 0]

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        first, count = lo // self.group, self.groups(w.shape[1])
        noted = params["codes"][:, first : first + count]
        value = self.decode(noted, params, w.shape[1])
        same = agrees(value, w)
        if same.all():
            return value
        keep = F.pad(same, (0, -w.shape[1] % self.group), value=True).unflatten(1, (-1, self.group)).all(-1)[..., None]
        codes = torch.where(keep, noted, self.encode(w, params, importance=importance))
        params["codes"][:, first : first + count] = codes
        return self.decode(codes, params, w.shape[1])

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        self.project(w_hat, params)
        return {
            "codes": pack_bits(params["codes"].flatten(1), self.nbits),
            "codebooks": params["codebooks"].to(params["dtype"]).contiguous(),
            "scales": params["scales"].to(params["dtype"]).contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        groups = self.groups(shape[1])
        codes = unpack_bits(tensors["codes"], self.nbits, groups * self.num_codebooks)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        params = {"codebooks": tensors["codebooks"].to(wide), "scales": tensors["scales"].to(wide)}
        return self.decode(codes.unflatten(1, (groups, self.num_codebooks)), params, shape[1]).to(dtype)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        count = self.groups(shape[1]) * self.num_codebooks
        return {
            "codes": TensorSpec((shape[0], packed_bytes(count, self.nbits)), torch.uint8),
            "codebooks": TensorSpec((self.num_codebooks, 2**self.nbits, self.group), half(dtype)),
            "scales": TensorSpec((shape[0], 1), half(dtype)),
        }

    def text(self) -> str:
        shown = [f"{key}={value}" for key, value, default in (("group", self.group, 8), ("beam", self.beam, 4))
                 if value != default]
        return f"{self.num_codebooks}x{self.nbits}" + (f"[{','.join(shown)}]" if shown else "")


@register_format(r"(\d+)x(\d+)", "2x8", "AQLM: sums of vectors from additive codebooks, 2 codebooks of 2^8 vectors")
def _additive(match, inner, *, group: int = 8, beam: int = 4):
    if inner is not None:
        raise ValueError(f"a codebook format holds values and nothing nests in it, found {inner}")
    return AdditiveCodebook(int(match[1]), int(match[2]), group, beam)
