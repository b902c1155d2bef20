"""The one table that says which implementation runs, by target, dtype and number of tokens.

A *target* is what programs are compiled for: "cpu", an AMD architecture ("gfx942" is MI300X and MI325X,
"gfx950" is MI355X), or "gpu" for any other. Implementations of one operation compute the same, but for the
one that says otherwise; their names:

    embedding    lookup                      plain XLA
                 native
    linear       products                    plain XLA (`model/linear.py`)
                 native                      C++ (`cpu/`), as are the others of this name
    experts      gathered, grouped, dense    plain XLA (`model/experts.py`)
                 pallas_gathered             kernels that read a slot's matrices (`gathered_matmul.py`)
                 pallas_grouped              kernels over sorted tiles (`grouped_matmul.py`)
                 native
    attention    blockwise                   plain XLA (`model/attention.py`)
                 whole                       plain XLA, all scores at once; it has a gradient
                 flash                       a kernel (`flash_attention.py`)
                 native
    conv         shifts                      plain XLA (`model/delta_net.py`)
                 native
    delta_step   products                    plain XLA (`model/delta_rule.py`)
                 pallas_step                 a kernel (`delta_step.py`)
                 native
    delta_chunks products                    plain XLA (`model/delta_rule.py`)
                 pallas_chunks               a kernel (`delta_chunks.py`), behind plain XLA's convolution
                 native
    scaled       multiplied_out              plain XLA: a matrix of codes is widened, then multiplied
                 pallas_tiles                a kernel that widens tiles as it reads them (`scaled_matmul.py`)
                 pallas_float8x8             a kernel that multiplies e4m3 by e4m3 (`float8x8_matmul.py`). It
                                             quantises activations, so its numbers are others, and it runs
                                             only where it is asked for. Other codes run pallas_tiles.
                 native

CPU: measured (`benchmarks/README.md`); the C++ kernels apply where they could be built. AMD GPUs: reasoned
from compiled programs, the bytes and FLOPs they name and the memory they take; nothing was timed on one.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.cpu.build import native_variant

AMD = ("gfx942", "gfx950")
TARGETS = ("cpu", *AMD, "gpu")
XLA, PALLAS, NATIVE = "xla", "pallas", "native"

# Operation -> its implementations, and what they are made with.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "embedding": {"lookup": XLA, "native": NATIVE},
    "linear": {"products": XLA, "native": NATIVE},
    "experts": {
        "gathered": XLA,
        "grouped": XLA,
        "dense": XLA,
        "pallas_gathered": PALLAS,
        "pallas_grouped": PALLAS,
        "native": NATIVE,
    },
    "attention": {"blockwise": XLA, "whole": XLA, "flash": PALLAS, "native": NATIVE},
    "conv": {"shifts": XLA, "native": NATIVE},
    "delta_step": {"products": XLA, "pallas_step": PALLAS, "native": NATIVE},
    "delta_chunks": {"products": XLA, "pallas_chunks": PALLAS, "native": NATIVE},
    "scaled": {
        "multiplied_out": XLA,
        "pallas_tiles": PALLAS,
        "pallas_float8x8": PALLAS,
        "native": NATIVE,
    },
}

# No kernel of our own, for operations whose plain form does not depend on the target.
PLAIN = {
    "attention": "blockwise",
    "conv": "shifts",
    "delta_step": "products",
    "delta_chunks": "products",
    "scaled": "multiplied_out",
    "linear": "products",
    "embedding": "lookup",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        operation: a key of `IMPLEMENTATIONS`.
        targets: it is for.
        dtypes: compute dtypes that it is for, None for any.
        up_to: most of what decides (see `decides`), None for no limit. Of several lines the first that fits.
        implementation: that runs.
        why: in a few words.
    """

    operation: str
    targets: tuple[str, ...]
    dtypes: tuple[str, ...] | None
    up_to: float | None
    implementation: str
    why: str


# What `up_to` bounds, by operation.
DECIDES = {
    "embedding": "tokens",
    "linear": "tokens",
    "experts": "slots (tokens x top_k) an expert",
    "attention": "tokens a row",
    "conv": "tokens a row",
    "delta_step": "tokens a row",
    "delta_chunks": "tokens a row",
    "scaled": "tokens",
}

_BF16 = ("bfloat16",)
_NATIVE = ("float32", "bfloat16")
_ANY = TARGETS
TABLE: tuple[Rule, ...] = (
    Rule("embedding", ("cpu",), _NATIVE, None, "native", "XLA:CPU widens a whole bfloat16 table"),
    Rule("embedding", _ANY, None, None, "lookup", "a gather"),
    Rule("linear", ("cpu",), _NATIVE, None, "native", "matrices are read once, at memory speed; measured"),
    Rule("linear", _ANY, None, None, "products", "matrix products"),
    Rule("experts", ("cpu",), _NATIVE, None, "native", "slots sorted by expert; measured"),
    Rule("experts", ("cpu",), None, 2, "gathered", "a row multiplies in place; measured"),
    Rule("experts", ("cpu",), None, None, "grouped", "blocks of one expert; measured"),
    Rule("experts", AMD, _BF16, 0.25, "pallas_gathered", "hardly two slots share an expert; no sort"),
    Rule("experts", AMD, _BF16, None, "pallas_grouped", "each expert's matrices are read once"),
    Rule("experts", _ANY, None, 1, "gathered", "a slot reads its matrices in place"),
    Rule("experts", _ANY, None, None, "grouped", "blocks of one expert"),
    Rule("attention", AMD, _BF16, None, "flash", "one pass over the cache, heads of a group together"),
    Rule("attention", ("cpu",), _NATIVE, None, "native", "keys appended in place and read once; measured"),
    Rule("attention", _ANY, None, None, "blockwise", "a loop over blocks of keys"),
    Rule("conv", ("cpu",), _NATIVE, None, "native", "convolution, SiLU and norms in one pass; measured"),
    Rule("conv", _ANY, None, None, "shifts", "shifted inputs, added up"),
    Rule("delta_step", AMD, None, None, "pallas_step", "the state is read once and written once"),
    Rule("delta_step", ("cpu",), _NATIVE, None, "native", "the state changes in place; measured"),
    Rule("delta_step", _ANY, None, None, "products", "matrix products; measured on CPU"),
    Rule("delta_chunks", AMD, None, None, "pallas_chunks", "chunks stay on the chip, inputs are read once"),
    Rule("delta_chunks", ("cpu",), _NATIVE, None, "native", "a head's chunks stay in cache; measured"),
    Rule("delta_chunks", _ANY, None, None, "products", "chunks of matrix products"),
    Rule("scaled", AMD, _BF16, 1024, "pallas_tiles", "the widened matrix never meets the memory"),
    Rule("scaled", ("cpu",), _NATIVE, None, "native", "widened as it is read; measured"),
    Rule("scaled", _ANY, None, None, "multiplied_out", "the compiler fuses, or writes the matrix once"),
)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which implementation runs, for one target.

    Attributes:
        target: one of `TARGETS`.
        chosen: (operation, implementation) that win over the table.
        interpret: Pallas kernels are evaluated by XLA instead of compiled: slow, for tests on any target.
        native: which variant of the C++ kernels is loaded (`cpu/build.py`), None for none: then the table's
            lines for them do not apply.
        expected_keys: that a row is taken to have where attention's cost is written into the program; None
        for
            as many as its pages may hold. It changes nothing else.
    """

    target: str
    chosen: tuple[tuple[str, str], ...] = ()
    interpret: bool = False
    native: str | None = None
    expected_keys: int | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise InputError(f"the target is {self.target!r}; expected one of {', '.join(TARGETS)}.")

    def rule(self, operation: str, dtype: str, amount: float) -> Rule:
        """The line that decides.

        Args:
            operation: a key of `IMPLEMENTATIONS`.
            dtype: name of the compute dtype.
            amount: of what decides, see `DECIDES`.
        """
        explicit = dict(self.chosen).get(operation)
        if explicit is not None:
            return Rule(operation, (self.target,), None, None, explicit, "asked for")
        return next(
            rule for rule in self._lines(operation, dtype) if rule.up_to is None or amount <= rule.up_to
        )

    def pick(self, operation: str, dtype: str, amount: float) -> str:
        """The implementation that runs; arguments as of `rule`."""
        return self.rule(operation, dtype, amount).implementation

    def _lines(self, operation: str, dtype: str) -> list[Rule]:
        """The lines that apply, down to the first without a limit."""
        found: list[Rule] = []
        for rule in TABLE:
            if rule.operation != operation or self.target not in rule.targets:
                continue
            native = IMPLEMENTATIONS[operation][rule.implementation] == NATIVE
            if (self.native or not native) and (rule.dtypes is None or dtype in rule.dtypes):
                found.append(rule)
                if rule.up_to is None:
                    break
        return found

    @property
    def variant(self) -> str:
        """The loaded variant of the C++ kernels.

        Raises:
            ValueError: none is.
        """
        if self.native is None:
            raise ValueError("no C++ kernels are loaded")
        return self.native

    @property
    def widening(self) -> str:
        """How XLA widens float8_e4m3fn here, exactly either way.

        "native" where the hardware's float8 is this one, "fnuz" where it is e4m3fnuz, "bits" through the bits
        of a float16; see `formats/block_scaled.py`.
        """
        return {"gfx950": "native", "gfx942": "fnuz"}.get(self.target, "bits")

    @property
    def kernel_widening(self) -> str:
        """The same inside a Pallas kernel, which cannot convert from e4m3fnuz."""
        return "native" if self.target == "gfx950" else "bits"

    @property
    def float8(self) -> jnp.dtype:
        """The 8-bit float that matrix units multiply here, for kernels that multiply it."""
        return jnp.dtype(jnp.float8_e4m3fnuz if self.target == "gfx942" else jnp.float8_e4m3fn)

    @property
    def compiler_options(self) -> dict[str, str | bool] | None:
        """What XLA is told for this target, or None.

        Merging products of the same activations would write the matrices behind one another, in every step. A
        loop replayed as a HIP graph (a command buffer) is reported to crash (openxla/xla issue 46952, gfx950,
        ROCm 7.1), and decoding is a loop; AMD's installation page switches them off, too.
        """
        if self.target not in AMD:
            return None
        return {"xla_gpu_dot_merger_threshold_mb": "0", "xla_gpu_enable_command_buffer": ""}

    def lines(self, dtype: str, operations: tuple[str, ...] = tuple(IMPLEMENTATIONS)) -> list[str]:
        """The table as it applies here, for people."""
        lines = []
        explicit = dict(self.chosen)
        if self.target == "cpu":
            kernels = f"{self.native} variant" if self.native else "none, plain XLA only"
            lines.append(f"  {'C++ kernels':<14}{kernels}")
        for operation in operations:
            if operation in explicit:
                lines.append(f"  {operation:<14}{explicit[operation]}, asked for")
                continue
            for rule in self._lines(operation, dtype):
                limit = "" if rule.up_to is None else f" up to {rule.up_to:g} {DECIDES[operation]}"
                lines.append(f"  {operation:<14}{rule.implementation}{limit}: {rule.why}")
        return lines


def make_kernels(
    target: str, asked: "str | Mapping[str, str]" = "auto", *, interpret: bool = False
) -> Kernels:
    """The table for a target, with what the user asked for.

    Args:
        target: one of `TARGETS`.
        asked: "auto" for the table alone, "xla" for no kernel of our own anywhere, or operation ->
            implementation.
        interpret: see `Kernels`.

    Raises:
        InputError: an unknown operation or implementation, or a kernel that the target cannot run.
    """
    native = native_variant() if target == "cpu" and asked != "xla" else None
    if asked == "auto":
        return Kernels(target, interpret=interpret, native=native)
    if asked == "xla":
        # elsewhere the table has nothing else for experts
        asked = PLAIN | ({"experts": "grouped"} if target in AMD else {})
    if not isinstance(asked, Mapping):
        raise InputError(f'kernels is {asked!r}; expected "auto", "xla" or a mapping of operations.')
    for operation, implementation in asked.items():
        known = IMPLEMENTATIONS.get(operation)
        if known is None:
            raise InputError(f"kernels names {operation!r}; operations are {', '.join(IMPLEMENTATIONS)}.")
        if implementation not in known:
            raise InputError(
                f"kernels asks for {operation} by {implementation!r}; it is done by {', '.join(known)}."
            )
        if known[implementation] == PALLAS and target not in AMD and not interpret:
            raise InputError(
                f"kernels asks for {operation} by {implementation!r}, a kernel for {' and '.join(AMD)}, and "
                f"this is {target}; leave it to the table."
            )
        if known[implementation] == NATIVE and native is None:
            why = "none could be built here" if target == "cpu" else f"this is {target}"
            raise InputError(
                f"kernels asks for {operation} by {implementation!r}, a C++ kernel for CPUs, and {why}; "
                "leave it to the table."
            )
    return Kernels(target, tuple(sorted(asked.items())), interpret, native)
