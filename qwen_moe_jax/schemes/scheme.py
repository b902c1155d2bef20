"""Schemes: how a matrix is stored in few bits, and the rules that say which matrix has which."""

import dataclasses
import re
from functools import cached_property, lru_cache

# What a module may be called in front of its name inside the text model.
_PREFIXES = ("model.language_model.", "model.", "language_model.model.", "")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one matrix [out, in] is stored.

    Attributes:
        codes: number format, a key of `formats.codes.CODES`.
        group: rows and columns that a scale is for; 0 means all of them.
        packing: how its tensors are called and packed, a key of `checkpoint.packing.PACKINGS`.
        zeros: whether zero points are stored.
        scale_dtype: of the scales; None until the files have been looked at.
    """

    codes: str
    group: tuple[int, int]
    packing: str
    zeros: bool = False
    scale_dtype: str | None = None

    def __str__(self) -> str:
        rows, columns = self.group
        if rows == 1:
            scales = f"groups of {columns}" if columns else "one scale a row"
        else:
            scales = f"blocks of {rows} x {columns}" if rows else "one scale a matrix"
        return f"{self.codes}, {scales}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """The scheme of all modules whose names fit.

    Attributes:
        patterns: regular expressions that a name is to match from its beginning, or `CLASS` for every linear
            layer.
        scheme: of these modules; None means that they are not quantised.
        names: that fit as they are.
        inside: whether a module also fits that lies inside one of those names.
    """

    patterns: tuple[str, ...]
    scheme: Scheme | None
    names: frozenset[str] = frozenset()
    inside: bool = False

    def fits(self, names: tuple[str, ...]) -> bool:
        """Whether any of a module's names does."""
        if self.names and any(
            _outer(name) & self.names if self.inside else name in self.names for name in names
        ):
            return True
        return any(_fits(pattern, names) for pattern in self.patterns)


# Fits every module that is a linear layer in the reference.
CLASS = "<linear>"

# Products in the reference that are no `torch.nn.Linear` (the router), so that naming the class does not mean
# them.
NEVER_LINEAR = ("mlp.gate",)


# Digits of a pattern that are no expert's number: a layer's, a class of digits, a repetition, a name.
_NO_EXPERT = re.compile(r"layers\W{0,3}[\d|]+|\\d|\{\d+(,\d*)?\}|conv1d")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which matrices of a checkpoint are quantised; a value of config.json's `quantization_config`.

    Attributes:
        method: `quant_method`, as the file spells it.
        rules: of which the first that fits a module holds; a module that none fits is not quantised.
        source: the file's own words, as JSON.
    """

    method: str
    rules: tuple[Rule, ...]
    source: str

    def scheme(self, module: str, root: str = "model.") -> Scheme | None:
        """The scheme of a module, or None if it is not quantised.

        Args:
            module: its name inside the text model (`layers.0.mlp.experts.3.up_proj`), or inside a part.
            root: "model." for the text model, or what the part's keys begin with ("mtp.").
        """
        names = tuple(p + module for p in _PREFIXES) if root == "model." else (root + module,)
        for rule in self.rules:
            if rule.fits(names):
                return rule.scheme
        return None

    @cached_property
    def same_for_all_experts(self) -> bool:
        """Whether no pattern holds a number that could be an expert's, so that looking at one is enough."""
        said = [text for rule in self.rules for text in (*rule.patterns, *rule.names)]
        return not any(re.search(r"\d", _NO_EXPERT.sub("", text)) for text in said)

    def schemes(self) -> tuple[Scheme, ...]:
        """All that occur, each once."""
        return tuple(dict.fromkeys(rule.scheme for rule in self.rules if rule.scheme is not None))

    def with_scales_in(self, dtype: str) -> "Quantization":
        """The same with scales of a dtype, where a scheme leaves it open."""
        rules = tuple(
            rule
            if rule.scheme is None or rule.scheme.scale_dtype is not None
            else dataclasses.replace(rule, scheme=dataclasses.replace(rule.scheme, scale_dtype=dtype))
            for rule in self.rules
        )
        return dataclasses.replace(self, rules=rules)


def _outer(name: str) -> set[str]:
    """A module's name, and those of the modules that it lies in."""
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def _fits(pattern: str, names: tuple[str, ...]) -> bool:
    if pattern == CLASS:
        return not names[-1].endswith(NEVER_LINEAR)
    compiled = _compiled(pattern)
    return any(compiled.match(name) for name in names)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
