"""LoRA on a compressed model, with the real peft."""

import pytest
import torch
from io_models import compressed, llama, logits, randomize
from peft import LoraConfig, get_peft_model

import tersor
from tersor.layer import _Compressed

peft = pytest.importorskip("peft")


@pytest.fixture
def unpacked(monkeypatch):
    """Counts how often a whole weight is dequantized."""
    counted = []
    original = _Compressed.dequantize
    monkeypatch.setattr(_Compressed, "dequantize", lambda self: counted.append(self) or original(self))
    return counted


def adapted(model, **options):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("spec", ["W4A16[group=32]", "W3A16[group=32,sym=false]"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_moves_the_adapters_alone(spec, dtype, unpacked):
    model = randomize(llama(dtype=dtype), spec)
    stored = {f"{name}.{key}": tensor.clone() for name, layer in compressed(model).items()
              for key, tensor in layer.tensors().items()}
    adapters = adapted(model)
    assert not unpacked  # looking at dtypes and devices does not compute weights
    names = {name for name, parameter in adapters.named_parameters() if parameter.requires_grad}
    assert names and all("lora_" in name for name in names)
    before = {name: parameter.detach().clone() for name, parameter in adapters.named_parameters()}
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in adapters.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        loss = adapters(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in adapters.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in names)
    now = {f"{name}.{key}": tensor for name, layer in compressed(model).items()
           for key, tensor in layer.tensors().items()}
    assert len(now) == len(stored)
    for (name, tensor), old in zip(now.items(), stored.values()):
        assert torch.equal(tensor, old), name


def test_gradient_is_that_of_the_dequantized_model():
    model = randomize(llama(dtype=torch.float32, layers=1), "W4A16[group=32]")
    twin = llama(dtype=torch.float32, layers=1)
    for name, layer in compressed(model).items():
        twin.get_submodule(name).weight.data = layer.dequantize()
    torch.manual_seed(3)
    first = adapted(model, init_lora_weights=False)
    torch.manual_seed(3)
    second = adapted(twin, init_lora_weights=False)
    tokens = torch.randint(0, 96, (1, 16), generator=torch.Generator().manual_seed(1))
    grads = []
    for adapters in (first, second):
        adapters(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in adapters.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-4 * grads[1][name].norm(), name


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_is_refused(safe_merge):
    model = randomize(llama(layers=1), "W4A16[group=32]")
    adapters = adapted(model, init_lora_weights=False)
    with torch.no_grad():
        before = adapters(TOKENS_OF).logits
    with pytest.raises(AttributeError, match="stored compressed; accepted are unmerged adapters"):
        adapters.merge_and_unload(safe_merge=safe_merge)
    with torch.no_grad():
        for module in adapters.modules():  # the first layer may have noted the attempt before it was refused
            if hasattr(module, "merged_adapters"):
                module.merged_adapters = []
        assert torch.equal(adapters(TOKENS_OF).logits, before)


TOKENS_OF = torch.tensor([[5, 9, 2]])


def test_adapters_are_saved_and_loaded_on_a_loaded_model(tmp_path):
    from peft import PeftModel

    model = randomize(llama(), "W4A16[group=32]")
    tersor.save(model, tmp_path / "q")
    adapters = adapted(model, init_lora_weights=False).eval()
    adapters.save_pretrained(tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size < 60_000
    again = PeftModel.from_pretrained(tersor.load(tmp_path / "q"), tmp_path / "lora").eval()
    assert torch.equal(logits(again), logits(adapters))


def test_writing_to_a_weight_is_refused():
    layer = randomize(llama(layers=1), "W4A16[group=32]").model.layers[0].mlp.up_proj
    w = layer.weight
    assert w.shape == (128, 64) and w.dtype == torch.bfloat16 and torch.equal(w + 0, layer.dequantize())
    for change in (lambda: w.add_(1), lambda: w.data.__class__ and setattr(w, "data", w + 1),
                   lambda: torch.nn.init.zeros_(w), lambda: w.__setitem__(0, 1), lambda: torch.add(w, 1, out=w),
                   lambda: setattr(layer, "weight", torch.zeros(128, 64))):
        with pytest.raises(AttributeError, match="stored compressed"):
            change()
