"""Properties of the column-parallel layer. Reference: torch's linear layer and its autograd, in one process."""

import torch
from torch.nn.functional import linear

from llmcore_hf.learning.grading import Mismatch, equal


def _case(world_size=2, n_out=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (3, 4), "weight": (n_out, 4), "bias": (n_out,)}
    return {**{name: torch.randn(s, generator=generator) for name, s in shapes.items()}, "world_size": world_size}


def gathered_equals_one_process(task):
    for world_size in (1, 2, 3, 6):
        case = _case(world_size)
        expected = list(linear(case["x"], case["weight"], case["bias"]).chunk(world_size, 1))
        equal(task.column_parallel_forward(**case), expected, **case)


def each_rank_has_its_own_columns(task):
    case, other = _case(3), _case(3)
    other["weight"][2:4] += 1.0
    other["bias"][2:4] -= 5.0  # the block of rank 1
    first, second = (task.column_parallel_forward(**given) for given in (case, other))
    equal([second[0], second[2]], [first[0], first[2]], **other)
    equal(second[1], linear(other["x"], other["weight"][2:4], other["bias"][2:4]), **other)


def bias_is_added_once(task):
    case = _case(2)
    case["x"] = torch.zeros(1, 4)
    equal(task.column_parallel_forward(**case), [case["bias"][None, :3], case["bias"][None, 3:]], **case)


def input_gradient_is_summed(task):
    for world_size in (1, 2, 3):
        case = _case(world_size, seed=1)
        x = case["x"].clone().requires_grad_()
        grad = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
        linear(x, case["weight"], case["bias"]).backward(grad)
        given = {"grad_outputs": list(grad.chunk(world_size, 1)), "weight": case["weight"]}
        equal(task.column_parallel_input_grad(**given), x.grad, **given)


def uneven_split_is_refused(task):
    case = _case(4)
    try:
        found = task.column_parallel_forward(**case)
    except ValueError:
        return
    raise Mismatch(case, "ValueError: 6 outputs do not divide among 4 ranks", found)
