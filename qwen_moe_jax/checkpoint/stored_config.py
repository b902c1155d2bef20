"""A checkpoint's configuration, with what only its files say of its formats."""

import dataclasses
from pathlib import Path

from qwen_moe_jax.checkpoint.names import PART_PREFIXES, is_side, matrix_name, scale_name
from qwen_moe_jax.checkpoint.orbax import stored_arrays
from qwen_moe_jax.checkpoint.orbax_folder import is_orbax, stored_names
from qwen_moe_jax.checkpoint.packing import PACKINGS, stored_name
from qwen_moe_jax.checkpoint.safetensors_files import READABLE_DTYPES, stored_tensors
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.schemes.scheme import Quantization, Rule


def read_config(folder: str | Path) -> ModelConfig:
    """Reads config.json and, of a quantised checkpoint, the headers of its files.

    They say which dtype the scales have (bfloat16 is assumed where there are no files), and whether
    multi-token prediction is quantised: those who quantise with transformers, which does not load it, leave
    it as it was, and their config.json does not say so.

    Raises:
        CheckpointNotFoundError: no config.json.
        CheckpointError: a damaged file.
        ConfigError: a value that is not implemented.
    """
    folder = Path(folder)
    config = ModelConfig.from_file(folder)
    quantization = config.quantization
    if quantization is None:
        return config
    if is_orbax(folder):
        return dataclasses.replace(config, quantization=_of_orbax(folder, quantization))
    if not any(folder.glob("*.safetensors*")):
        return dataclasses.replace(config, quantization=quantization.with_scales_in("bfloat16"))
    dtypes = {key: tensor.dtype for key, tensor in stored_tensors(folder).items()}
    prefix = PART_PREFIXES["mtp"]
    endings = {
        stored_name("x.weight", PACKINGS[scheme.packing].names["codes"])[1:]
        for scheme in quantization.schemes()
    } - {".weight"}
    mtp = {key: dtype for key, dtype in dtypes.items() if key.startswith(prefix)}
    if not any(
        key.endswith(tuple(endings)) or dtype in ("F8_E4M3", "U8", "I8", "I32") for key, dtype in mtp.items()
    ):
        quantization = _without_mtp(quantization)
    ends = tuple(
        stored_name("x.weight_scale_inv", PACKINGS[scheme.packing].names["scales"])[1:]
        for scheme in quantization.schemes()
        if scheme.scale_dtype is None
    )
    found = {
        READABLE_DTYPES[d].name for key, d in dtypes.items() if ends and key.endswith(ends) and d in _SCALES
    }
    return dataclasses.replace(config, quantization=quantization.with_scales_in(_widest(found)))


_SCALES = ("F32", "BF16", "F16")
_FLOATS = tuple(READABLE_DTYPES[dtype].name for dtype in _SCALES)


def _of_orbax(folder: Path, quantization: Quantization) -> Quantization:
    prefix = PART_PREFIXES["mtp"]
    if not any(name.startswith(prefix) and is_side(name) for name in stored_names(folder)):
        quantization = _without_mtp(quantization)
    if all(scheme.scale_dtype is not None for scheme in quantization.schemes()):
        return quantization
    scales = {
        array.dtype.name
        for name, array in stored_arrays(folder).items()
        if name == scale_name(matrix_name(name)) and array.dtype.name in _FLOATS
    }
    return quantization.with_scales_in(_widest(scales))


def _without_mtp(quantization: Quantization) -> Quantization:
    """The same, where multi-token prediction is as it was."""
    plain = Rule((PART_PREFIXES["mtp"].replace(".", r"\."),), None)
    return dataclasses.replace(quantization, rules=(plain, *quantization.rules))


def _widest(dtypes: set[str]) -> str:
    """The one dtype, or float32, which holds what all of them hold."""
    return dtypes.pop() if len(dtypes) == 1 else "float32"
