"""The products and the attention in C, against NumPy and against what PyTorch computes without them."""

import importlib
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import opt_torch.native
from opt_common import native
from opt_common.native import COLUMNS, KINDS, MAX_ROWS, VERSION, XLA_ATTENTION, XLA_PRODUCTS, Kind, library
from opt_common.quantization import (
    GROUP_SIZE,
    INT8_LIMIT,
    OUTLIER,
    dequantize_groups,
    pack,
    quantize_groups,
    quantize_rows,
)
from opt_common.tokenizer import OPTTokenizer
from opt_torch import OPTConfig, OPTForCausalLM
from opt_torch.layers import Linear
from opt_torch.quantized import Int4Linear, Int8Linear, KernelInt4Linear

SOURCES = Path(native.__file__).parent
needs_library = pytest.mark.skipif(library() is None, reason="built without a C compiler, or switched off")

SHAPES = [(1, 1, 1), (1, 64, 16), (1, 768, 515), (2, 37, 19), (3, 130, 1030), (8, 96, 257), (16, 8, 64), (33, 64, 50)]
"""Rows, inputs and outputs of products: one thread's and many, whole vectors and rests, more than MAX_ROWS."""


def test_numbers_of_the_header() -> None:
    header = (SOURCES / "products.h").read_text()
    kinds = header[header.index("FLOAT32_ROWS,") : header.index("KINDS\n")]
    assert re.findall(r"^\s*([A-Z0-9_]+),", "    " + kinds, re.MULTILINE) == [kind.name for kind in Kind]
    assert f"#define MAX_ROWS {MAX_ROWS}\n" in header
    assert f"#define OUTLIER {OUTLIER}f\n" in header
    assert f"opt_version(void) {{ return {VERSION}; }}" in (SOURCES / "products.c").read_text()
    assert f"/ {INT8_LIMIT} >" in (SOURCES / "one_set.h").read_text()
    assert f"#define GROUP {GROUP_SIZE}\n" in (SOURCES / "product.h").read_text()


def product(
    kind: Kind,
    inputs: np.ndarray,
    matrix: np.ndarray,
    F: int,
    scales: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    threads: int = 2,
) -> np.ndarray:
    """What the library says, in the dtype of the inputs."""
    M, D = inputs.shape
    outputs = np.full((M, F), 7, dtype=inputs.dtype)
    half = int(inputs.dtype == ml_dtypes.bfloat16)
    loaded = library()
    assert loaded is not None
    result = loaded.opt_product(
        *(kind, threads, None, M, D, F),
        *(inputs.ctypes.data, half),
        *(matrix.ctypes.data, None if scales is None else scales.ctypes.data),
        *(None if bias is None else bias.ctypes.data, int(bias is not None and bias.dtype == ml_dtypes.bfloat16)),
        *(outputs.ctypes.data, half),
    )
    assert result == 0
    return outputs


def rounded(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = np.maximum(np.abs(inputs).max(axis=1, keepdims=True) / np.float32(INT8_LIMIT), np.finfo(np.float32).tiny)
    return np.rint(inputs / steps).astype(np.float64), steps.astype(np.float64)


def expected(kind: Kind, inputs: np.ndarray, weight_FD: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """What a matrix is stored as, and the product in float64."""
    wide = inputs.astype(np.float64)
    if kind in (Kind.FLOAT32_ROWS, Kind.BFLOAT16_ROWS):
        stored = weight_FD if kind == Kind.FLOAT32_ROWS else weight_FD.astype(ml_dtypes.bfloat16)
        return (stored,), wide @ stored.T.astype(np.float64)
    if kind in COLUMNS:
        stored = weight_FD.T.astype(np.float32 if kind == Kind.FLOAT32_COLUMNS else ml_dtypes.bfloat16)
        return (np.ascontiguousarray(stored),), wide @ stored.astype(np.float64)
    if kind == Kind.INT4_ROWS:
        codes_FD, scales_FG, offsets_FG = quantize_groups(weight_FD)
        matrix_FD = dequantize_groups(codes_FD, scales_FG, offsets_FG).astype(np.float64)
        groups_FG2 = np.stack((scales_FG, offsets_FG), axis=-1).astype(ml_dtypes.bfloat16)
        return (pack(codes_FD), groups_FG2), inputs.astype(ml_dtypes.bfloat16).astype(np.float64) @ matrix_FD.T
    codes_FD, scales_F = quantize_rows(weight_FD)
    product_MF = wide @ codes_FD.T.astype(np.float64)
    if kind == Kind.INT8_DYNAMIC_ROWS:
        single = inputs.astype(np.float32)
        large, large_steps = rounded(np.where(np.abs(single) > OUTLIER, single, 0))
        rest, steps = rounded(single - (large * large_steps).astype(np.float32))
        product_MF = (large @ codes_FD.T) * large_steps + (rest @ codes_FD.T) * steps
    return (codes_FD, scales_F), product_MF * scales_F


@pytest.fixture(params=["plain", "AVX2", "AVX-512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """No better instructions than these."""
    loaded = library()
    assert loaded is not None
    loaded.opt_limit_set(["plain", "AVX2", "AVX-512"].index(request.param))
    yield
    loaded.opt_limit_set(2)


@needs_library
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("kind", Kind)
def test_products(kind: Kind) -> None:
    numbers = np.random.default_rng(kind)
    for M, D, F in SHAPES:
        if kind == Kind.INT4_ROWS:
            D = GROUP_SIZE * (1 + D // GROUP_SIZE)  # noqa: PLW2901
        weight_FD = numbers.standard_normal((F, D), dtype=np.float32)
        inputs = numbers.standard_normal((M, D), dtype=np.float32)
        inputs[-1, -1] = 9.5
        bias_F = numbers.standard_normal(F, dtype=np.float32)
        for dtype, tolerance in ((np.float32, 2e-6), (ml_dtypes.bfloat16, 2**-8)):
            given = inputs.astype(dtype)
            stored, product_MF = expected(kind, given, weight_FD)
            for bias in (None, bias_F, bias_F.astype(ml_dtypes.bfloat16)):
                for threads in (1, 2, 3):
                    found_MF = product(kind, given, stored[0], F, *stored[1:], bias=bias, threads=threads)
                    wanted_MF = product_MF if bias is None else product_MF + bias.astype(np.float64)
                    error = np.abs(found_MF.astype(np.float64) - wanted_MF)
                    assert error.max() <= tolerance * np.abs(wanted_MF).max() + 1e-30, (M, D, F, dtype, threads)


@needs_library
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_no_number_stays_none(number: float) -> None:
    inputs = np.ones((3, 70), np.float32)
    inputs[1, 69] = number
    weight_FD = np.random.default_rng(0).standard_normal((20, 70), dtype=np.float32)
    for kind in (Kind.FLOAT32_ROWS, Kind.FLOAT32_COLUMNS, Kind.INT8_DYNAMIC_ROWS):
        stored, _ = expected(kind, np.ones_like(inputs), weight_FD)
        found_MF = product(kind, inputs, stored[0], 20, *stored[1:])
        assert not np.isfinite(found_MF[1]).any()
        assert np.isfinite(found_MF[[0, 2]]).all()


def wrong_products(seed: int) -> int:
    """How many of some products are wrong."""
    numbers = np.random.default_rng(seed)
    weight_FD = numbers.standard_normal((300, 64), dtype=np.float32)
    inputs = numbers.standard_normal((2, 64), dtype=np.float32)
    found = [product(Kind.FLOAT32_ROWS, inputs, weight_FD, 300, threads=3) for _ in range(200)]
    return sum(bool(np.abs(each - inputs @ weight_FD.T).max() > 1e-4) for each in found)


@needs_library
def test_many_callers() -> None:
    """Products of several threads at the same time are right."""
    wrong: list[int] = []
    callers = [threading.Thread(target=lambda seed=seed: wrong.append(wrong_products(seed))) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == [0] * 4


@needs_library
def test_a_child_process() -> None:
    """A process that is forked from one whose threads have worked has none of them, and starts its own."""
    script = """
import os
from tests.test_native_products import wrong_products
assert wrong_products(0) == 0
child = os.fork()
if child == 0:
    os._exit(wrong_products(1))
assert os.waitpid(child, 0)[1] == 0
"""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=120)


@needs_library
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    for B, N, H, S, offset in ((1, 12, 64, 40, 0), (1, 3, 20, 700, 699), (5, 12, 64, 40, 33), (2, 1, 7, 9, 4)):
        past = tuple(torch.randn(B, S, N, H) for _ in range(2))
        before = [buffer.clone() for buffer in past]
        # Queries, keys and values as parts of one product, as the model has them.
        q_B1NH, k_B1NH, v_B1NH = torch.randn(B, 1, 3, N, H).to(dtype).unbind(2)
        q_B1NH = q_B1NH.contiguous()
        bias_B11S = torch.where(torch.rand(B, 1, 1, offset + 1) < 0.3, torch.finfo(dtype).min, 0.0).to(dtype)
        bias_B11S[..., -1] = 0
        for bias in (None, bias_B11S, bias_B11S[:1]):
            with torch.no_grad():
                assert opt_torch.native.suits_attention(q_B1NH, k_B1NH, v_B1NH, bias, past)
                found = opt_torch.native.attention(q_B1NH, k_B1NH, v_B1NH, bias, past, offset)
            for buffer, old, new in zip(past, before, (k_B1NH, v_B1NH), strict=True):
                assert torch.equal(buffer[:, offset], new[:, 0].float())
                assert torch.equal(buffer[:, offset + 1 :], old[:, offset + 1 :])
            keys, values = (buffer[:, : offset + 1].double() for buffer in past)
            scores = torch.einsum("btnh,bsnh->bnts", q_B1NH.double(), keys)
            scores = scores if bias is None else scores + bias.double()
            wanted = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), values)
            assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@needs_library
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_prompt(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = library()
    assert loaded is not None
    monkeypatch.setattr(opt_torch.native, "PROMPT_ATTENTION", loaded.opt_prompt_attention)
    torch.manual_seed(3)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    for B, T, N, H in ((1, 2, 1, 8), (3, 16, 2, 20), (2, 33, 12, 64), (1, 70, 3, 7), (5, 31, 2, 80), (1, 300, 1, 128)):
        # Parts of one product, as the model has them; scores that differ enough for some weights to be nothing.
        q_BTNH, k_BTNH, v_BTNH = torch.randn(B, T, 3, N, H).to(dtype).unbind(2)
        q_BTNH = (4 * H**-0.5 * q_BTNH).contiguous()
        with torch.no_grad():
            assert opt_torch.native.suits_prompt(q_BTNH, k_BTNH, v_BTNH)
            found = opt_torch.native.prompt_attention(q_BTNH, k_BTNH, v_BTNH)
        scores = torch.einsum("btnh,bsnh->bnts", q_BTNH.double(), k_BTNH.double())
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        wanted = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), v_BTNH.double())
        assert found.dtype is dtype
        assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max(), (B, T, N, H)


@needs_library
def test_which_prompts_the_library_attends_to(monkeypatch: pytest.MonkeyPatch) -> None:
    if opt_torch.native.PROMPT_ATTENTION is None:
        pytest.skip("this processor has nothing that the library is faster by")
    calls: list[int] = []
    real = opt_torch.native.prompt_attention
    monkeypatch.setattr(opt_torch.native, "prompt_attention", lambda *args: calls.append(1) or real(*args))
    model = tiny()
    layers = model.config.num_hidden_layers
    ids = torch.randint(4, 200, (2, 9))

    def called(**options: Any) -> int:
        calls.clear()
        model(input_ids=ids, **options)
        return len(calls)

    with torch.no_grad():
        assert called() == layers
        padded = torch.ones_like(ids)
        padded[0, 0] = 0
        assert called(attention_mask=padded) == 0
        assert called(output_attentions=True) == 0
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        calls.clear()
        model(input_ids=ids[:, 4:], past_key_values=cache)
        assert len(calls) == 0
    assert called() == 0  # gradients are wanted
    calls.clear()
    model.generate(ids, max_new_tokens=2)
    assert len(calls) == layers


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt_torch.native, "PROMPT_ATTENTION", None)
    monkeypatch.setattr(opt_torch.native, "PRODUCT", None)
    monkeypatch.setattr(opt_torch.native, "ATTENTION", None)


def tiny(**options: object) -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(**sizes, word_embed_proj_dim=64, max_position_embeddings=64)
    return OPTForCausalLM(config, **options).eval()  # pyright: ignore[reportArgumentType]


@needs_library
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_takes_it(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """The same tokens with and without, and nothing but the library multiplies where a token is decoded."""
    model = tiny()
    ids = torch.randint(5, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if padded else 1
    calls: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))  # pyright: ignore

    found = model.generate(ids, mask, max_new_tokens=20, do_sample=False)
    with monkeypatch.context() as patch:
        # A recorder is one that is to see all; here it is to see what is left.
        patch.setattr(opt_torch.native, "watched", lambda: False)
        with Recorder(), torch.no_grad():
            cache = model(ids[:1]).past_key_values
            calls.clear()
            model(ids[:1, :1], past_key_values=cache)
    assert not [call for call in calls if re.search(r"mm|linear|attention|einsum", call)], calls
    without_library(monkeypatch)
    assert torch.equal(found, model.generate(ids, mask, max_new_tokens=20, do_sample=False))


@needs_library
def test_who_keeps_a_record_sees_all() -> None:
    """Derivatives of both modes, compilers, tracers, counters of operations and vmap get PyTorch's own product."""
    layer = Linear(64, 32)
    inputs = torch.randn(3, 64)
    plain = functional.linear(inputs, layer.weight, layer.bias)
    assert layer(inputs).requires_grad
    layer(inputs).sum().backward()
    assert layer.weight.grad is not None

    seen: list[object] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
            seen.append(func)
            return func(*args, **(kwargs or {}))  # pyright: ignore

    with torch.no_grad():
        with Recorder():
            layer(inputs)
        assert seen
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(layer, inputs, check_trace=False)
        many = torch.vmap(layer)(inputs)
        others = torch.randn(2, 64)
        assert torch.allclose(traced(others), functional.linear(others, layer.weight, layer.bias), atol=1e-6)
    assert torch.allclose(many, plain, atol=1e-6)
    for rows in (3, 40):
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            inputs, tangent = torch.randn(2, rows, 64)
            found = forward_ad.unpack_dual(layer(forward_ad.make_dual(inputs, tangent))).tangent
            assert found is not None
            assert torch.allclose(found, functional.linear(tangent, layer.weight), atol=1e-6)
    quantised = Int8Linear(64, 32, use_bias=True, dynamic=True, device="cpu", dtype=None)
    quantised.assign_rounded(layer.weight.detach().numpy(), "cpu", torch.float32)
    quantised(inputs).sum().backward()
    assert quantised.bias is not None
    assert quantised.bias.grad is not None


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_class", [Int4Linear, KernelInt4Linear, Int8Linear])
def test_every_dtype(layer_class: type, dtype: torch.dtype) -> None:
    weight_FD = np.random.default_rng(3).standard_normal((48, 64), dtype=np.float32)
    options = {"dynamic": False} if layer_class is Int8Linear else {}
    layer = layer_class(64, 48, use_bias=True, device="cpu", dtype=dtype, **options)
    layer.assign_rounded(weight_FD, "cpu", dtype)
    inputs = torch.randn(2, 64).to(dtype)
    with torch.no_grad():
        found = layer(inputs)
        wanted = inputs.double() @ layer.weight.double().T
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()


def test_inputs_that_suit_it_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views, empty inputs and prompts come out as they do without a library."""
    layer = Linear(64, 32).requires_grad_(False)
    given: list[Tensor] = [torch.randn(2, 128)[:, ::2], torch.randn(0, 64), torch.randn(64), torch.randn(40, 64).T.T]
    found = [layer(each) for each in given]
    without_library(monkeypatch)
    for each, outputs in zip(given, found, strict=True):
        assert torch.allclose(outputs, layer(each), atol=1e-6)
        assert outputs.shape == (*each.shape[:-1], 32)


def test_switched_off() -> None:
    """OPT_NATIVE=0 leaves the library out, and few bits in PyTorch hold to their rules without it."""
    environment = {**os.environ, "OPT_NATIVE": "0"}
    script = "from opt_torch import native; assert native.PRODUCT is None"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    tests = [str(Path(__file__).with_name("test_quantization.py")), "-k", "torch and rules"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


class Xla:
    """JAX or TensorFlow, whose programs call the library."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = {"flax": "FlaxOPTForCausalLM", "tf": "TFOPTForCausalLM"}[name]
        self.native = importlib.import_module(f"opt_{name}.native")
        self.layers = importlib.import_module(f"opt_{name}.layers")
        self.quantized = importlib.import_module(f"opt_{name}.quantized")

    def array(self, numbers: np.ndarray) -> Any:
        import jax.numpy as jnp
        import tensorflow as tf

        return jnp.asarray(numbers) if self.name == "flax" else tf.constant(numbers)

    def compiled(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
        """What a compiled function gives, in NumPy, and its program as text."""
        import jax
        import tensorflow as tf

        if self.name == "flax":
            program = jax.jit(function)
            return jax.tree.map(np.asarray, program(*arguments)), program.lower(*arguments).as_text()
        program = tf.function(function, jit_compile=True, autograph=False)
        found = tf.nest.map_structure(np.asarray, program(*arguments))
        return found, program.experimental_get_compiler_ir(*arguments)(stage="hlo")

    def decoding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return native.decoding()(function)

    def matrix_product(self, columns: bool) -> Callable[[Any, Any], Any]:
        if self.name == "tf":
            return lambda inputs, matrix: self.layers.multiply(inputs, matrix, transposed=not columns)
        axes = (((2,), (0 if columns else 1,)), ((), ()))
        return lambda inputs, matrix: self.layers.multiply(inputs, matrix, axes)


@pytest.fixture(params=["flax", "tf"])
def xla(request: pytest.FixtureRequest) -> Xla:
    found = Xla(request.param)
    assert found.native.is_registered()
    return found


@needs_library
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_xla_multiplies_by_it(xla: Xla, rows: int) -> None:
    """Of few rows, and only where something is decoded; what it gives is what XLA gives."""
    numbers = np.random.default_rng(rows)
    inputs = numbers.standard_normal((rows, 1, 70), dtype=np.float32)
    weight_FD = numbers.standard_normal((33, 70), dtype=np.float32)
    for (dtype, columns), kind in KINDS.items():
        stored = np.ascontiguousarray(weight_FD.T if columns else weight_FD).astype(ml_dtypes.finfo(dtype).dtype)
        given = xla.array(inputs.astype(stored.dtype)), xla.array(stored)

        product = xla.matrix_product(columns)
        wanted, plain = xla.compiled(product, *given)
        found, program = xla.compiled(xla.decoding(product), *given)
        assert XLA_PRODUCTS[kind] not in plain
        assert (XLA_PRODUCTS[kind] in program) == (rows <= MAX_ROWS)
        assert found.shape == wanted.shape == (rows, 1, 33)
        assert found.dtype == stored.dtype
        tolerance = (2e-6 if dtype == "float32" else 2**-7) * np.abs(wanted.astype(np.float32)).max()
        np.testing.assert_allclose(found.astype(np.float32), wanted.astype(np.float32), rtol=0, atol=tolerance)


@needs_library
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_xla_multiplies_integers_by_it(xla: Xla, rows: int) -> None:
    numbers = np.random.default_rng(rows)
    inputs = numbers.standard_normal((rows, 70), dtype=np.float32)
    inputs[0, 3] = 20
    given = [xla.array(each) for each in (inputs, *quantize_rows(numbers.standard_normal((33, 70), dtype=np.float32)))]
    wanted, plain = xla.compiled(xla.quantized.int8_product, *given)
    found, program = xla.compiled(xla.decoding(xla.quantized.int8_product), *given)
    name = XLA_PRODUCTS[Kind.INT8_DYNAMIC_ROWS]
    assert name not in plain
    assert (name in program) == (rows <= MAX_ROWS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("buffers", ["float32", "bfloat16"])
def test_xla_attends_by_it(xla: Xla, dtype: str, buffers: str) -> None:
    """The context and the buffers of one new token, and buffers that stay as they were."""
    numbers = np.random.default_rng(5)
    for B, N, H, S, offset in ((1, 12, 64, 40, 0), (1, 3, 20, 700, 699), (5, 12, 64, 40, 33), (2, 1, 7, 9, 4)):
        kind, buffer_kind = ml_dtypes.finfo(dtype).dtype, ml_dtypes.finfo(buffers).dtype
        new = [numbers.standard_normal((B, 1, N, H)).astype(kind) for _ in range(3)]
        past = [numbers.standard_normal((B, S, N, H)).astype(buffer_kind) for _ in range(2)]
        masked = (numbers.random((B, 1, 1, S)) < 0.3) | (np.arange(S) > offset)
        masked[..., offset] = False
        bias = np.where(masked, float(ml_dtypes.finfo(dtype).min), 0).astype(kind)
        for given in (bias, bias[:1]):

            def attend(q: Any, k: Any, v: Any, keys: Any, values: Any, bias: Any, offset: Any) -> Any:
                assert xla.native.suits_attention(q, (keys, values))
                return xla.native.attention(q, k, v, bias, (keys, values), offset)

            arguments = [xla.array(each) for each in (*new, *past, given, np.int32(offset))]
            (context, present), program = xla.compiled(xla.decoding(attend), *arguments)
            assert XLA_ATTENTION in program
            expected_past = [buffer.copy() for buffer in past]
            for buffer, old, found, token in zip(expected_past, arguments[3:5], present, new[1:], strict=True):
                np.testing.assert_array_equal(np.asarray(old), buffer)
                buffer[:, offset] = token[:, 0]
                np.testing.assert_array_equal(found, buffer)
            q, keys, values = (each.astype(np.float64) for each in (new[0], *expected_past))
            scores = np.einsum("btnh,bsnh->bnts", q, keys) + given.astype(np.float64)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            wanted = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), values)
            tolerance = (2e-6 if dtype == "float32" else 2**-8) * np.abs(wanted).max()
            np.testing.assert_allclose(context.astype(np.float64), wanted, rtol=0, atol=tolerance)


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_decodes_the_same_text(xla: Xla, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of the bundled model with the library and without, padding and all."""
    model_class = getattr(importlib.import_module(f"opt_{xla.name}"), xla.model)
    called: list[object] = []
    product = xla.native.product

    def recorded(*arguments: Any) -> Any:
        called.append(arguments[0])
        return product(*arguments)

    def text() -> list[str]:
        model = model_class.from_pretrained("opt-tiny", dtype=dtype)
        return model.generate_text(["Once upon a time", "The"], tokenizer, max_new_tokens=24, do_sample=False)

    tokenizer = OPTTokenizer.from_pretrained("opt-tiny")
    monkeypatch.setattr(xla.native, "product", recorded)
    found = text()
    assert set(called) == {kind for (name, _), kind in KINDS.items() if name == dtype}
    monkeypatch.setattr(xla.native, "is_called", lambda: False)
    if xla.name == "flax":
        import jax

        jax.clear_caches()
    called.clear()
    assert text() == found
    assert not called
