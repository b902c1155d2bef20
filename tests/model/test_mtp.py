"""Multi-token prediction against a composition of the reference's modules, and against the float64 truth.

Our float32 error against the truth is at most `parity.LARGEST_RATIO` times the reference's own, as for the
whole model, and at most `LARGEST_DIFFERENCE` of the largest logit.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import oracle, parity
from support.configs import random_config, random_ids
from support.parts import PartsCheckpoint, full_attention_config, perturb_mtp, reference_mtp
from support.reference import build_reference, parameters_float64
from support.slow import some
from transformers import Qwen3_5MoeForCausalLM
from transformers.cache_utils import DynamicCache

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.checkpoint.parts import mtp_shapes
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, ConfigError, InputError
from qwen_moe_jax.formats.cache import empty_cache
from qwen_moe_jax.kernels.table import make_kernels
from qwen_moe_jax.model.decoder import Decoder, abstract_decoder, named_parameters, with_parameters
from qwen_moe_jax.model.mtp import MtpHead, abstract_mtp
from qwen_moe_jax.model.params import DtypePolicy

CPU = make_kernels("cpu")
FLOAT32 = DtypePolicy(compute=jnp.dtype(jnp.float32), matrix=jnp.dtype(jnp.float32))
BFLOAT16 = DtypePolicy(compute=jnp.dtype(jnp.bfloat16), matrix=jnp.dtype(jnp.bfloat16))

# 1 to 4 KV heads, every number of experts, tied embeddings (3, 7, 11), YaRN (5, 11)
SEEDS = (0, 1, 2, 3, 5, 7, 9, 11)
LENGTH = 70
CAPACITY = 96

# |ours - truth| over the largest |truth| in float32. One layer behind exact inputs: the reference lies up to
# 5.4e-7 from the truth on these cases, ours up to 6.4e-7.
LARGEST_DIFFERENCE = 3e-6

# The same in bfloat16 (8 bits: one rounding is up to 3.9e-3 of a value, and about ten lie on a token's way).
# The median token is 3e-3 off, the worst one whose experts stay the same 7e-3. Swapped halves move the median
# by 0.8.
BFLOAT16_TOLERANCE = 1e-2

# Behind a whole text model, whose own errors come first.
BEHIND_A_MODEL = 4 * parity.LARGEST_DIFFERENCE


@dataclasses.dataclass(frozen=True)
class Case:
    """Random weights and inputs.

    Attributes:
        raw: dictionary of the text model's config.json.
        text: the reference's text model, for embedding and lm_head.
        mtp: as of `reference_mtp`.
        hidden: float32 [seq, hidden], as behind a final norm.
        tokens: int [seq], the tokens that follow.
        truth: float64 logits [seq, vocab].
    """

    raw: dict
    text: Qwen3_5MoeForCausalLM
    mtp: torch.nn.Module
    hidden: np.ndarray
    tokens: np.ndarray
    truth: np.ndarray


def true_logits(raw, text, mtp, hidden, tokens) -> tuple[np.ndarray, float]:
    """(float64 logits, the smallest router margin), from the equations in NumPy."""
    c = full_attention_config(raw)
    p = {name: value.double().numpy() for name, value in mtp.state_dict().items()}
    layer = {n.removeprefix("layers.0."): v for n, v in p.items() if n.startswith("layers.0.")}

    def under(prefix):
        return {n.removeprefix(prefix): v for n, v in layer.items() if n.startswith(prefix)}

    shared = parameters_float64(text)
    eps = c["rms_norm_eps"]
    halves = (
        oracle.rms_norm(shared["embed_tokens.weight"][tokens], p["pre_fc_norm_embedding.weight"], eps),
        oracle.rms_norm(hidden.astype(np.float64), p["pre_fc_norm_hidden.weight"], eps),
    )
    x = np.concatenate(halves, axis=-1) @ p["fc.weight"].T
    cos, sin = oracle.rotation(c, np.broadcast_to(np.arange(len(tokens)), (3, len(tokens))))
    normed = oracle.rms_norm(x, layer["input_layernorm.weight"], eps)
    x = x + oracle.gated_attention(c, under("self_attn."), normed, cos, sin)
    normed = oracle.rms_norm(x, layer["post_attention_layernorm.weight"], eps)
    mixed, margin = oracle.mixture_of_experts(c, under("mlp."), normed)
    x = oracle.rms_norm(x + mixed, p["norm.weight"], eps)
    head = shared["embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return x @ head.T, float(margin.min())


@torch.no_grad()
def reference_hidden(text, mtp, hidden, tokens, lengths=None) -> torch.Tensor:
    """The reference's modules put together: hidden states [seq, hidden] behind `mtp.norm`.

    Args:
        lengths: of the pieces that are given one after another through the reference's cache; None means all
            at once without a cache.
    """
    layer, rotary = mtp.layers[0], text.model.rotary_emb
    cache = None if lengths is None else DynamicCache()
    out, start = [], 0
    for count in lengths or (len(tokens),):
        piece = slice(start, start + count)
        embedded = mtp.pre_fc_norm_embedding(text.model.embed_tokens(torch.as_tensor(tokens[piece])[None]))
        normed = mtp.pre_fc_norm_hidden(torch.as_tensor(hidden[piece])[None])
        x = mtp.fc(torch.cat([embedded, normed], dim=-1))
        positions = torch.arange(start, start + count)
        # additive mask [1, 1, new, all so far]
        future = torch.arange(start + count)[None] > positions[:, None]
        mask = torch.zeros(future.shape).masked_fill(future, torch.finfo(torch.float32).min)[None, None]
        x = layer(
            x,
            position_embeddings=rotary(x, positions[None, None].expand(3, 1, -1)),
            attention_mask=mask,
            past_key_values=cache,
        )
        out.append(mtp.norm(x)[0])
        start += count
    return torch.cat(out)


@torch.no_grad()
def reference_logits(case: Case, lengths=None) -> np.ndarray:
    hidden = reference_hidden(case.text, case.mtp, case.hidden, case.tokens, lengths)
    return case.text.lm_head(hidden).numpy()


@functools.cache
def case_of(seed: int) -> Case:
    """The first draw in which no rounding can choose another expert (see `support/parity.py`)."""
    raw = random_config(seed)
    text, mtp = build_reference(raw, seed), reference_mtp(raw)
    perturb_mtp(mtp, seed)
    for draw in range(20):
        rng = np.random.default_rng([seed, draw])
        hidden = rng.normal(size=(LENGTH, raw["hidden_size"])).astype(np.float32)
        tokens = random_ids(raw, LENGTH, seed + 1000 * draw)
        truth, margin = true_logits(raw, text, mtp, hidden, tokens)
        if margin >= parity.ROUTER_TIE:
            return Case(raw, text, mtp, hidden, tokens, truth)
    raise RuntimeError(f"seed {seed}: twenty draws all have router ties")


def ours_of(case: Case, policy: DtypePolicy) -> tuple[Decoder, MtpHead]:
    """The decoder (only its embedding and lm_head are used) and the head, with the case's parameters."""
    config = ModelConfig.from_dict(case.raw)
    decoder, head = abstract_decoder(config, policy, CPU), abstract_mtp(config, 1, policy, CPU)

    def fill(module, values):
        structs = named_parameters(module)
        return with_parameters(module, {n: jnp.asarray(values[n], s.dtype) for n, s in structs.items()})

    mtp = {name: value.float().numpy() for name, value in case.mtp.state_dict().items()}
    return fill(decoder, parameters_float64(case.text)), fill(head, mtp)


class Ours:
    """Our head on a case, compiled once a shape."""

    def __init__(self, case: Case, policy: DtypePolicy = FLOAT32):
        decoder, self.head = ours_of(case, policy)
        self.compute = policy.compute
        self.values = named_parameters(decoder), named_parameters(self.head)

        @jax.jit
        def run(decoder_values, head_values, hidden, tokens, valid, cache):
            text, head = with_parameters(decoder, decoder_values), with_parameters(self.head, head_values)
            out, cache = head(hidden, text.embed(tokens, valid), valid, cache)
            return text.logits(out), cache

        self.run = run

    def __call__(self, hidden, tokens, valid, cache):
        return self.run(
            *self.values,
            jnp.asarray(hidden, self.compute),
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(valid),
            cache,
        )

    def pieces(self, case: Case, lengths) -> np.ndarray:
        """Logits [seq, vocab] of one row, given piece by piece through the cache."""
        cache, out, start = self.head.new_cache(1, CAPACITY), [], 0
        for count in lengths:
            piece = slice(start, start + count)
            valid = np.ones((1, count), bool)
            logits, cache = self(case.hidden[None, piece], case.tokens[None, piece], valid, cache)
            out.append(np.asarray(logits)[0])
            start += count
        assert start == len(case.tokens)
        assert cache.length.tolist() == [start]
        return np.concatenate(out)


@functools.cache
def ours(seed: int) -> Ours:
    return Ours(case_of(seed))


def measured(case: Case, logits: np.ndarray) -> parity.Errors:
    assert logits.shape == case.truth.shape
    assert logits.dtype == np.float32
    return parity.measure(parity.Case(0, case.tokens, case.truth, np.inf), logits, reference_logits(case))


@pytest.mark.parametrize("seed", some(SEEDS, lambda i: i == 0))
@pytest.mark.parametrize(
    "lengths", [(LENGTH,), (1,) * LENGTH, (33, 1, 1, 35)], ids=["whole", "steps", "split"]
)
def test_logits_are_as_close_to_the_truth_as_the_references(seed, lengths):
    errors = measured(case_of(seed), ours(seed).pieces(case_of(seed), lengths))
    assert errors.reference_max <= LARGEST_DIFFERENCE, "the two oracles agree"
    assert errors.ratio <= parity.LARGEST_RATIO
    assert errors.ours_max <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_the_references_own_cached_steps_are_the_same_function(seed):
    """So the composition, not only the whole-sequence form of it, is what ours is compared with."""
    case = case_of(seed)
    stepped = measured(case, reference_logits(case, (40, *(1,) * (LENGTH - 40))))
    assert stepped.ours_max <= LARGEST_DIFFERENCE


def test_errors_are_no_larger_than_the_references_on_the_whole():
    ratios = [measured(case_of(s), ours(s).pieces(case_of(s), (LENGTH,))).ratio for s in SEEDS]
    assert parity.geometric_mean(ratios) <= parity.GEOMETRIC_MEAN_RATIO, ratios


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_bfloat16_stays_within_its_roundings(seed):
    case = case_of(seed)
    rounded = dataclasses.replace(case, hidden=torch.as_tensor(case.hidden).bfloat16().float().numpy())
    for module in ("text", "mtp"):
        twin = build_reference(case.raw, seed) if module == "text" else reference_mtp(case.raw)
        twin.load_state_dict(getattr(case, module).state_dict())
        rounded = dataclasses.replace(rounded, **{module: twin.bfloat16().float()})
    truth, _ = true_logits(rounded.raw, rounded.text, rounded.mtp, rounded.hidden, rounded.tokens)
    logits = Ours(rounded, BFLOAT16).pieces(rounded, (LENGTH,))
    errors = np.abs(logits - truth).max(axis=-1) / np.abs(truth).max()
    # a rounding may choose another expert for a token whose experts nearly tie; no more than a few do
    assert np.median(errors) <= BFLOAT16_TOLERANCE
    assert (errors > BFLOAT16_TOLERANCE).mean() <= 0.1


def test_rows_of_other_lengths_and_pads_do_not_disturb_a_row():
    case, model = case_of(2), ours(2)
    alone = model.pieces(case, (LENGTH,))
    lengths = np.array([LENGTH, 5, 0])
    valid = np.arange(LENGTH) < lengths[:, None]
    hidden = np.where(valid[..., None], case.hidden, np.nan)
    tokens = np.where(valid, case.tokens, 2**31 - 1)
    logits, cache = model(hidden, tokens, valid, model.head.new_cache(3, CAPACITY))
    assert cache.length.tolist() == lengths.tolist()
    scale = np.abs(case.truth).max()
    for row, count in enumerate(lengths):
        assert np.abs(np.asarray(logits)[row, :count] - alone[:count]).max(initial=0) <= 1e-5 * scale

    # row 1 goes on where it stands, while row 0 pauses
    valid = np.array([[False] * 3, [True] * 3, [False] * 3])
    more = np.broadcast_to(case.hidden[5:8], (3, 3, case.hidden.shape[1]))
    logits, cache = model(more, np.broadcast_to(case.tokens[5:8], (3, 3)), valid, cache)
    assert cache.length.tolist() == [LENGTH, 8, 0]
    assert np.abs(np.asarray(logits)[1] - alone[5:8]).max() <= 1e-5 * scale


# Controls: the measurement fails a head with one mistake in it.


def swapped_halves(case: Case) -> None:
    first, second = case.mtp.fc.weight.chunk(2, dim=1)
    case.mtp.fc.weight.copy_(torch.cat([second, first], dim=1))


def without_hidden_norm(case: Case) -> None:
    case.mtp.pre_fc_norm_hidden.weight.zero_()


def without_last_norm(case: Case) -> None:
    case.mtp.norm.weight.copy_(case.text.model.norm.weight)


@pytest.mark.parametrize("mistake", [swapped_halves, without_hidden_norm, without_last_norm])
def test_the_measurement_fails_a_mistaken_head(mistake):
    case = case_of(0)
    twin = reference_mtp(case.raw)
    twin.load_state_dict(case.mtp.state_dict())
    mistaken = dataclasses.replace(case, mtp=twin)
    with torch.no_grad():
        mistake(mistaken)
    errors = measured(case, Ours(mistaken).pieces(case, (LENGTH,)))
    assert errors.ratio > 10 * parity.LARGEST_RATIO
    assert errors.ours_max > 10 * LARGEST_DIFFERENCE


# What is declared


@pytest.mark.parametrize("seed", range(6))
def test_the_head_declares_the_parameters_of_the_key_table_and_the_same_matrices(seed):
    config = ModelConfig.from_dict(random_config(seed))
    declared = named_parameters(abstract_mtp(config, 1, BFLOAT16, CPU))
    assert {name: struct.shape for name, struct in declared.items()} == mtp_shapes(config, 1)
    for struct in declared.values():
        assert struct.dtype == (jnp.bfloat16 if struct.ndim > 1 else jnp.float32)


def test_several_layers_are_refused():
    with pytest.raises(ConfigError, match=r"mtp_num_hidden_layers is 2; only .* one layer"):
        abstract_mtp(ModelConfig.from_dict(random_config(0)), 2, FLOAT32, CPU)


# From a folder


@torch.no_grad()
def prompt_of(checkpoint: PartsCheckpoint) -> tuple[np.ndarray, np.ndarray]:
    """24 tokens without a router tie, and the reference's logits [23, vocab] for all but the first two and
    the one that follows."""
    text, mtp = checkpoint.text, checkpoint.mtp
    for draw in range(20):
        ids = random_ids(checkpoint.config, 24, draw)
        hidden = text.model(input_ids=torch.as_tensor(ids[None, :-1]), use_cache=False).last_hidden_state
        hidden = hidden[0].numpy()
        _, margin = true_logits(checkpoint.config, text, mtp, hidden, ids[1:])
        truth = oracle.forward(checkpoint.config, parameters_float64(text), ids[:-1])
        if min(margin, truth.router_margin.min()) >= parity.ROUTER_TIE:
            return ids, text.lm_head(reference_hidden(text, mtp, hidden, ids[1:])).numpy()
    raise RuntimeError("twenty prompts all have router ties")


@pytest.mark.parametrize("form", ["one an expert", "fused", "float8"])
@pytest.mark.parametrize("seed", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_loaded_head_behind_the_loaded_model_predicts_what_the_references_do(seed, form, tmp_path):
    checkpoint = PartsCheckpoint(tmp_path, seed, fused=form == "fused", float8=form == "float8")
    model = QwenMoe.from_pretrained(tmp_path, dtype=jnp.float32, compilation_cache=None)
    skipped = dict(model.skipped)
    assert skipped.keys() == {"mtp", "model.visual"}
    head = model.load_part("mtp")
    assert model.skipped == skipped, "the model itself does not hold it"

    ids, wanted = prompt_of(checkpoint)
    decoder = model.decoder
    valid = jnp.ones((1, 23), bool)
    float32 = jnp.dtype(jnp.float32)
    cache = empty_cache(model.config, 1, 32, float32, float32)
    hidden, _ = decoder(jnp.asarray(ids[None, :-1], jnp.int32), valid, cache)
    embedded = decoder.embed(jnp.asarray(ids[None, 1:], jnp.int32), valid)
    out, _ = head(hidden, embedded, valid, head.new_cache(1, 32))
    found = np.asarray(decoder.logits(out))[0]

    assert np.abs(found - wanted).max() <= BEHIND_A_MODEL * np.abs(wanted).max()


def test_a_bfloat16_model_holds_a_bfloat16_head_and_rounds_a_float32_one(tmp_path: Path):
    checkpoint = PartsCheckpoint(tmp_path, 1)
    model = QwenMoe.from_pretrained(tmp_path, dtype=jnp.bfloat16, compilation_cache=None)
    head = model.load_part("mtp")
    assert head.dtypes.compute == jnp.bfloat16
    truth = checkpoint.mtp.state_dict()
    for name, value in named_parameters(head).items():
        assert value.dtype == (head.dtypes.matrix if value.ndim > 1 else jnp.float32)
        wanted = truth[name].bfloat16().double() if value.ndim > 1 else truth[name].double()
        np.testing.assert_array_equal(np.asarray(value).astype(np.float64), wanted.numpy(), name)


def test_load_part_gives_the_towers_arrays_and_refuses_what_there_is_not(tmp_path):
    checkpoint = PartsCheckpoint(tmp_path, 1)
    model = QwenMoe.from_pretrained(tmp_path, compilation_cache=None)
    visual = model.load_part("visual")
    for name, value in checkpoint.visual.state_dict().items():
        np.testing.assert_array_equal(np.asarray(visual[name]), value.numpy(), name)
    with pytest.raises(InputError, match="part is 'text'"):
        model.load_part("text")  # type: ignore[call-overload]
    model.save_pretrained(tmp_path / "saved")
    saved = QwenMoe.from_pretrained(tmp_path / "saved", compilation_cache=None)
    assert saved.skipped == {}
    with pytest.raises(CheckpointError, match="holds no multi-token prediction"):
        saved.load_part("mtp")
    on_mesh = QwenMoe.from_pretrained(
        tmp_path,
        mesh=make_mesh(data=1, expert=2, tensor=1),
        shared_expert="prescaled",
        compilation_cache=None,
    )
    with pytest.raises(InputError, match="on one device only"):
        on_mesh.load_part("mtp")
    with pytest.raises(InputError, match="lies on a mesh"):
        _ = on_mesh.decoder
    assert on_mesh.load_part("visual").keys() == visual.keys()
