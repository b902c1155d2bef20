"""How many kernels a compiled program starts, which is what a small step's time is made of."""

from qwen_moe_jax.aot.hlo import COLLECTIVES, Instruction, Module


def kernel_launches(module: Module) -> float:
    """Kernels, library calls and copies that a call of the program starts, without collectives.

    A loop counts as often as it runs, once where the compiler does not know; of a conditional's branches the
    one with the most counts. A library's call counts once, although some (sorts) start several.
    """

    def cost(_: str, instruction: Instruction) -> float:
        return not instruction.free and instruction.kind not in COLLECTIVES

    return sum(times * cost(name, instruction) for name, instruction, times in module.executed(cost=cost))
