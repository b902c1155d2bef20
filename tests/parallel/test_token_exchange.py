"""Tokens to their experts and back: none is lost at any imbalance; padded and ragged give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.parallel.mesh import make_mesh
from qwen_moe_jax.parallel.token_exchange import exchange, give_back, plan_exchange

TOKENS, TOP_K, HIDDEN = 5, 3, 4


def routings(ranks: int, held: int, seed: int) -> dict[str, np.ndarray]:
    """Global ids [ranks * TOKENS, TOP_K]: even, as uneven as can be, with pads, and nothing at all."""
    rng = np.random.default_rng([seed, ranks, held])
    experts = ranks * held
    tokens = ranks * TOKENS
    even = np.argsort(rng.uniform(size=(tokens, experts)), axis=1)[:, :TOP_K]
    pads = rng.uniform(size=(tokens, 1)) < 0.4
    return {
        "even": even,
        "all to the first experts": np.tile(np.arange(TOP_K), (tokens, 1)),
        "all to the last experts": np.tile(experts - 1 - np.arange(TOP_K), (tokens, 1)),
        "one rank's tokens to one expert each": np.where(np.arange(tokens)[:, None] < TOKENS, even, experts),
        "pads": np.where(pads, experts, even),
        "only pads": np.full((tokens, TOP_K), experts),
    }


def emulated_ragged(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """What `lax.ragged_all_to_all` is documented to do, by gathering everything: XLA:CPU cannot run it."""
    operands, starts, sizes, places = (
        lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    me = lax.axis_index(axis_name)
    rows = jnp.arange(operand.shape[0])
    for sender in range(operands.shape[0]):
        count = sizes[sender, me]
        place = jnp.where(rows < count, places[sender, me] + rows, len(output))
        moved = operands[sender][jnp.minimum(starts[sender, me] + rows, operand.shape[0] - 1)]
        output = output.at[place].set(moved, mode="drop")
        # the receiver has to be told the truth
        output = jnp.where(count == recv_sizes[sender], output, jnp.nan)
    return output


@pytest.fixture(params=["padded", "ragged"])
def ragged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated_ragged)
    return request.param == "ragged"


@pytest.mark.parametrize(("ranks", "held"), [(2, 4), (4, 1), (3, 2)])
def test_every_slot_reaches_its_expert_once_and_comes_back(ranks: int, held: int, ragged: bool) -> None:
    """Experts that return token + expert number: the weighted sum tells which met which."""
    mesh = make_mesh(expert=ranks)
    x = np.random.default_rng(1).normal(size=(ranks * TOKENS, HIDDEN)).astype(np.float32)
    weights = np.random.default_rng(2).uniform(0.5, 1, (ranks * TOKENS, TOP_K)).astype(np.float32)

    def on_a_rank(x, ids, weights):
        plan = plan_exchange(ids, weights, held, held, "expert", ranks)
        rows = exchange(x, plan, ragged=ragged)
        expert = lax.axis_index("expert") * held + plan.ids
        answer = plan.weights[..., None] * (rows[:, None] + expert[..., None])
        outputs = jnp.where((plan.ids < held)[..., None], answer, 0).sum(axis=1)
        return give_back(outputs, plan, ragged=ragged, dtype=jnp.float32), plan.sent

    run = jax.jit(
        jax.shard_map(on_a_rank, mesh=mesh, in_specs=(P("expert"),) * 3, out_specs=(P("expert"), P("expert")))
    )
    for name, ids in routings(ranks, held, 0).items():
        found, sent = run(x, ids.astype(np.int32), weights)
        real = ids < ranks * held
        wanted = np.where(real[..., None], weights[..., None] * (x[:, None] + ids[..., None]), 0).sum(axis=1)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=name)
        # a token goes to a rank once, however many of its experts are there
        pairs = {(t, e // held) for t, row in enumerate(ids) for e in row if e < ranks * held}
        assert int(sent.sum()) == len(pairs), name
