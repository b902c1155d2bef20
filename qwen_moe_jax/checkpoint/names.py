"""Canonical names of parameters, and the keys of a checkpoint that mean them.

A *canonical name* is a Hugging Face key without its `model.` or `model.language_model.` prefix, which is
also the module path of the parameter, e.g. `layers.0.linear_attn.in_proj_qkv.weight`.
"""

_MULTIMODAL_PREFIX = "model.language_model."
_TEXT_PREFIX = "model."
LM_HEAD = "lm_head.weight"

# Parts that a checkpoint may hold beside the text model, and what their keys begin with (see `parts.py`).
PART_PREFIXES = {"visual": "model.visual.", "mtp": "mtp."}

# Behind the name of a matrix of codes, the names of its scales and of its zero points.
_SCALE, _ZERO = "_scale_inv", "_zero_point"

# Small, and read in float32: everything else is a matrix of a product or a lookup table.
_VECTOR_ENDINGS = ("norm.weight", "conv1d.weight", "A_log", "dt_bias", ".bias", _SCALE, _ZERO)


def canonical_name(hf_key: str) -> str | None:
    """The key without its prefix, in either form; None if it does not lie under the text model."""
    if hf_key == LM_HEAD:
        return hf_key
    if skipped_family(hf_key) is not None:
        return None
    for prefix in (_MULTIMODAL_PREFIX, _TEXT_PREFIX):
        if hf_key.startswith(prefix):
            return hf_key.removeprefix(prefix)
    return None


def hf_key(name: str) -> str:
    """The key of a canonical name in a text-only checkpoint."""
    return name if name == LM_HEAD else _TEXT_PREFIX + name


def skipped_family(hf_key: str) -> str | None:
    """The family that text generation does not use ("model.visual" or "mtp") a key belongs to, or None."""
    found = next((prefix for prefix in PART_PREFIXES.values() if hf_key.startswith(prefix)), None)
    return found.removesuffix(".") if found else None


def scale_name(name: str) -> str:
    """The parameter that the scales of a matrix of codes are."""
    return name + _SCALE


def zero_name(name: str) -> str:
    """The parameter that the zero points of a matrix of codes are."""
    return name + _ZERO


def is_side(name: str) -> bool:
    """Whether a parameter is the scales or the zero points of a matrix."""
    return name.endswith((_SCALE, _ZERO))


def matrix_name(name: str) -> str:
    """The matrix that a parameter is the scales or zero points of, or the parameter itself."""
    return name.removesuffix(_SCALE).removesuffix(_ZERO)


def is_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of a product or a lookup table, so that it is held in the matrix dtype.

    The others (norms, convolution, A_log, dt_bias) are small and keep the precision of their file.
    """
    return not name.endswith(_VECTOR_ENDINGS)
