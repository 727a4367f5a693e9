"""What 8-bit and 4-bit base weights say where they can't be had; `make peft` tries them where they can."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from opt_common.errors import CheckpointError, ConfigError, MissingFrameworkError
from opt_common.lora import LoraConfig
from tests.adapters import BACKENDS
from tests.cases import config_of
from tests.conftest import adapter

pytestmark = pytest.mark.skipif("torch" not in BACKENDS, reason="base weights are quantised in PyTorch only")


@pytest.fixture
def model():
    return adapter("torch").build(config_of("pre_ln"))


def quantize_base(*arguments, **options):
    """Imported late: other backends' test runs have no PyTorch."""
    from opt_torch.bits_and_bytes import quantize_base

    return quantize_base(*arguments, **options)


def test_without_bitsandbytes_one_sentence_says_how_to_get_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingFrameworkError, match=r"pip install 'opt-models\[bitsandbytes\]'"):
        quantize_base(model, bits=8)


@pytest.mark.parametrize("bits", [4, 8])
def test_where_bitsandbytes_can_not_do_it_the_model_stays_as_it_is(model, monkeypatch, bits):
    library = ModuleType("bitsandbytes")
    library.__version__ = "0"

    def fail(*arguments, **options):
        raise RuntimeError("no kernel")

    library.nn = SimpleNamespace(Linear8bitLt=fail, Linear4bit=fail)
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    before = [type(module) for module in model.modules()]
    with pytest.raises(MissingFrameworkError, match=f"with {bits}-bit weights of torch.float32 on cpu: no"):
        quantize_base(model, bits=bits)
    assert [type(module) for module in model.modules()] == before


def test_what_can_not_be_quantised_is_refused(model):
    with pytest.raises(ConfigError, match="bits is 3"):
        quantize_base(model, bits=3)
    model.add_lora(LoraConfig())
    with pytest.raises(ConfigError, match="has an adapter"):
        quantize_base(model, bits=8)


def test_quantised_weights_are_neither_written_nor_merged_into(model, tmp_path):
    import torch

    layer = model.model.decoder.layers[1].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match="base weights are quantised"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    model.add_lora(LoraConfig(layers_to_transform=[1]))
    with pytest.raises(ConfigError, match="Quantised or packed base weights"):
        model.merge_adapter()
