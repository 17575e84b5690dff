"""lower-llmir-ops: what is left of the ops, which calls share a definition, and what is refused."""

import pytest
from iree.compiler import ir

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.calls import find_calls
from llmir_iree.plugins.pipeline import lower
from llmir_iree.targets import resolve_target

TARGET = resolve_target("llvm-cpu")
CACHE = "!torch.vtensor<[?,2,2,1,4,8],f16>"
NEW = "!torch.vtensor<[1,1,1,8],f32>"
TABLE = "!torch.vtensor<[1,?],si32>"
POSITIONS = "!torch.vtensor<[1,1],si32>"


def appends(*layers: int) -> str:
    """A module that stores a token in each layer, one after the other."""
    body = []
    for number, layer in enumerate(layers):
        body.append(f"%layer{number} = torch.constant.int {layer}")
        body.append(
            f'%cache{number + 1} = torch.operator "torch.llmir.append_kv"'
            f"(%cache{number}, %new, %new, %table, %positions, %layer{number})"
            f" : ({CACHE}, {NEW}, {NEW}, {TABLE}, {POSITIONS}, !torch.int) -> {CACHE}"
        )
    arguments = f"%cache0: {CACHE}, %new: {NEW}, %table: {TABLE}, %positions: {POSITIONS}"
    lines = "\n  ".join([*body, f"return %cache{len(layers)} : {CACHE}"])
    return f"func.func @main({arguments}) -> {CACHE} {{\n  {lines}\n}}"


def test_all_layers_share_one_definition_and_keep_their_order() -> None:
    lowered = lower(appends(0, 1, 0), TARGET)
    assert "torch.llmir" not in lowered.text
    assert lowered.text.count("util.func private @llmir_append_kv_") == 1
    assert lowered.text.count("util.call @llmir_append_kv_") == 3
    assert "lower-llmir-ops" in lowered.passes


def test_the_symbol_tells_apart_all_that_varies_but_the_layer() -> None:
    def symbols(text: str) -> list[str]:
        with ir.Context(), ir.Location.unknown():
            return [site.call.symbol for site in find_calls(ir.Module.parse(text))]

    [one, other_layer] = symbols(appends(0, 1))
    assert one == other_layer
    assert symbols(appends(0).replace("f16", "f32")) != [one]
    assert symbols(appends(0).replace("4,8],f16", "16,8],f16")) != [one]
    assert symbols(appends(0).replace("[1,?],si32", "[1,3],si32")) != [one]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("torch.llmir.append_kv", "torch.llmir.prepend_kv", "unknown op llmir.prepend_kv; known: append_kv"),
        ("%layer0 = torch.constant.int 0\n", "%layer0 = torch.prim.NumToTensor.Scalar\n", "not valid MLIR"),
        ("[?,2,2,1,4,8],f16", "*,f16", "not valid MLIR|expected a ranked tensor"),
    ],
)
def test_refuses_what_it_cannot_read(old: str, new: str, message: str) -> None:
    text = appends(0)
    assert old in text
    with pytest.raises(CompileError, match=message):
        lower(text.replace(old, new), TARGET)


def test_a_layer_that_is_computed_is_refused() -> None:
    text = appends(0).replace("%layer0 = torch.constant.int 0\n", "").replace(") ->", ", %layer0: !torch.int) ->", 1)
    with pytest.raises(CompileError, match="append_kv: layer must be a constant"):
        lower(text, TARGET)


def test_an_unknown_weight_format_is_refused() -> None:
    text = """
    func.func @main(%x: !torch.vtensor<[1,1,32],f32>, %w: !torch.vtensor<[8,32],f32>) -> !torch.vtensor<[1,1,8],f32> {
      %planes = torch.prim.ListConstruct %w : (!torch.vtensor<[8,32],f32>) -> !torch.list<vtensor>
      %format = torch.constant.str "q3_x"
      %layout = torch.constant.str "planes"
      %rows = torch.constant.int 8
      %y = torch.operator "torch.llmir.quantized_matmul"(%x, %planes, %format, %layout, %rows)
        : (!torch.vtensor<[1,1,32],f32>, !torch.list<vtensor>, !torch.str, !torch.str, !torch.int)
        -> !torch.vtensor<[1,1,8],f32>
      return %y : !torch.vtensor<[1,1,8],f32>
    }"""
    with pytest.raises(CompileError, match="unknown format 'q3_x'; known: f32, f16"):
        lower(text, TARGET)
