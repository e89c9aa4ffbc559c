"""``tersor generate``: text from a model, as it comes."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .common import Threads, console_err, load_model, set_threads


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the text begins with.")],
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    threads: Threads = None,
) -> None:
    """Continue a prompt; the text goes to standard output, the speed to standard error."""
    import torch
    from transformers import TextStreamer

    set_threads(threads)
    loaded, tokenizer = load_model(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs.input_ids.numel():
        raise ValueError("prompt: found no tokens, accepted is some text")
    torch.manual_seed(seed)
    typer.echo(prompt, nl=False)
    started = time.perf_counter()
    ids = loaded.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling(loaded, tokenizer, temperature, top_p),
    )
    seconds = time.perf_counter() - started
    count = ids.shape[1] - inputs.input_ids.shape[1]
    console_err.print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", style="dim")


def sampling(model, tokenizer, temperature: float = 0.0, top_p: float = 1.0) -> dict:
    """Arguments of ``generate`` for a temperature; 0 is greedy. A model without a padding token gets one."""
    pad = model.generation_config.pad_token_id
    if pad is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if temperature == 0:
        return {"do_sample": False, "pad_token_id": pad}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "pad_token_id": pad}
