"""8-bit and 4-bit base weights, so that an adapter can be trained on a model that memory would not hold otherwise.

model = OPTForCausalLM.from_pretrained("facebook/opt-6.7b", dtype=torch.bfloat16)
quantize_base(model, bits=4)
model.add_lora(LoraConfig())

bitsandbytes computes: 8 bits with a scale for each row of a weight, and outliers of the input in half precision
(Dettmers et al. 2022, LLM.int8()); 4 bits of "NormalFloat" in blocks of 64 with a scale each (Dettmers et al. 2023).
"""

import importlib
from typing import Any

import torch
from torch import nn

from opt_common.errors import ConfigError, MissingFrameworkError
from opt_common.lora import check_no_adapter
from opt_common.params import head_of, parameter_table

INSTALL = "pip install 'opt-models[bitsandbytes]'"


def quantize_base(model: Any, *, bits: int) -> None:
    """Replace the decoder's linear layers by quantised ones, one at a time; embeddings, norms and the head stay.

    Such a model computes and generates, and takes an adapter, which trains. Its base weights do not train, are not
    written by `save_pretrained`, and take no merging: merge the adapter into the base model unquantised.

    Args:
        model: a model of this package, on the device where it will compute, without an adapter.
        bits: 8 or 4.

    Raises:
        ConfigError: for another number of bits, or a model with an adapter or with quantised weights.
        MissingFrameworkError: if bitsandbytes is not installed, or can't do it on this machine.
    """
    if bits not in (4, 8):
        raise ConfigError(f"bits is {bits!r}, expected 8 or 4.")
    check_no_adapter(model.lora_config)
    linear = [
        row.path("torch")[1 if model.head is None else 0 : -1]
        for row in parameter_table(model.config, head=model.head)
        if row.kind == "linear.weight" and head_of(row.name) is None
    ]
    if any(type(model.get_submodule(".".join(path)).weight) is not nn.Parameter for path in linear):
        raise ConfigError("The model's base weights are quantised. Load it anew to quantise it otherwise.")
    library = _bitsandbytes()
    _try_out(library, model.get_submodule(".".join(linear[0])), bits)
    for *modules, name in linear:
        module = model.get_submodule(".".join(modules))
        setattr(module, name, _quantized(library, getattr(module, name), bits).train(model.training))
    # What PEFT and accelerate look for.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = bits == 8, bits == 4


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise MissingFrameworkError(f"Quantised base weights need bitsandbytes: {INSTALL}.") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingFrameworkError(f"bitsandbytes is installed but can't be imported here: {error}.") from error


def _try_out(library: Any, layer: nn.Linear, bits: int) -> None:
    """One layer there and back, before any is replaced."""
    try:
        with torch.enable_grad():
            x = torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
            _quantized(library, layer, bits)(x.requires_grad_()).sum().backward()
    except (RuntimeError, NotImplementedError, ValueError, AttributeError, AssertionError) as error:
        raise MissingFrameworkError(
            f"bitsandbytes {library.__version__} can't compute with {bits}-bit weights of {layer.weight.dtype} on "
            f"{layer.weight.device}: {error}. Use another device, or the base model as it is."
        ) from error


def _quantized(library: Any, layer: nn.Linear, bits: int) -> nn.Module:
    """A layer of the same function, but for the rounding of its weight."""
    weight, has_bias = layer.weight.detach(), layer.bias is not None
    with torch.device("meta"):
        if bits == 8:
            quantized = library.nn.Linear8bitLt(
                layer.in_features, layer.out_features, bias=has_bias, has_fp16_weights=False, threshold=6.0
            )
        else:
            quantized = library.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=has_bias, quant_type="nf4", compute_dtype=weight.dtype
            )
    if bits == 8:
        quantized.weight = library.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        quantized.weight = library.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4", module=quantized
        )
        # On some processors evaluation would pack the weight in a way that has no gradients, for good.
        quantized.support_avx512bf16_for_cpu = False
    quantized.bias = layer.bias
    return quantized.to(weight.device)
