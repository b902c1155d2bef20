"""The truth: the whole text model in float64 NumPy, one row, no cache, no padding.

Written from the equations, to be slow and obvious: attention builds its [seq, seq] scores, the delta rule
is its recurrence token by token, every expert is looked at by itself. Every quantity is a float64; the
weights are the exact values of the checkpoint. What two float32 implementations are measured against.

Parameters are named as in a Hugging Face checkpoint without the `model.` prefix.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Params = Mapping[str, np.ndarray]

# Model types with plain norms and attention without a gate.
PLAIN = ("qwen2_moe", "qwen3_moe")

L2_EPS = 1e-6  # inside the square root of the q and k normalisation of the delta rule


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the oracle says about one row.

    Attributes:
        logits: float64 [seq, vocab].
        router_margin: float64 [seq], per token the smallest difference, over the layers, between the router
            logit of the last expert chosen and that of the first one left out (inf if all are chosen). The
            choice is a step function: a rounding error near this size can change the expert, and
            with it everything behind it.
    """

    logits: np.ndarray
    router_margin: np.ndarray


def forward(config: Any, params: Params, input_ids: Any, positions: np.ndarray | None = None) -> Truth:
    """Runs the model over one row.

    Args:
        config: the dictionary of a text-only config.json, or anything whose `to_dict()` gives one.
        params: float64 arrays.
        input_ids: int [seq].
        positions: int [3, seq], temporal, height, width; None means text, where all are 0 .. seq - 1.
    """
    c = config if isinstance(config, Mapping) else config.to_dict()
    wrong = [name for name, value in params.items() if value.dtype != np.float64]
    if wrong:
        raise TypeError(f"the oracle takes float64 parameters, but {wrong[0]} is {params[wrong[0]].dtype}")
    ids = np.asarray(input_ids)
    if positions is None:
        positions = np.broadcast_to(np.arange(len(ids)), (3, len(ids)))
    cos, sin = rotation(c, positions)
    eps, centre = c["rms_norm_eps"], norm_centre(c)

    x = params["embed_tokens.weight"][ids]
    margin = np.full(len(ids), np.inf)
    kinds = c.get("layer_types") or ["full_attention"] * c["num_hidden_layers"]
    for i, kind in enumerate(kinds):
        layer = _under(params, f"layers.{i}.")
        normed = rms_norm(x, layer["input_layernorm.weight"], eps, centre)
        if kind == "full_attention":
            x = x + gated_attention(c, _under(layer, "self_attn."), normed, cos, sin)
        elif kind == "linear_attention":
            x = x + gated_delta_net(c, _under(layer, "linear_attn."), normed)
        else:
            raise ValueError(f"unknown layer type {kind!r}")
        normed = rms_norm(x, layer["post_attention_layernorm.weight"], eps, centre)
        mlp = _under(layer, "mlp.")
        if "gate_proj.weight" in mlp:  # a dense layer
            x = x + _mlp(normed, *(mlp[f"{name}_proj.weight"] for name in ("gate", "up", "down")))
            continue
        mixed, layer_margin = mixture_of_experts(c, mlp, normed)
        x = x + mixed
        margin = np.minimum(margin, layer_margin)
    x = rms_norm(x, params["norm.weight"], eps, centre)
    head = params["embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"]
    return Truth(logits=x @ head.T, router_margin=margin)


def _under(params: Params, prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x)."""
    return np.logaddexp(0.0, x)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, centre: float = 1.0) -> np.ndarray:
    """Zero-centred unless told otherwise: a weight of 0 scales by one."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * (centre + weight)


def norm_centre(c: Mapping[str, Any]) -> float:
    """What is added to the weights of norms."""
    return 0.0 if c.get("model_type") in PLAIN else 1.0


def head_dim(c: Mapping[str, Any]) -> int:
    """Width of an attention head."""
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def rotation(c: Mapping[str, Any], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [seq, rotary_dim / 2] for positions [3, seq] (temporal, height, width)."""
    rope = c["rope_parameters"]
    dim = int(head_dim(c) * rope.get("partial_rotary_factor", 1.0))
    frequency = rope["rope_theta"] ** (-2.0 * np.arange(dim // 2) / dim)
    scale = 1.0
    if rope["rope_type"] == "yarn":
        frequency, scale = yarn(c, frequency)
    elif rope["rope_type"] != "default":
        raise ValueError(f"unknown rope type {rope['rope_type']!r}")
    # Interleaved MRoPE: frequency i turns with height where i = 1, 4, 7, ... and with width where
    # i = 2, 5, 8, ..., each below three times its section; with time everywhere else.
    _, height, width = rope.get("mrope_section", (0, 0, 0))
    i = np.arange(dim // 2)
    axis = np.where((i % 3 == 1) & (i < 3 * height), 1, np.where((i % 3 == 2) & (i < 3 * width), 2, 0))
    angle = positions[axis].T * frequency
    return np.cos(angle) * scale, np.sin(angle) * scale


def yarn(c: Mapping[str, Any], frequency: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071, sections 3.2 and 3.4): fast dimensions kept, slow ones interpolated."""
    rope, dim = c["rope_parameters"], 2 * len(frequency)
    trained = rope["original_max_position_embeddings"]
    stretch = rope.get("factor") or c["max_position_embeddings"] / trained

    def dimension_turning(times: float) -> float:
        """The dimension pair that turns so many times within the trained context."""
        return dim / 2 * math.log(trained / (2 * math.pi * times)) / math.log(rope["rope_theta"])

    low = dimension_turning(rope.get("beta_fast") or 32)
    high = dimension_turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    interpolated = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    frequency = frequency * (1.0 - interpolated) + frequency / stretch * interpolated

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(stretch) + 1.0 if stretch > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return frequency, rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return frequency, magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return frequency, magnitude(1.0)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turns the pairs (i, i + n) of x [seq, heads, head_dim] for the n angles; later dimensions pass."""
    n = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., :n], x[..., n : 2 * n]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos, x[..., 2 * n :]], axis=-1)


def gated_attention(
    c: Mapping[str, Any], p: Params, x: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> np.ndarray:
    """Causal softmax attention with grouped KV heads; by model type biases, q/k norm and an output gate."""
    seq, dim, eps, gate = len(x), head_dim(c), c["rms_norm_eps"], None
    query, key, value = (
        (x @ p[f"{name}_proj.weight"].T + p.get(f"{name}_proj.bias", 0.0)).reshape(seq, -1, dim)
        for name in "qkv"
    )
    if c.get("model_type") not in PLAIN:
        # q_proj's rows are, head by head, that head's query and then that head's gate.
        query, gate = query[:, 0::2], query[:, 1::2]
    if "q_norm.weight" in p:
        query = rms_norm(query, p["q_norm.weight"], eps, norm_centre(c))
        key = rms_norm(key, p["k_norm.weight"], eps, norm_centre(c))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)

    future = np.triu(np.ones((seq, seq), bool), 1)
    queries_a_key = c["num_attention_heads"] // c["num_key_value_heads"]
    mixed = np.empty_like(query)
    for head in range(c["num_attention_heads"]):
        shared = head // queries_a_key
        scores = query[:, head] @ key[:, shared].T / math.sqrt(dim)
        mixed[:, head] = softmax(np.where(future, -np.inf, scores)) @ value[:, shared]
    mixed = mixed if gate is None else mixed * sigmoid(gate)
    return mixed.reshape(seq, -1) @ p["o_proj.weight"].T


def gated_delta_net(c: Mapping[str, Any], p: Params, x: np.ndarray) -> np.ndarray:
    """Gated DeltaNet (arXiv:2412.06464): convolution, delta rule, gated norm."""
    seq = len(x)
    key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    key_dim, value_dim = c["linear_key_head_dim"], c["linear_value_head_dim"]

    inputs, z, b, a = _projections(c, p, x)
    taps = p["conv1d.weight"][:, 0]  # [channels, kernel], the last tap meets the current token
    kernel = taps.shape[1]
    padded = np.concatenate([np.zeros((kernel - 1, inputs.shape[1])), inputs])
    mixed = silu(sum(padded[j : j + seq] * taps[:, j] for j in range(kernel)))

    query, key, value = np.split(mixed, [key_heads * key_dim, 2 * key_heads * key_dim], axis=1)
    query = _unit(query.reshape(seq, key_heads, key_dim)) / math.sqrt(key_dim)
    key = _unit(key.reshape(seq, key_heads, key_dim))
    value = value.reshape(seq, value_heads, value_dim)
    served_by = np.arange(value_heads) // (value_heads // key_heads)  # value head -> its key head
    beta = sigmoid(b)
    log_decay = -np.exp(p["A_log"]) * softplus(a + p["dt_bias"])

    output = delta_rule(query[:, served_by], key[:, served_by], value, log_decay, beta)
    z = z.reshape(seq, value_heads, value_dim)
    rms = np.sqrt((output**2).mean(axis=-1, keepdims=True) + c["rms_norm_eps"])
    return (output / rms * p["norm.weight"] * silu(z)).reshape(seq, -1) @ p["out_proj.weight"].T


def _projections(c: Mapping[str, Any], p: Params, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """(queries, keys and values, z, b, a), each [seq, rows]; Qwen3-Next fuses them, head by head."""
    if "in_proj_qkv.weight" in p:
        return tuple(x @ p[f"in_proj_{name}.weight"].T for name in ("qkv", "z", "b", "a"))
    heads, key = c["linear_num_key_heads"], c["linear_key_head_dim"]
    served = c["linear_num_value_heads"] // heads
    values = served * c["linear_value_head_dim"]
    qkvz, ba = ((x @ p[f"in_proj_{name}.weight"].T).reshape(len(x), heads, -1) for name in ("qkvz", "ba"))
    q, k, v, z = np.split(qkvz, np.cumsum([key, key, values]), axis=2)
    b, a = np.split(ba, [served], axis=2)
    q, k, v, z, b, a = (part.reshape(len(x), -1) for part in (q, k, v, z, b, a))
    return np.concatenate([q, k, v], axis=1), z, b, a


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + L2_EPS)


def delta_rule(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, log_decay: np.ndarray, beta: np.ndarray
) -> np.ndarray:
    """S <- S e^g;  S <- S + k ((v - S^T k) beta)^T;  o = S^T q, for every head, from S = 0.

    query, key [seq, heads, Dk]; value [seq, heads, Dv]; log_decay, beta [seq, heads] -> [seq, heads, Dv].
    """
    seq, heads, _ = key.shape
    state = np.zeros((heads, key.shape[-1], value.shape[-1]))
    output = np.empty((seq, heads, value.shape[-1]))
    for t in range(seq):
        state = state * np.exp(log_decay[t])[:, None, None]
        predicted = (key[t][:, None, :] @ state)[:, 0]
        correction = (value[t] - predicted) * beta[t][:, None]
        state = state + key[t][:, :, None] * correction[:, None, :]
        output[t] = (query[t][:, None, :] @ state)[:, 0]
    return output


def mixture_of_experts(c: Mapping[str, Any], p: Params, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Top-k experts, plus the gated shared expert where there is one; and the router's margin [seq].

    The weights are the softmax over all experts, renormalised where `norm_topk_prob` says so.
    """
    top_k, num_experts = c["num_experts_per_tok"], c["num_experts"]
    logits = x @ p["gate.weight"].T
    order = np.argsort(-logits, axis=1, kind="stable")
    chosen = order[:, :top_k]
    weights = np.take_along_axis(softmax(logits), chosen, axis=1)
    if c.get("norm_topk_prob", c.get("model_type") not in PLAIN):
        weights = weights / weights.sum(axis=1, keepdims=True)
    margin = np.full(len(x), np.inf)
    if top_k < num_experts:
        ranked = np.take_along_axis(logits, order[:, top_k - 1 : top_k + 1], axis=1)
        margin = ranked[:, 0] - ranked[:, 1]

    output = np.zeros_like(x)
    for expert in range(num_experts):
        token, rank = np.nonzero(chosen == expert)
        gate, up = np.split(p["experts.gate_up_proj"][expert], 2)
        output[token] += weights[token, rank, None] * _mlp(x[token], gate, up, p["experts.down_proj"][expert])
    if "shared_expert_gate.weight" not in p:
        return output, margin
    shared = _mlp(x, *(p[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")))
    return output + sigmoid(x @ p["shared_expert_gate.weight"].T) * shared, margin


def _mlp(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T
