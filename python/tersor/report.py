"""What was done to a model, layer by layer, and what was left alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from .formats.base import reference_kernel

if TYPE_CHECKING:
    from .evaluate import Quality


@dataclass
class Row:
    """One compressed layer.

    ``bits`` are stored bits per weight, everything counted; ``relative_error`` is ``|x (W - W_hat)^T| / |x W^T|`` on
    the calibration inputs where a method saw them and ``|W - W_hat| / |W|`` where it did not (``measured_on`` says
    which); ``kernel`` names what runs, or ``reference: why``.
    """

    name: str
    format: str
    method: str
    shape: tuple[int, ...]
    bits: float
    kernel: str
    relative_error: float | None = None
    measured_on: str = "weights"
    seconds: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    note: str = ""


@dataclass
class Report:
    """Rows of compressed layers, and ``kept``: name of each sizeable parameter left alone, with the reason."""

    rows: list[Row] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    kept_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    quality: Quality | None = None

    def add(self, row: Row) -> None:
        self.rows.append(row)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters before, compressed and kept ones."""
        return sum(row.bytes_before for row in self.rows) + self.kept_bytes

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows) + self.kept_bytes

    @property
    def bits(self) -> float:
        """Mean stored bits per weight over the compressed layers."""
        weights = sum(8 * row.bytes_after / row.bits for row in self.rows if row.bits)
        return 8 * sum(row.bytes_after for row in self.rows) / weights if weights else 0.0

    @property
    def fallbacks(self) -> list[Row]:
        """Rows that no kernel serves."""
        return [row for row in self.rows if reference_kernel(row.kernel)]

    def to_dict(self) -> dict:
        return asdict(self) | {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "bits": self.bits}

    def __str__(self) -> str:
        header = ("layer", "format", "method", "bits", "error", "seconds", "kernel", "note")
        lines = [header] + [
            (row.name, row.format, row.method, f"{row.bits:.2f}",
             "" if row.relative_error is None else f"{row.relative_error:.4f}",
             "" if row.seconds is None else f"{row.seconds:.2f}", row.kernel, row.note)
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        text += [f"kept: {name} ({why})" for name, why in self.kept.items()]
        text += [f"note: {note}" for note in self.notes]
        if self.quality is not None:
            text.append(f"against the original: KL {self.quality.kl:.4f} nats per token, the same most likely token at "
                        f"{self.quality.agreement:.1%} of positions")
        if self.bytes_before:
            text.append(f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB, "
                        f"{self.bits:.2f} bits per compressed weight")
        return "\n".join(text)
