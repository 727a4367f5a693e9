"""Write `docs/parameters.md` from the parameter table; with --check, exit with 1 if it is not current."""

import argparse
import sys
from pathlib import Path

from opt_common.config import OPTConfig
from opt_common.params import ARCHITECTURES, Parameter, Scheme, count_parameters, head_of, parameter_table

PAGE = Path(__file__).with_name("parameters.md")

INTRODUCTION = """\
# Parameters

<!-- Written by docs/make_parameters.py from opt_common/params.py; change it there. -->

`opt_common.params.parameter_table(config)` is the one list of a model's tensors; this page is printed from it.
The canonical name and layout are PyTorch's, which are Hugging Face's. In Keras and in Flax NNX a tensor sits at the
same path under another leaf name; `ᵀ` says that it is stored transposed there.

Axes: `V` vocab_size, `E` word_embed_proj_dim, `D` hidden_size, `F` ffn_dim, `P` max_position_embeddings + 2 rows of
positions, `C` num_labels, `2` the start and the end of an answer. A linear `weight` is (out, in).

| what the config says | what it does to the table |
| --- | --- |
| `word_embed_proj_dim` ≠ `hidden_size` | adds `project_in` and `project_out`, which never have a bias |
| `do_layer_norm_before` and not `_remove_final_layer_norm` | adds the decoder's `final_layer_norm` |
| `enable_bias` false | removes every `bias` of a linear layer |
| `layer_norm_elementwise_affine` false | removes every tensor of a layer norm |
| `tie_word_embeddings` false | adds `lm_head.weight`; a tied head is no parameter |
| `id2label`, `num_labels` | the rows of `score.weight` |
"""


def leaf(parameter: Parameter, scheme: Scheme) -> str:
    """The tensor's last name in a framework, with the mark of a transposed one."""
    return f"`{parameter.leaf(scheme)}`" + ("ᵀ" if parameter.transposed(scheme) else "")


HEADER = ("| canonical name | axes | shape | PyTorch | Keras | NNX |", "| --- | --- | --- | --- | --- | --- |")


def row(parameter: Parameter) -> str:
    """One tensor's row of a table."""
    shape = " × ".join(str(length) for length in parameter.shape)
    leaves = " | ".join(leaf(parameter, scheme) for scheme in ("torch", "keras", "nnx"))
    return f"| `{parameter.name}` | {', '.join(parameter.axes)} | {shape} | {leaves} |"


def section(title: str, config: OPTConfig) -> str:
    """One configuration's table. Layers are alike, so that only the first is shown."""
    lines = [
        f"\n## {title}\n",
        f"{count_parameters(config):,} parameters; layers 1 to {config.num_hidden_layers - 1} are as layer 0.\n",
        *HEADER,
    ]
    for parameter in parameter_table(config):
        if ".layers." not in parameter.name or ".layers.0." in parameter.name:
            lines.append(row(parameter))
    return "\n".join(lines) + "\n"


def heads(config: OPTConfig) -> str:
    """The tensors of the other heads, with the classes that have them."""
    lines = [
        "\n## Other heads\n",
        "They stand in place of `lm_head` on the same decoder; the shapes are those of OPT-350m with two labels.\n",
    ]
    for head, architecture in ARCHITECTURES.items():
        if head not in (None, "lm"):
            table = [parameter for parameter in parameter_table(config, head=head) if head_of(parameter.name) == head]
            lines += [f"`{architecture}`:\n", *HEADER, *map(row, table), ""]
    return "\n".join(lines[:-1]) + "\n"


def page() -> str:
    """The whole page."""
    sections = [
        section("OPT-125m: pre-norm, as all sizes but one", OPTConfig.from_size("125m")),
        section("OPT-350m: post-norm, with projections", OPTConfig.from_size("350m")),
        heads(OPTConfig.from_size("350m")),
    ]
    return INTRODUCTION + "".join(sections)


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description="Write docs/parameters.md from the parameter table.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not current")
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            print("docs/parameters.md is not current: run `python docs/make_parameters.py`.", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
