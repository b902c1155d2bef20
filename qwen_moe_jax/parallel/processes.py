"""One program over several processes, each with its own devices (`jax.distributed`)."""

import os
from typing import Any

import jax
import numpy as np

from qwen_moe_jax.errors import InputError

# After so long without a sign of life from a process, the others end with an error.
HEARTBEAT_SECONDS = 20
# Longest wait for all processes to have started.
START_SECONDS = 120

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> int:
    """Joins the other processes of a program, before the first use of a device.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. On CPU the
    processes talk through gloo.

    Args:
        coordinator: "host:port" of process 0, the same for all.
        num_processes: how many there are.
        process_id: this one's number, from 0.

    Returns:
        How many there are; 1 if nothing says that there are several.

    Raises:
        InputError: some of the three are missing or do not fit, or the others did not come.
    """
    given: dict[str, Any] = {
        variable: os.environ.get(variable) if value is None else value
        for variable, value in zip(_VARIABLES, (coordinator, num_processes, process_id), strict=True)
    }
    if all(value is None for value in given.values()):
        return 1
    missing = [variable for variable, value in given.items() if value is None]
    if missing:
        raise InputError(
            "several processes need --coordinator, --num-processes and --process-id, or "
            f"{', '.join(_VARIABLES)} in the environment; {', '.join(missing)} is not given."
        )
    address, count, number = (given[variable] for variable in _VARIABLES)
    try:
        count, number = int(count), int(number)
    except ValueError:
        raise InputError(
            f"the number of processes is {count!r} and this one's {number!r}; expected integers."
        ) from None
    if count < 1 or not 0 <= number < count or ":" not in address:
        raise InputError(
            f"process {number} of {count} with coordinator {address!r}; expected a number below the number "
            "of processes, and the coordinator as host:port."
        )
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(
            f"process {number} of {count} could not join the others at {address} ({first_line})."
        ) from error
    return count


def least_of_all(number: int) -> int:
    """The smallest of the numbers that the processes have; each of them has to call."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    # in mebibytes, since JAX carries 32 bits
    return int(multihost_utils.process_allgather(np.int32(number >> 20)).min()) << 20


def of_the_first(array: np.ndarray) -> np.ndarray:
    """The first process's array of 32-bit numbers, in all of them; each of them has to call."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))
