"""The products and the attention of `opt_common.native` on TensorFlow's tensors.

XLA's programs call them. TensorFlow has an operation that becomes a part of such a program as it is written in XLA's
own language, StableHLO, which has a word for a call.
"""

# TensorFlow's and Keras' annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorflow as tf

from opt_common.native import (
    COLUMNS,
    DTYPES,
    MAX_ROWS,
    XLA_ATTENTION,
    XLA_PRODUCTS,
    Kind,
    is_decoding,
    library,
    xla_handlers,
)

STABLEHLO_DTYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "i8", "int32": "i32"}
"""What StableHLO calls dtypes."""

MODULE_VERSION = 9
"""The version of the operation that has the module as text and names of platforms."""


@functools.cache
def is_registered() -> bool:
    """Whether XLA's programs can call the library: there is one, and this XLA takes its functions."""
    loaded, handlers = library(), xla_handlers()
    if loaded is None:
        return False
    try:
        own = ctypes.CDLL(str(Path(tf.sysconfig.get_lib()) / "libtensorflow_cc.so.2"))
        # xla::ffi::GetXlaFfiApi()
        interface = own._ZN3xla3ffi12GetXlaFfiApiEv
        interface.restype = ctypes.c_void_p
        if any(loaded.opt_register_xla(interface(), name.encode(), address) for name, address in handlers.items()):
            return False
        with tf.init_scope():
            ones = tf.ones((1, 1))
            tf.function(lambda: product(Kind.FLOAT32_ROWS, ones, ones), jit_compile=True)()
    except (ImportError, OSError, AttributeError, tf.errors.OpError):
        # A TensorFlow that keeps these things elsewhere.
        return False
    return True


def is_called() -> bool:
    """Whether the library is called here: on CPUs alone."""
    devices = {device.device_type for device in tf.config.list_physical_devices()}
    return is_decoding.get() and devices == {"CPU"} and is_registered()


def suits(inputs: tf.Tensor) -> bool:
    """Whether the library is to multiply inputs (…, D): some rows of them."""
    *outer, _ = inputs.shape
    return is_called() and inputs.dtype.name in DTYPES and None not in inputs.shape and 0 < math.prod(outer) <= MAX_ROWS


def product(kind: Kind, inputs_MD: tf.Tensor, matrix: tf.Tensor, scales_F: tf.Tensor | None = None) -> tf.Tensor:
    """Inputs (M, D) times a matrix of a kind, (M, F) in the dtype of the inputs."""
    F = matrix.shape[1 if kind in COLUMNS else 0]
    outputs_MF = tf.TensorSpec((inputs_MD.shape[0], F), inputs_MD.dtype)
    arguments = [inputs_MD, matrix, *([] if scales_F is None else [scales_F])]
    return call(XLA_PRODUCTS[kind], arguments, [outputs_MF])[0]


def suits_attention(q_BTNH: tf.Tensor, past: tuple[tf.Tensor, tf.Tensor]) -> bool:
    """Whether the library is to compute attention: of one new token a row."""
    return (
        is_called()
        and q_BTNH.shape[1] == 1
        and all(None not in each.shape and 0 not in each.shape for each in (q_BTNH, *past))
        and all(each.dtype.name in DTYPES for each in (q_BTNH, *past))
    )


def attention(
    q_B1NH: tf.Tensor,
    k_B1NH: tf.Tensor,
    v_B1NH: tf.Tensor,
    bias_BN1S: tf.Tensor,
    past: tuple[tf.Tensor, tf.Tensor],
    offset: int | tf.Tensor,
) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
    """The context of scaled queries, (B, 1, N, H), and the buffers with the keys and values in slot `offset`."""
    results = [tf.TensorSpec(each.shape, each.dtype) for each in (q_B1NH, *past)]
    slot = tf.reshape(tf.cast(offset, tf.int32), ())
    arguments = [q_B1NH, k_B1NH, v_B1NH, *past, slot, bias_BN1S]
    context_B1NH, *present = call(XLA_ATTENTION, arguments, results, {3: 1, 4: 2})
    return context_B1NH, (present[0], present[1])


def call(
    name: str,
    arguments: Sequence[tf.Tensor],
    results: Sequence[tf.TensorSpec],
    aliases: Mapping[int, int] | None = None,
) -> list[tf.Tensor]:
    """What a function of the library's gives, results in the place of arguments where aliases say so."""
    from tensorflow.compiler.tf2xla.python import xla

    given, back = (", ".join(map(stablehlo_type, each)) for each in (arguments, results))
    names = ", ".join(f"%{index}" for index in range(len(arguments)))
    parameters = ", ".join(f"%{index}: {stablehlo_type(each)}" for index, each in enumerate(arguments))
    found = ", ".join(f"%found#{index}" for index in range(len(results)))
    places = ", ".join(
        f"#stablehlo.output_operand_alias<output_tuple_indices = [{result}], operand_index = {argument}, "
        "operand_tuple_indices = []>"
        for argument, result in (aliases or {}).items()
    )
    module = f"""
module @call {{
  func.func public @main({parameters}) -> ({back}) {{
    %found:{len(results)} = stablehlo.custom_call @{name}({names})
      {{api_version = 4 : i32, backend_config = {{}}, output_operand_aliases = [{places}]}} : ({given}) -> ({back})
    return {found} : {back}
  }}
}}
"""
    outputs = xla.call_module(
        arguments,
        version=MODULE_VERSION,
        module=module,
        Tout=[each.dtype for each in results],
        Sout=[each.shape for each in results],
        platforms=["CPU"],
    )
    return [tf.ensure_shape(output, result.shape) for output, result in zip(outputs, results, strict=True)]


def stablehlo_type(tensor: tf.Tensor | tf.TensorSpec) -> str:
    """The type of a tensor as StableHLO writes it."""
    return "tensor<" + "".join(f"{size}x" for size in tensor.shape) + STABLEHLO_DTYPES[tensor.dtype.name] + ">"
