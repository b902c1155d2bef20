"""`LoadedModel`: a checkpoint in memory, and how it is saved, described and checked."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_moe_jax.checkpoint.inspect import layers_in_words
from qwen_moe_jax.checkpoint.layout import count_parameters, held_in_words, parameter_forms, parameter_shapes
from qwen_moe_jax.checkpoint.orbax import save_orbax
from qwen_moe_jax.checkpoint.parts import holds_part, mtp_forms, mtp_shapes, part_keys, read_part
from qwen_moe_jax.checkpoint.stored_config import read_config
from qwen_moe_jax.checkpoint.writer import write_safetensors
from qwen_moe_jax.config import SPARSE, ModelConfig
from qwen_moe_jax.engine.drafting import check_drafts, default_drafts
from qwen_moe_jax.engine.logits import SequenceLogits
from qwen_moe_jax.engine.scoring import Scorer
from qwen_moe_jax.engine.steps import Steps
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.experiments.runs import CompiledPasses
from qwen_moe_jax.generation.chat import ChatTemplate
from qwen_moe_jax.generation.compile_cache import enable_compilation_cache
from qwen_moe_jax.generation.defaults import read_defaults
from qwen_moe_jax.generation.describe import ModelDescription, describe_model
from qwen_moe_jax.generation.guiding import Guiding
from qwen_moe_jax.generation.loading import (
    Loaded,
    compute_dtype,
    load_forward,
    resolve_folder,
    with_stored_scales,
)
from qwen_moe_jax.generation.parts import load_mtp
from qwen_moe_jax.generation.tokenizer import Tokenizer
from qwen_moe_jax.kernels.table import Kernels, make_kernels
from qwen_moe_jax.kernels.target import current_target
from qwen_moe_jax.model.decoder import Decoder
from qwen_moe_jax.model.mtp import MTP, MtpHead
from qwen_moe_jax.parallel.choose import choose_layout
from qwen_moe_jax.parallel.layout import Layout

if TYPE_CHECKING:
    from qwen_moe_jax.layout_check import LayoutReport

# Rows that are computed together at most where nobody says how many.
MAX_ROWS = 64


class LoadedModel:
    """A Qwen3.5 MoE text model with its tokenizer.

    Attributes:
        config: the model's sizes and options, one field for each value of config.json that matters.
        tokenizer: the checkpoint's own, or None.
        chat_template: the checkpoint's own, or None.
        dtype: the compute dtype.
        folder: where it was loaded from.
        skipped: families of tensors in the checkpoint that text generation does not use, with their
            number (the vision tower, multi-token prediction); the model does not hold them, and `load_part`
            reads them.
        layout: how it lies on its mesh, with the shared expert's mode that "auto" picked; None on one device.
        kernels: the table of implementations, with what was asked for.
        read_bytes: bytes of weights that this process read from files.
        sequence_logits: the compiled forward that `logits` uses.
        draft_tokens: that multi-token prediction drafts at most for a step; 0 where it does not.
        generation_defaults: what the checkpoint's generation_config.json sets, which holds where a call says
            nothing else.
    """

    def __init__(self, loaded: Loaded, folder: Path, layout: Layout | None, kernels: Kernels):
        decoder = loaded.forward.decoder
        self.config: ModelConfig = decoder.config
        self.dtype: jnp.dtype = decoder.dtypes.compute
        self.tokenizer = Tokenizer.from_folder(folder)
        self.chat_template = ChatTemplate.from_folder(folder)
        self.folder = folder
        self.skipped = loaded.skipped
        self.layout = layout
        self.kernels = kernels
        self.read_bytes = loaded.read_bytes
        self.sequence_logits = SequenceLogits(loaded.forward)
        self.draft_tokens = loaded.forward.draft_tokens
        self._steps = Steps(loaded.forward)
        self._passes = CompiledPasses(loaded.forward)
        self._scorers: dict[tuple[Any, ...], Scorer] = {}
        self._decoder = decoder
        self._parameters = loaded.forward.parameters
        self.generation_defaults = read_defaults(folder)
        self._guiding = Guiding(self.tokenizer, self.config.vocab_size)
        self._eos_ids = loaded.eos_token_ids
        if not self._eos_ids and self.tokenizer and self.tokenizer.eos_token_id is not None:
            self._eos_ids = (self.tokenizer.eos_token_id,)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
        shared_expert: str = "auto",
        expert_dispatch: str = "psum",
        exact: bool = False,
        attention: str = "tensor",
        sums: str = "auto",
        draft_tokens: int | str = "auto",
        kernels: str | Mapping[str, str] = "auto",
        progress: bool = False,
        compilation_cache: str | Path | None = "auto",
    ) -> Self:
        """Loads a checkpoint onto the default device or a mesh.

        Args:
            path: a local folder in Hugging Face or Orbax layout, or a hub id where huggingface_hub is
                installed and can reach it.
            dtype: jnp.float32, jnp.bfloat16, or "auto" for the checkpoint's own. On a CPU without the C++
                kernels large matrices are held in float32 either way (see `model/linear.py`); the results are
                the dtype's.
            mesh: from `make_mesh`; None means the default device.
            shared_expert: how the shared expert is divided: "prescaled", "outside", "sharded", "fused" (see
                `parallel/expert_dispatch.py`), or "auto", which measures them on this mesh and takes the
                fastest; `model.layout.shared_expert` says which.
            expert_dispatch: "psum" (every rank of the expert axis sees every token) or "all_to_all" (tokens
                are sent to the ranks of their experts).
            exact: logits equal bit by bit for every size of the expert axis, at the price that attention is
                not divided along it and that the experts' sum moves top_k times the bytes. Drafts are then
                verified token by token: the text is the same without exception, and comes no sooner.
            attention: what the expert axis is to everything but the experts: "tensor" (more slices of heads
                and vocabulary) or "data" (other rows of the batch).
            sums: what sums over ranks travel in: "compute" (the compute dtype: in bfloat16 half the bytes),
                "float32", or "auto", which is "float32" with exact, else "compute".
            draft_tokens: how many tokens multi-token prediction drafts at most for a step, in each row as
                long as its drafts hold; 0 leaves it out, "auto" is 0 on a CPU and 3 elsewhere, where the
                checkpoint holds it (`engine/drafting.py`). The text is the same with any number, but where
                two tokens are equally likely within rounding.
            kernels: which implementation of each operation runs: "auto" for the table of `kernels/table.py`,
                "xla" for no kernel of this library's own, or operation -> implementation, such as
                {"experts": "grouped"}; `describe()` says which run.
            progress: shows a bar on stderr.
            compilation_cache: where compiled programs are kept for the next process: "auto" (a folder in
                the user's cache), a folder, or None to keep none.

        Raises:
            CheckpointNotFoundError: no such folder, or a file in it is missing.
            CheckpointError: the checkpoint is damaged or does not fit its configuration.
            ConfigError: config.json asks for something that is not implemented.
            InputError: another dtype, or a layout that does not exist.
        """
        folder = resolve_folder(path)
        config = read_config(folder)
        enable_compilation_cache(compilation_cache)
        table = make_kernels(current_target(), kernels)
        compute = compute_dtype(dtype, folder, config)
        layout = choose_layout(
            config,
            mesh,
            compute=compute,
            kernels=table,
            shared_expert=shared_expert,
            expert_dispatch=expert_dispatch,
            exact=exact,
            attention=attention,
            sums=sums,
        )
        drafts = _drafts_of(draft_tokens, folder, table, exact=exact)
        loaded = load_forward(folder, config, compute, table, progress, layout, drafts, exact=exact)
        return cls(loaded, folder, layout, table)

    def __repr__(self) -> str:
        """A card of a few lines; `describe()` says everything."""
        return "\n".join(f"{name:<12}{value}" for name, value in self._card())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._card()
        )
        return f"<table>{rows}</table>"

    def _card(self) -> list[tuple[str, str]]:
        config = self.config
        sparse = config.mlp_types.count(SPARSE)
        where = "each layer" if sparse == len(config.layers) else f"{sparse} layers"
        shared = ", and a shared one" if config.shared_expert_intermediate_size else ""
        experts = f"{config.num_experts}, {config.num_experts_per_tok} a token{shared}, in {where}"
        count = count_parameters(parameter_shapes(config), parameter_forms(config))
        lines = [
            ("QwenMoe", self.folder.name),
            ("layers", f"{len(config.layers)} of width {config.hidden_size}: {layers_in_words(config)}"),
            *([("experts", experts)] if sparse else []),
            ("parameters", f"{count:,} in {held_in_words(config, self.dtype.name)}"),
            ("context", f"{config.max_position_embeddings:,} tokens, vocabulary {config.vocab_size:,}"),
            ("on", str(self.layout) if self.layout else f"one device ({self.kernels.target})"),
        ]
        if self.draft_tokens:
            lines.append(("drafts", f"{self.draft_tokens} tokens a step at most"))
        return lines

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, by the checkpoint."""
        return self._eos_ids

    @property
    def decoder(self) -> Decoder:
        """The text model as a module that holds its parameters; `load_part("mtp")` takes its outputs.

        Raises:
            InputError: the model lies on a mesh, where no module holds all of it.
        """
        if self.layout is not None:
            raise InputError(
                "the model lies on a mesh, where no module holds all of it; load it without mesh."
            )
        return self._decoder

    @overload
    def load_part(self, name: Literal["mtp"], *, progress: bool = False) -> MtpHead: ...
    @overload
    def load_part(self, name: Literal["visual"], *, progress: bool = False) -> dict[str, jax.Array]: ...
    def load_part(self, name: str, *, progress: bool = False) -> MtpHead | dict[str, jax.Array]:
        """Reads a part of the checkpoint that text generation does not use, onto the default device.

        The model stays as it is: neither `generate` nor saving uses the part, and `skipped` goes on
        naming it.

        Args:
            name: "mtp" for multi-token prediction, "visual" for the vision tower.
            progress: shows a bar on stderr.

        Returns:
            For "mtp" an `MtpHead` that computes in the model's dtype, to be called with what `decoder` gives.
            For "visual" the tower's parameters, canonical name -> array, matrices in the model's dtype and
            the rest in float32: its forward is no part of text generation and is not implemented.

        Raises:
            CheckpointError: the checkpoint does not hold the part, or it is damaged or does not fit.
            ConfigError: config.json does not describe the part, or something that is not implemented.
            InputError: no such part, or multi-token prediction of a model that lies on a mesh.
        """
        part_keys(name)  # refuses other names
        if name == "visual":
            return read_part(self.folder, name, config=self.config, dtype=self.dtype, progress=progress)[0]
        if self.layout is not None:
            raise InputError(
                "the model lies on a mesh, but multi-token prediction is implemented on one device only; "
                "load the model without mesh."
            )
        return load_mtp(self.folder, self.config, self.dtype, self.kernels, progress=progress)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the Hugging Face layout, which transformers loads, with tokenizer and chat template, and
        with multi-token prediction where the model drafts."""
        text, mtp = self._stored()
        write_safetensors(
            path, text, self.config, dtype=self.dtype, extra_files_from=self.folder, mtp=mtp or None
        )

    def save_orbax(self, path: str | Path) -> None:
        """Writes the Orbax layout, which `from_pretrained` loads, with tokenizer and chat template, and with
        multi-token prediction where the model drafts."""
        text, mtp = self._stored()
        save_orbax(path, text, self.config, dtype=self.dtype, extra_files_from=self.folder, mtp=mtp or None)

    def describe(self, *, context: int | None = None, device: str | None = None) -> ModelDescription:
        """What the model is, how it lies on its devices, and the memory it takes there.

        Args:
            context: tokens of a sequence, for the sizes of caches; None means the model's longest.
            device: "mi300x", "mi325x", "mi355x" or "h100": also say what fits on such.

        Raises:
            InputError: another device, or a context that is no positive number.
        """
        return describe_model(
            self.folder,
            self.config,
            self.dtype,
            self.layout,
            self.kernels,
            context=context,
            device=device,
            draft_tokens=self.draft_tokens,
        )

    def _stored(self) -> tuple[Any, Any]:
        """The parameters as a checkpoint has them: the text model's, and those of multi-token prediction."""
        found = []
        for own, shapes, forms in (
            (False, parameter_shapes(self.config), parameter_forms(self.config)),
            (True, mtp_shapes(self.config, 1), mtp_forms(self.config, 1)),
        ):
            held = {
                name.removeprefix(MTP): value
                for name, value in self._parameters.items()
                if name.startswith(MTP) == own
            }
            if held and self.layout is not None:
                held = self.layout.stored(held, shapes, forms)
            elif held and forms:
                held = with_stored_scales(shapes, forms, held)
            found.append(held)
        return found[0], found[1]

    def check_layout(self, *, seed: int = 0, progress: bool = False) -> "LayoutReport":
        """Compares the mesh with one device on random tokens, layer by layer and branch by branch.

        The one device's weights are read from the checkpoint, a layer at a time.

        Args:
            seed: of the tokens.
            progress: shows a bar on stderr.

        Raises:
            InputError: the model lies on one device.
        """
        from qwen_moe_jax.layout_check import check_layout

        if self.layout is None:
            raise InputError(
                "the model lies on one device; load it with mesh=make_mesh(...) to check a layout."
            )
        return check_layout(
            self.folder,
            self.layout,
            self.dtype,
            self.kernels,
            parameters={n: value for n, value in self._parameters.items() if not n.startswith(MTP)},
            seed=seed,
            progress=progress,
        )


def _drafts_of(asked: Any, folder: Path, kernels: Kernels, *, exact: bool) -> int:
    """How many tokens a model drafts for a step."""
    if asked == "auto":  # with exact=True drafts gain nothing
        most = 0 if exact else default_drafts(kernels)
        return most if most and holds_part(folder, "mtp") else 0
    check_drafts(asked)
    return asked
