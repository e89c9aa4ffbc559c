"""What a compressed model is worth: perplexity, divergence from the original, bytes and tokens per second.

Definitions, the same for every model measured:

- *Window*: the text is tokenized once, as a whole, with the tokenizer's own special tokens, and cut into consecutive
  windows of ``length`` tokens that do not overlap. An incomplete last window is dropped unless it is the only one.
- *Perplexity*: ``exp`` of the mean negative log-likelihood, in nats, of tokens ``1 .. length-1`` of every window given
  the tokens before them in the same window.
- *KL*: mean over the same positions of ``sum_v p(v) (log p(v) - log q(v))`` with ``p`` the original's next-token
  distribution and ``q`` the compressed model's; nats per token.
- *Agreement*: fraction of those positions where both models' most likely token is the same.
- *Bytes*: every distinct storage that a parameter or buffer of the model lives in, counted once.
- *Prefill*: tokens per second of one forward pass over a prompt, best of a few.
- *Decode*: one over the median time between two tokens of plain greedy ``generate``, batch 1, a short prompt.

Logits are reduced in float32 and summed in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Progress = Callable[[str, int, int], None]

_WARM_UP = 4  # tokens, the first of which is the prefill's
_ROWS = 64  # positions whose logits are reduced at once: bounds memory at large vocabularies


@dataclass(frozen=True)
class Quality:
    """Perplexity of a model on windows of text, and its distance to the original where there is one."""

    perplexity: float
    original_perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Speed:
    """Tokens per second."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Evaluation:
    """Everything `evaluate` measured. ``windows x window`` tokens were read, in arithmetic of ``dtype``."""

    quality: Quality
    windows: int
    window: int
    dtype: str
    bytes: int
    original_bytes: int | None
    speed: Speed | None
    original_speed: Speed | None

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def token_ids(tokenizer, text: str) -> Tensor:
    """Token ids ``[n]`` of the whole text, int64, with the tokenizer's default special tokens."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def windows(ids: Tensor, length: int, limit: int | None = None) -> Tensor:
    """The first ``limit`` (default: all) windows ``[count, length]`` of token ids ``[n]``.

    A text shorter than one window gives a single window of its own length; ValueError below two tokens.
    """
    if length < 2:
        raise ValueError(f"length: found {length}, accepted are windows of 2 tokens and more")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: found {limit}, accepted are 1 and more windows")
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"text: found {list(ids.shape)} tokens, accepted are 2 tokens and more")
    length = min(length, len(ids))
    count = len(ids) // length
    return ids[: (count if limit is None else min(limit, count)) * length].view(-1, length)


def perplexity(model: nn.Module, windows: Tensor, progress: Progress | None = None) -> float:
    """Perplexity of a causal language model on token windows ``[count, length]``, int64."""
    return compare(model, None, windows, progress).perplexity


@torch.no_grad()
def compare(model: nn.Module, original: nn.Module | None, windows: Tensor,
            progress: Progress | None = None) -> Quality:
    """Perplexity of both models, KL divergence and top-1 agreement on token windows ``[count, length]``, int64.

    Raises ValueError when the vocabularies differ or a model's logits are not finite.
    """
    nll = nll_original = kl = 0.0
    agree = 0
    with _evaluating(model), _evaluating(original):
        for i, window in enumerate(windows):
            logits = _logits(model, window, "model")
            reference = None if original is None else _logits(original, window, "original")
            if reference is not None and reference.shape != logits.shape:
                raise ValueError(f"vocabulary: found {logits.shape[-1]} logits, accepted are the original's "
                                 f"{reference.shape[-1]}")
            targets = window[1:]
            for start in range(0, len(targets), _ROWS):
                rows = slice(start, start + _ROWS)
                target = targets[rows, None].to(logits.device)
                log_q = logits[rows].float().log_softmax(-1)
                nll -= log_q.gather(1, target).double().sum().item()
                if reference is None:
                    continue
                log_p = reference[rows].to(log_q.device).float().log_softmax(-1)
                nll_original -= log_p.gather(1, target).double().sum().item()
                kl += (log_p.exp() * (log_p - log_q)).double().sum().item()
                agree += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
            if progress is not None:
                progress("perplexity", i + 1, len(windows))
    count = windows.shape[0] * (windows.shape[1] - 1)
    if original is None:
        return Quality(math.exp(nll / count))
    return Quality(math.exp(nll / count), math.exp(nll_original / count), kl / count, agree / count)


def model_bytes(model: nn.Module) -> int:
    """Bytes of every distinct storage behind the model's parameters and buffers."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        # A storage on the meta device has no address: its tensor stands for it.
        storages[(tensor.device, storage.data_ptr() or id(tensor))] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def prefill_speed(model: nn.Module, length: int = 512, repeats: int = 3) -> float:
    """Prompt tokens per second of one forward pass ``[1, length]``: the best of ``repeats``, after a short warm-up."""
    ids = _arbitrary_ids(model, length)
    with _evaluating(model):
        model(input_ids=ids[:, :16], use_cache=False)
        return length / min(_seconds(lambda: model(input_ids=ids, use_cache=False)) for _ in range(repeats))


def decode_speed(model: nn.Module, new_tokens: int = 48, prompt: int = 16, cache=None) -> float:
    """Tokens per second of plain greedy ``generate`` at batch 1: one over the median time between two tokens.

    ``cache`` is a ``past_key_values`` to generate with (default: the model's own).
    """
    clock = _Clock()
    ids = _arbitrary_ids(model, prompt)
    config = model.generation_config
    end, config.eos_token_id = config.eos_token_id, None  # no end before the count, at no cost per token
    try:
        with _evaluating(model):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens + _WARM_UP,
                           do_sample=False, streamer=clock, pad_token_id=0, past_key_values=cache)
    finally:
        config.eos_token_id = end
    gaps = [b - a for a, b in zip(clock.times, clock.times[1:])][_WARM_UP:]
    return 1 / statistics.median(gaps)


def evaluate(model: nn.Module, windows: Tensor, original: nn.Module | None = None, *,
             dtype: torch.dtype | None = None, speed: bool = True, new_tokens: int = 48, prefill: int = 512,
             progress: Progress | None = None) -> Evaluation:
    """Quality, bytes and speed of a model, and of the original beside it where given.

    ``windows [count, length]`` int64; ``dtype`` of the arithmetic of the quality part (default: see
    `arithmetic_dtype`); speeds are always taken in the model's own dtype. Models come back as they were.
    """
    dtype = dtype or arithmetic_dtype(model)
    speeds: list[Speed | None] = []
    for name, one in (("model", model), ("original", original)):
        if one is None or not speed:
            speeds.append(None)
            continue
        if progress is not None:
            progress(f"speed of the {name}", 0, 1)
        speeds.append(Speed(prefill_speed(one, prefill), decode_speed(one, new_tokens)))
        if progress is not None:
            progress(f"speed of the {name}", 1, 1)
    with computing_in(model, dtype), computing_in(original, dtype):
        quality = compare(model, original, windows, progress)
    return Evaluation(quality, *windows.shape, str(dtype).removeprefix("torch."), model_bytes(model),
                      None if original is None else model_bytes(original), *speeds)


def arithmetic_dtype(model: nn.Module) -> torch.dtype:
    """The model's dtype; float32 instead of 16 bits on a CPU without bf16 arithmetic, where those run many times
    slower in torch and no closer to the truth."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    return torch.float32 if on_cpu and dtype != torch.float32 and not cpu_has_bf16() else dtype


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX-512 BF16, AMX, or Arm's BF16 extension)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = set(file.read().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


@contextlib.contextmanager
def computing_in(model: nn.Module | None, dtype: torch.dtype) -> Iterator[None]:
    """The model in another dtype for a while, and afterwards exactly the tensors it had."""
    if model is None:
        yield
        return
    before = [(p, p.data) for p in model.parameters()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    was = next((p.dtype for p, _ in before if p.is_floating_point()), dtype)
    model.to(dtype)
    try:
        yield
    finally:
        model.to(was)
        for parameter, data in before:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


@contextlib.contextmanager
def _evaluating(model: nn.Module | None) -> Iterator[None]:
    training = model is not None and model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _logits(model: nn.Module, window: Tensor, name: str) -> Tensor:
    """Logits ``[length-1, vocabulary]`` that predict tokens 1 and on of ``window [length]``."""
    logits = model(input_ids=window[None].to(_device(model)), use_cache=False).logits[0, :-1]
    if not torch.isfinite(logits).all():
        raise ValueError(f"logits of the {name}: found NaN or Inf, accepted are finite values")
    return logits


def _arbitrary_ids(model: nn.Module, length: int) -> Tensor:
    """Token ids ``[1, length]`` that no special token is among, the same at every call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    low = min(8, vocabulary - 1)
    ids = torch.randint(low, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    return ids.to(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class _Clock:
    """A streamer that notes when each token arrives (the prompt comes first)."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
