"""What a manifest may say of merged weights, and which manifests are read."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmir_iree.bundle import Bundle
from llmir_iree.params.errors import BundleError

GATE, UP, MERGED = (f"mlp.{module}.weight" for module in ("gate_proj", "up_proj", "gate_proj+up_proj"))


def write_merged(folder: Path, merged: dict[str, list[str]]) -> None:
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    data["parameters"]["merged"] = merged
    file.write_text(json.dumps(data))


def test_merged_weights_name_their_siblings_in_order(tiny_copy: Any) -> None:
    assert Bundle.open(tiny_copy.folder).manifest.parameters.merged == {}
    write_merged(tiny_copy.folder, {MERGED: [GATE, UP]})
    bundle = Bundle.open(tiny_copy.folder)
    assert bundle.manifest.parameters.merged == {MERGED: (GATE, UP)}
    bundle.save()
    assert Bundle.open(tiny_copy.folder).manifest == bundle.manifest


@pytest.mark.parametrize("siblings", [[UP, GATE], [GATE], []])
def test_siblings_that_do_not_give_the_name_are_refused(tiny_copy: Any, siblings: list[str]) -> None:
    write_merged(tiny_copy.folder, {MERGED: siblings})
    with pytest.raises(BundleError, match=r"parameters: .* do not merge into mlp\.gate_proj\+up_proj\.weight"):
        Bundle.open(tiny_copy.folder)


def test_a_weight_that_is_merged_twice_is_refused(tiny_copy: Any) -> None:
    q, k, v = (f"attn.{module}_proj.weight" for module in "qkv")
    write_merged(tiny_copy.folder, {"attn.q_proj+k_proj+v_proj.weight": [q, k, v], "attn.q_proj+k_proj.weight": [q, k]})
    with pytest.raises(BundleError, match=r"attn\.q_proj\.weight is merged 2 times"):
        Bundle.open(tiny_copy.folder)


def test_a_manifest_of_the_version_before_is_refused(tiny_copy: Any) -> None:
    file = tiny_copy.folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(BundleError, match="manifest version 2, this program reads version 3"):
        Bundle.open(tiny_copy.folder)
