"""What is captured is what the reference's modules say, and an edit does what the same change does there."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import parity
from support.configs import MODEL_TYPES, QWEN35_MOE
from support.meshes import mesh_case
from support.parity import LARGEST_DIFFERENCE
from support.reference import save_reference
from support.slow import some

from qwen_moe_jax import QwenMoe, experiments, make_mesh
from qwen_moe_jax.checkpoint.names import canonical_name
from qwen_moe_jax.engine.observe import Observer
from qwen_moe_jax.errors import InputError

# Both sides are so far from the truth at most, over the largest value of an array.
TOLERANCE = 2 * LARGEST_DIFFERENCE
# Gradients go through every rounding of a pass twice.
GRADIENT_TOLERANCE = 10 * TOLERANCE
LENGTH = 70  # over the border of a page, and of a chunk of the delta rule
SEEDS = (0, 3, 9, 22)  # layers of both kinds, several sizes


def loaded(seed: int, model_type: str = QWEN35_MOE) -> tuple[QwenMoe, np.ndarray]:
    return _loaded(seed, model_type)


@functools.cache
def _loaded(seed: int, model_type: str) -> tuple[QwenMoe, np.ndarray]:
    built = parity.random_model(seed, model_type)
    model = QwenMoe.from_pretrained(
        save_reference(built.reference, Path(tempfile.mkdtemp())), dtype="float32"
    )
    return model, built.case(LENGTH).ids


@contextlib.contextmanager
def hooked(hooks: list[tuple[torch.nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference_run(seed: int, ids: np.ndarray, hooks: list[Any], model_type: str = QWEN35_MOE) -> np.ndarray:
    reference = parity.random_model(seed, model_type).reference
    reference.set_attn_implementation("eager")  # the others do not give their weights
    with hooked(hooks):
        return reference(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


@functools.cache
def reference_points(seed: int, model_type: str = QWEN35_MOE) -> dict[str, np.ndarray]:
    """Point -> what the reference's modules gave."""
    reference, found, hooks = parity.random_model(seed, model_type).reference, {}, []

    def keep(name: str, pick: Callable[[Any, Any, Any], torch.Tensor]) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            found[name] = pick(args, kwargs, output).detach().numpy()

        return hook

    def given(args: Any, kwargs: Any) -> torch.Tensor:
        return args[0] if args else kwargs["hidden_states"]

    for index, layer in enumerate(reference.model.layers):
        name = f"layers.{index}"
        mixer = getattr(layer, "linear_attn", None) or layer.self_attn
        hooks += [
            (layer, keep(f"{name}.residual", lambda a, k, o: given(a, k))),
            (layer, keep(f"{name}.residual_out", lambda a, k, o: o)),
            (mixer, keep(f"{name}.mixer", lambda a, k, o: o[0] if isinstance(o, tuple) else o)),
            (layer.post_attention_layernorm, keep(f"{name}.residual_mid", lambda a, k, o: a[0])),
        ]
        if not hasattr(layer.mlp, "gate"):
            hooks.append((layer.mlp, keep(f"{name}.mlp", lambda a, k, o: o)))
        else:
            hooks += [
                (layer.mlp, keep(f"{name}.moe", lambda a, k, o: o)),
                (layer.mlp.gate, keep(f"{name}.router_logits", lambda a, k, o: o[0])),
                (layer.mlp.gate, keep(f"{name}.weights", lambda a, k, o: o[1])),
                (layer.mlp.gate, keep(f"{name}.ids", lambda a, k, o: o[2])),
                (layer.mlp.experts, keep(f"{name}.routed", lambda a, k, o: o)),
            ]
        if hasattr(layer.mlp, "shared_expert"):
            hooks += [
                (layer.mlp.shared_expert, keep(f"{name}.shared_expert", lambda a, k, o: o)),
                (layer.mlp.shared_expert_gate, keep(f"{name}.shared_gate", lambda a, k, o: o.sigmoid())),
            ]
        if hasattr(mixer, "in_proj_ba"):
            continue  # betas and decays come out of it together
        if hasattr(layer, "linear_attn"):
            hooks.append((mixer.in_proj_b, keep(f"{name}.beta", lambda a, k, o: o.sigmoid())))
            decay = functools.partial(_decay, mixer)
            hooks.append((mixer.in_proj_a, keep(f"{name}.decay", lambda a, k, o, f=decay: f(o))))
        else:
            hooks.append((mixer, keep(f"{name}.attention", lambda a, k, o: o[1])))
            hooks.append((mixer.v_proj, keep(f"{name}.values", lambda a, k, o: o)))
    hooks.append((reference.model.norm, keep("hidden", lambda a, k, o: o)))
    hooks.append((reference.model.embed_tokens, keep("embedding", lambda a, k, o: o)))
    _, ids = loaded(seed, model_type)
    found["logits"] = reference_run(seed, ids, hooks, model_type)
    return found


def _decay(mixer: Any, a: torch.Tensor) -> torch.Tensor:
    return (-mixer.A_log.exp() * torch.nn.functional.softplus(a + mixer.dt_bias)).exp()


def close(ours: Any, theirs: np.ndarray, what: str) -> None:
    ours = np.asarray(ours)
    np.testing.assert_allclose(
        ours, theirs.reshape(ours.shape), atol=TOLERANCE * np.abs(theirs).max(), rtol=0, err_msg=what
    )


POINTS = [(QWEN35_MOE, seed) for seed in SEEDS] + [(t, 0) for t in MODEL_TYPES if t != QWEN35_MOE]


@pytest.mark.parametrize(("model_type", "seed"), some(POINTS, lambda i: i >= 2))
def test_every_point_holds_what_the_references_modules_gave(model_type: str, seed: int) -> None:
    model, ids = loaded(seed, model_type)
    theirs = reference_points(seed, model_type)
    run = model.run([ids.tolist()], capture="*")
    assert list(run.captured) == list(model.points())
    close(run.logits, theirs["logits"], "logits")
    compared = 0
    for name in model.points():
        if name.endswith(".router"):
            np.testing.assert_array_equal(run[name].ids.array[0], theirs[name.replace("router", "ids")])
            close(run[name].weights, theirs[name.replace("router", "weights")], name)
        elif name.endswith(".experts"):
            close(run[name].array.sum(axis=2), theirs[name.replace("experts", "routed")], name)
        elif name in theirs:
            close(run[name], theirs[name], name)
        else:
            fused = (".beta", ".decay") if model_type == "qwen3_next" else ()
            assert name.endswith((".queries", ".keys", ".state", *fused))
            continue
        compared += 1
    assert compared >= (10 if model_type == QWEN35_MOE else 5) * model.config.num_hidden_layers


@pytest.mark.slow
def test_queries_and_keys_make_the_attention_and_states_are_those_of_shorter_prompts() -> None:
    model, ids = loaded(22)
    run = model.run([ids.tolist()], capture="*", states_at=(0, 63, 64, -1))
    layer = next(n for n in model.points() if n.endswith(".attention")).removesuffix(".attention")
    queries, keys = run[f"{layer}.queries"].array[0], run[f"{layer}.keys"].array[0]
    group = queries.shape[1] // keys.shape[1]
    scores = np.einsum("qhd,khd->hqk", queries, keys.repeat(group, axis=1)) / np.sqrt(queries.shape[-1])
    scores[:, np.triu_indices(LENGTH, 1)[0], np.triu_indices(LENGTH, 1)[1]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    close(run[f"{layer}.attention"].array[0], weights / weights.sum(axis=-1, keepdims=True), layer)
    states = run.matching("layers.*.state")
    assert states
    for place, length in enumerate((1, 64, 65, LENGTH)):
        short = model.run([ids[:length].tolist()], capture="layers.*.state")
        for name, state in states.items():
            close(short[name].array[0, 0], state.array[0, place], name)


@torch.no_grad()
@pytest.mark.parametrize("seed", [9, pytest.param(3, marks=pytest.mark.slow)])
def test_an_edit_does_what_the_same_change_does_to_the_reference(seed: int) -> None:
    model, ids = loaded(seed)
    reference = parity.random_model(seed).reference
    layer, hidden = reference.model.layers[0], model.config.hidden_size
    vector = np.random.default_rng(seed).normal(size=hidden).astype(np.float32)
    other = model.run([ids[::-1].tolist()], capture="layers.0.residual_out")["layers.0.residual_out"].array
    experts = model.config.num_experts

    def steered(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.from_numpy(vector)

    def eightfold(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        return 8 * output

    def patched(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, [2, 5]] = torch.from_numpy(other[:, [2, 5]])
        return output

    def forced(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        chosen = torch.arange(output[2].shape[1]).expand(output[2].shape)
        return output[0], torch.full_like(output[1], 1 / chosen.shape[1]), chosen

    def without(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        logits = output[0].clone()
        logits[:, 0] = -torch.inf
        weights, chosen = logits.softmax(-1).topk(output[2].shape[1])
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    slots = range(model.config.num_experts_per_tok)
    cases: list[tuple[torch.nn.Module, Any, str, Any]] = [
        (layer, steered, "layers.0.residual_out", experiments.add(vector)),
        (layer.mlp.shared_expert, eightfold, "layers.0.shared_expert", experiments.scale(8)),
        (layer, patched, "layers.0.residual_out", experiments.patch(other, positions=[2, 5])),
        (layer.mlp.gate, forced, "layers.0.router", experiments.force_experts(list(slots))),
    ]
    if experts > model.config.num_experts_per_tok:
        cases.append((layer.mlp.gate, without, "layers.0.router_logits", experiments.ablate_experts(0)))
    plain = np.asarray(model.logits([ids.tolist()]))[0]
    for module, hook, point, edit in cases:
        theirs = reference_run(seed, ids, [(module, hook)])
        ours = model.run([ids.tolist()], edit={point: edit}).logits.array[0]
        close(ours, theirs, point)
        assert np.abs(ours - plain).max() > 20 * TOLERANCE * np.abs(plain).max(), point


@pytest.mark.slow
def test_generation_is_edited_in_prefill_and_in_every_step_and_captured_in_each() -> None:
    model, ids = loaded(9)
    edit = {"layers.*.shared_expert": experiments.scale(8)}
    options = {"max_new_tokens": 6, "eos_token_id": []}
    prompt = [ids[:5].tolist()]
    out = model.generate(prompt, edit=edit, **options)
    tokens = list(prompt[0])
    for token in out.sequences[0]:  # one token at a time, each from a pass over the whole text
        logits = model.run([tokens], edit=edit).logits.array[0, -1]
        assert logits[token] >= logits.max() - 1e-3
        tokens.append(token)
    assert out.sequences != model.generate(prompt, **options).sequences
    run = model.run(prompt, capture="layers.0.router", edit=edit, **options)
    assert run.tokens == [tokens]
    assert run.prompt_tokens == [5]
    assert run["layers.0.router"].ids.shape[1] == len(tokens)


def test_rows_of_a_batch_are_captured_as_alone_and_blank_behind_their_ends() -> None:
    model, ids = loaded(3)
    rows = [ids[:3].tolist(), ids[:20].tolist()]
    both = model.run(rows, capture=["layers.*.residual", "layers.0.router"])
    for number, row in enumerate(rows):
        alone = model.run([row], capture="layers.*.residual")
        for name, value in alone.captured.items():
            close(both[name].array[number, : len(row)], value.array[0], name)
    assert np.isnan(both["layers.0.residual"].array[0, 3:]).all()
    assert (both["layers.0.router"].ids.array[0, 3:] == -1).all()
    counts = both["layers.0.router"].counts(model.config.num_experts)
    assert counts.sum() == 23 * model.config.num_experts_per_tok


MESHES = (
    ((2, 2, 2), {"attention": "data", "shared_expert": "sharded"}),
    ((1, 4, 2), {"shared_expert": "prescaled"}),
    ((1, 2, 2), {"expert_dispatch": "all_to_all", "shared_expert": "outside"}),
    ((1, 4, 1), {"expert_dispatch": "all_to_all", "attention": "data", "shared_expert": "prescaled"}),
    ((1, 2, 2), {"shared_expert": "fused"}),
    ((1, 2, 2), {"exact": True, "shared_expert": "outside"}),
)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "choices"), MESHES[:1])
def test_on_a_mesh_points_hold_what_they_hold_on_one_device(sizes, choices) -> None:
    check_mesh(sizes, choices)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "choices"), MESHES[1:])
def test_on_every_kind_of_mesh_points_hold_what_they_hold_on_one_device(sizes, choices) -> None:
    check_mesh(sizes, choices)


def check_mesh(sizes: tuple[int, int, int], choices: dict[str, Any]) -> None:
    case = mesh_case(6)
    rows = [row.tolist() for row in case.rows]
    one = QwenMoe.from_pretrained(case.folder, dtype="float32")
    mesh = QwenMoe.from_pretrained(case.folder, dtype="float32", mesh=make_mesh(*sizes), **choices)
    ours, theirs = mesh.run(rows, capture="*"), one.run(rows, capture="*")
    for name in one.points():
        if name.endswith(".router"):
            np.testing.assert_array_equal(ours[name].ids.array, theirs[name].ids.array, name)
            continue
        wanted = theirs[name].array
        scale = np.nanmax(np.abs(wanted))
        np.testing.assert_allclose(ours[name].array, wanted, atol=TOLERANCE * scale, err_msg=name)
    edit = {"layers.1.residual": experiments.scale(0.5)}
    mine, wanted = mesh.run(rows, edit=edit).logits.array, one.run(rows, edit=edit).logits.array
    np.testing.assert_allclose(mine, wanted, atol=TOLERANCE * np.nanmax(np.abs(wanted)))
    with pytest.raises(InputError, match="divided among the ranks"):
        mesh.run(rows, edit={"layers.0.shared_expert": experiments.scale(2)})


def test_what_is_not_asked_for_is_not_in_the_program() -> None:
    model, _ = loaded(3)
    forward = model._steps.forward
    none = Observer(forward, frozenset()).lowered_text(1, 16)
    some = Observer(forward, frozenset({"layers.0.attention", "layers.0.experts"} & set(model.points())))
    # every value that leaves the program is named in its entry's result

    def results(text: str) -> int:
        entry = text[text.index("ENTRY") :]
        return entry[: entry.index("{")].split("->")[1].count("f32[")

    assert results(some.lowered_text(1, 16)) == results(none) + 1
    plain = jax.jit(
        lambda params, tokens, valid, cache: forward.logits(
            params, forward.hidden(params, tokens, valid, cache)[0]
        )
    )
    cache = forward.new_cache(1, 64)
    lowered = plain.lower(
        forward.parameters, np.zeros((1, 16), np.int32), np.ones((1, 16), bool), cache
    ).compile()

    def products(text: str) -> int:
        return text.count("custom-call(") + text.count(" dot(")

    assert products(none) == products(lowered.as_text())


@pytest.mark.slow
def test_apply_is_the_model_with_the_references_gradients() -> None:
    model, ids = loaded(0)
    tokens = jnp.asarray(ids[None, :12])
    parameters = model.parameters
    logits = jax.jit(model.apply)(parameters, tokens)
    close(logits, np.asarray(model.logits([ids[:12].tolist()])), "logits")

    gradients = jax.grad(lambda p: jax.nn.logsumexp(model.apply(p, tokens)[0, -1]))(parameters)
    reference = parity.random_model(0).reference
    with torch.enable_grad():
        reference.zero_grad()
        theirs = reference(torch.from_numpy(np.array(tokens)), use_cache=False).logits[0, -1]
        theirs.logsumexp(-1).backward()
    compared, largest = 0, max(np.abs(value).max() for value in gradients.values())
    for key, weight in reference.named_parameters():
        name = canonical_name(key)
        assert name is not None
        wanted = weight.grad.numpy()
        scale = max(np.abs(wanted).max(), 1e-3 * largest)  # some are nothing but rounding
        np.testing.assert_allclose(gradients[name], wanted, atol=GRADIENT_TOLERANCE * scale, err_msg=name)
        compared += 1
    assert compared == len(gradients)
    reference.zero_grad()
    batched = jax.vmap(lambda row: model.apply(parameters, row[None])[0])(
        jnp.stack([tokens[0], tokens[0, ::-1]])
    )
    close(batched[0], np.asarray(logits[0]), "vmap")


def test_what_cannot_be_captured_or_edited_is_said_in_a_sentence() -> None:
    model, ids = loaded(3)
    rows = [ids[:4].tolist()]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"capture": "layers.0.ruoter"}, "'layers.0.ruoter' fits no point; did you mean 'layers.0.router'"),
        ({"capture": [3]}, "expected names of points"),
        ({"capture": None}, "capture is None"),
        ({"edit": [1]}, "edit is a list; expected a dict"),
        ({"edit": {"layers.0.residual": 5}}, "expected a function"),
        ({"edit": {"layers.0.residual": lambda a, b, c: a}}, "takes 3 arguments"),
        ({"capture": "layers.*.state", "states_at": (9,)}, "states_at names 9"),
        ({"do_sample": True}, "without max_new_tokens"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            model.run(rows, **given)
    with pytest.raises(ValueError, match=r"the edit of layers\.0\.residual gave shape"):
        model.run(rows, edit={"layers.0.residual": lambda x: x[:, :1]})
    with pytest.raises(InputError, match=r"was not captured; did you mean 'layers\.0\.residual'"):
        model.run(rows, capture="layers.0.residual")["layers.0.residuals"]


def test_arrays_say_their_axes_and_go_to_pandas_and_xarray() -> None:
    model, ids = loaded(3)
    run = model.run([ids[:4].tolist()], capture=["layers.0.router", "layers.0.residual"])
    routed = run["layers.0.router"].ids
    frame = routed.sel(batch=0).to_pandas()
    assert frame.shape == (4, model.config.num_experts_per_tok)
    assert (frame.columns.name, frame.index.name) == ("slot", "position")
    np.testing.assert_array_equal(frame.to_numpy(), routed.array[0])
    long = run["layers.0.residual"].to_pandas()
    assert list(long.columns) == ["batch", "position", "hidden", "layers.0.residual"]
    array = run["layers.0.residual"].to_xarray()
    assert array.dims == ("batch", "position", "hidden")
    np.testing.assert_array_equal(array.to_numpy(), run["layers.0.residual"].array)
    assert "batch 1, position 4, hidden" in repr(run["layers.0.residual"])
    part = routed.sel(batch=0, position=slice(1, 3))
    assert part.axes == ("position", "slot")
    np.testing.assert_array_equal(part, routed.array[0, 1:3])
    with pytest.raises(InputError, match="no axis 'layer'"):
        routed.sel(layer=0)
