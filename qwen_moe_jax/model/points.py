"""The points of a model: their names, the axes of their values, and which of them an edit may replace."""

import dataclasses

from qwen_moe_jax.config import FULL_ATTENTION, SPARSE, ModelConfig


@dataclasses.dataclass(frozen=True)
class Point:
    """A place in the forward pass.

    Attributes:
        axes: of the value; "position" is a token's place in its row.
        what: in words.
        editable: an edit may replace the value.
        whole: on a mesh every rank has all of it (but for other ranks' rows), so that an edit means the same.
    """

    axes: tuple[str, ...]
    what: str
    editable: bool = True
    whole: bool = True


_STREAM = ("batch", "position", "hidden")

# Of every layer, before and behind its token mixer.
_BEFORE = {"residual": Point(_STREAM, "residual stream before the token mixer")}
_BETWEEN = {
    "mixer": Point(_STREAM, "what attention or Gated DeltaNet adds"),
    "residual_mid": Point(_STREAM, "residual stream between token mixer and MLP"),
}
# Behind the token mixer, by the kind of MLP.
_EXPERTS = {
    "router_logits": Point(("batch", "position", "expert"), "scores that experts are chosen by"),
    "router": Point(("batch", "position", "slot"), "chosen experts: ids and weights"),
    "experts": Point(
        ("batch", "position", "slot", "hidden"), "what each chosen expert adds, weighted", whole=False
    ),
}
_SHARED = {
    "shared_expert": Point(_STREAM, "the shared expert's output before its gate", whole=False),
    "shared_gate": Point(("batch", "position", "gate"), "the shared expert's gate, 0 to 1", whole=False),
}
_MOE = {"moe": Point(_STREAM, "what the mixture of experts adds")}
_MLP = {"mlp": Point(_STREAM, "what the dense MLP adds")}
_BEHIND = {"residual_out": Point(_STREAM, "residual stream behind the layer")}
_ATTENTION = {
    "queries": Point(("batch", "position", "head", "head_dim"), "queries, normed and rotated", whole=False),
    "keys": Point(("batch", "position", "kv_head", "head_dim"), "keys, normed and rotated", whole=False),
    "values": Point(("batch", "position", "kv_head", "head_dim"), "values", whole=False),
    "attention": Point(
        ("batch", "head", "position", "key"), "share that each query reads of each key", editable=False
    ),
}
_DELTA_NET = {
    "beta": Point(("batch", "position", "value_head"), "write strength, 0 to 1", whole=False),
    "decay": Point(("batch", "position", "value_head"), "what stays of the state, 0 to 1", whole=False),
    "state": Point(
        ("batch", "at", "value_head", "key_dim", "value_dim"),
        "recurrent state behind chosen positions",
        editable=False,
    ),
}
_ENDS = {
    "embedding": Point(_STREAM, "embedded tokens"),
    "hidden": Point(_STREAM, "hidden states behind the final norm"),
}


def points_of(config: ModelConfig) -> dict[str, Point]:
    """Name -> point, in the order of a token's way: `embedding`, `layers.N.residual`, ..., `hidden`."""
    found = {"embedding": _ENDS["embedding"]}
    shared = _SHARED if config.shared_expert_intermediate_size else {}
    for index, kind in enumerate(config.layers):
        mixer = _ATTENTION if kind.mixer == FULL_ATTENTION else _DELTA_NET
        mlp = {**_EXPERTS, **shared, **_MOE} if kind.mlp == SPARSE else _MLP
        for name, point in {**_BEFORE, **mixer, **_BETWEEN, **mlp, **_BEHIND}.items():
            found[f"layers.{index}.{name}"] = point
    return found | {"hidden": _ENDS["hidden"]}
