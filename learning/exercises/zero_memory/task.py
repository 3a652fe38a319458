"""The memory of ZeRO. Fill in the function; then: python scripts/exercise.py check zero_memory"""


def zero_memory(n_params: float, world_size: int, stage: int) -> float:
    """Bytes of model states per GPU, mixed-precision Adam.

    Args:
        n_params: number of parameters.
        world_size: number of GPUs.
        stage: 0 (no ZeRO), 1, 2 or 3.
    """
    raise NotImplementedError("zero_memory")
