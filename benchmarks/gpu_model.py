"""A model with random weights on one GPU: this library, transformers beside it, and what the time model says.

For `gpu.py`. The model has the 35B's layers, as many groups of four as come nearest to a tenth of the card.
"""

import dataclasses
import gc
import json
import math
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sizes import MROPE_SECTION, SIZES

from qwen_moe_jax.aot.assumptions import OPERATIONS, Assumptions
from qwen_moe_jax.aot.times import DECODING, READING, TimeModel
from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.devices import Device
from qwen_moe_jax.engine.forward import OneDeviceForward
from qwen_moe_jax.generation.api import QwenMoe
from qwen_moe_jax.generation.engine import Engine
from qwen_moe_jax.generation.loading import Loaded
from qwen_moe_jax.kernels.table import AMD, Kernels, make_kernels
from qwen_moe_jax.model.decoder import abstract_decoder, named_parameters, with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import abstract_mesh

BFLOAT16 = jnp.dtype(jnp.bfloat16)
TENTH = 0.1
GROUP = 4  # layers: three of Gated DeltaNet, one of attention
# Where a GPU is not AMD's, the kernels that the table has for those; Triton lowers them as well.
_PALLAS = {
    "experts": "pallas_grouped",
    "attention": "flash",
    "delta_step": "pallas_step",
    "delta_chunks": "pallas_chunks",
}


@dataclasses.dataclass(frozen=True)
class Work:
    """`steps` of decoding `rows` rows after `prompt` tokens each; 0 for the prompts alone."""

    rows: int
    prompt: int
    steps: int

    @property
    def name(self) -> str:
        """For tables."""
        if not self.steps:
            return f"prefill of {self.prompt:,} tokens"
        return f"decode, {self.rows} row{'s' if self.rows > 1 else ''} after {self.prompt:,}"


def works(rehearse: bool) -> list[Work]:
    """In order."""
    if rehearse:
        return [Work(1, 32, 0), Work(1, 32, 4), Work(2, 32, 4)]
    return [Work(1, 1000, 0), Work(1, 4000, 0), *(Work(rows, 1000, 64) for rows in (1, 8, 64))]


def sizes(rehearse: bool, memory: int | None) -> dict[str, Any]:
    """The config.json of the model.

    Args:
        rehearse: a tiny one.
        memory: bytes of the card.
    """
    file = resources.files("qwen_moe_jax.configs") / "qwen3.5-35b-a3b.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    if rehearse:
        found |= SIZES["tiny"] | {"eos_token_id": [1]}
    found["rope_parameters"] |= {"mrope_section": MROPE_SECTION[found["head_dim"]]}
    wanted = TENTH * (memory or 0)
    groups = range(1, found["num_hidden_layers"] // GROUP + 1)
    if rehearse:
        groups = range(1, 2)
    layers = GROUP * min(
        groups, key=lambda n: abs(bytes_of(found | {"num_hidden_layers": GROUP * n}) - wanted)
    )
    return found | {"num_hidden_layers": layers}


def bytes_of(config: dict[str, Any]) -> int:
    """Of the model in bfloat16."""
    shapes = parameter_shapes(ModelConfig.from_dict(config))
    return 2 * sum(int(np.prod(shape)) for shape in shapes.values())


def model_kernels(target: str, rehearse: bool) -> Kernels:
    """The table's on AMD GPUs; elsewhere the same kernels, in a rehearsal interpreted."""
    if target in AMD:
        return make_kernels(target)
    if target == "cpu":
        return make_kernels("cpu", _PALLAS, interpret=True) if rehearse else make_kernels("cpu")
    return Kernels(target, tuple(sorted(_PALLAS.items())))


def build(config: dict[str, Any], kernels: Kernels) -> QwenMoe:
    """The model with small normal values, drawn on the device one parameter at a time."""
    policy = DtypePolicy(compute=BFLOAT16, matrix=held_dtype(BFLOAT16, kernels))
    decoder = abstract_decoder(ModelConfig.from_dict(config), policy, kernels)
    draw = jax.jit(
        lambda key, struct: (0.02 * jax.random.normal(key, struct.shape, BFLOAT16)).astype(struct.dtype),
        static_argnums=1,
    )
    structs = named_parameters(decoder)
    keys = jax.random.split(jax.random.key(0), len(structs))
    values = {
        name: draw(key, jax.ShapeDtypeStruct(struct.shape, struct.dtype))
        for key, (name, struct) in zip(keys, structs.items(), strict=True)
    }
    forward = OneDeviceForward(with_parameters(decoder, values), kernels)
    loaded = Loaded(forward=forward, eos_token_ids=(), skipped={}, read_bytes=0)
    with tempfile.TemporaryDirectory() as folder:  # without a tokenizer
        return QwenMoe(loaded, Path(folder), None, kernels)


class Prompts:
    """Random ones, never the same again, so that no prefix cache has them."""

    def __init__(self, vocabulary: int):
        self._rng = np.random.default_rng(0)
        self._vocabulary = vocabulary

    def rows(self, work: Work) -> list[list[int]]:
        """Token ids of each row."""
        return self._rng.integers(2, self._vocabulary, (work.rows, work.prompt)).tolist()


def ours(engine: Engine, prompts: Prompts, repeat: int, work: Work) -> float:
    """Least seconds of a prompt up to its first token, or of a step of decoding: what `steps` further tokens
    of every row take, since an engine hands out up to 16 tokens at a time, and rows whose prompts were read
    first begin to decode before the last one is."""

    def least(tokens: int) -> float:
        options = {"max_new_tokens": tokens, "eos_token_id": [], "do_sample": False}
        found = []
        for _ in range(repeat + 1):  # the first one compiles
            rows = prompts.rows(work)
            started = time.perf_counter()
            for _ in engine.run(rows, options):
                pass
            found.append(time.perf_counter() - started)
        return min(found)

    if not work.steps:
        return least(1)
    return (least(1 + 3 * work.steps // 2) - least(1 + work.steps // 2)) / work.steps


class Transformers:
    """The PyTorch reference in bfloat16, through bare forward calls.

    Raises:
        ImportError: torch or transformers is not there, or torch has no such GPU; its text says which.
    """

    def __init__(self, config: dict[str, Any], device: str):
        try:
            import torch
            from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
        except ImportError as error:
            raise ImportError(f"transformers is not measured: {error}") from error
        if device != "cpu" and not torch.cuda.is_available():
            raise ImportError(f"transformers is not measured: torch {torch.__version__} sees no GPU here")
        self.torch, self.device = torch, "cpu" if device == "cpu" else "cuda"
        given = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
        with torch.device("meta"):
            model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**given))
        self.model = model.to(torch.bfloat16).to_empty(device=self.device).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.normal_(0, 0.02)
            for name, buffer in self.model.named_buffers():  # of rotary embedding, which no checkpoint holds
                if name.endswith("inv_freq"):
                    buffer.copy_(torch.logspace(0, -7, buffer.numel()))

    def seconds(self, prompts: Prompts, repeat: int, work: Work) -> float:
        """As of `ours`."""
        return min(self._once(work, prompts) for _ in range(repeat + 1))

    def _once(self, work: Work, prompts: Prompts) -> float:
        torch = self.torch
        ids = torch.as_tensor(prompts.rows(work), device=self.device)
        with torch.inference_mode():
            start = self._now()
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            if not work.steps:
                return self._now() - start
            start = self._now()
            for _ in range(work.steps):
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            return (self._now() - start) / work.steps

    def _now(self) -> float:
        if self.device != "cpu":
            self.torch.cuda.synchronize()
        return time.perf_counter()


def free() -> None:
    """Lets go of what nobody holds."""
    gc.collect()


def one_device(config: dict[str, Any]) -> Layout:
    """The model's, without a mesh."""
    return Layout(ModelConfig.from_dict(config), abstract_mesh(1, 1, 1), ragged=True)


def predicted(config: dict[str, Any], work: Work, device: Device, assumptions: Assumptions) -> float:
    """Seconds by the time model, of the same that `ours` measures."""
    layout = one_device(config)
    policy = DtypePolicy(compute=BFLOAT16, matrix=BFLOAT16)
    model = TimeModel(layout, policy, device, assumptions, DECODING, READING)
    if work.steps:
        return model.decode(work.rows, work.prompt + work.steps // 2).seconds
    # all but the last token are prefilled, and that one is decoded
    return model.prompt(work.prompt - 1) + model.decode(1, work.prompt - 1).seconds


def measured_card(
    name: str, memory: int | None, bandwidth: float, flops: float, launch: float
) -> tuple[Device, Assumptions]:
    """A device as this run found it, so that a prediction needs no data sheet."""
    device = Device(
        name=name,
        memory=memory or 0,
        arch="",
        compute_units=0,
        lds_bytes=0,
        bandwidth=bandwidth,
        clock_ghz=math.inf,  # not measured: what waits in a chain counts nothing
        peak_flops={"bfloat16": flops},
        link_bandwidth=1,
    )
    assumptions = Assumptions(
        memory=1,
        flops={"bfloat16": 1},
        launch=0,
        gap=launch,
        latency=dict.fromkeys(OPERATIONS, 0),
        links={8: 1},
        network_latency=0,
        network_bandwidth=1,
    )
    return device, assumptions
