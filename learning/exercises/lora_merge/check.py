"""Properties of `lora_merge`. References: the unmerged forward pass, and PEFT."""

import torch
from torch.nn.functional import linear

from llmcore_hf.learning.grading import equal


def _case(n_in=5, n_out=3, r=2, alpha=8.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (n_out, n_in), "lora_A": (r, n_in), "lora_B": (n_out, r)}
    return {**{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, "lora_alpha": alpha}


def merged_equals_base_plus_adapter(task):
    for r, alpha in ((1, 1.0), (2, 8.0), (4, 2.0)):
        case = _case(r=r, alpha=alpha, seed=r)
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(9))
        adapter = linear(linear(x, case["lora_A"]), case["lora_B"])
        expected = linear(x, case["weight"]) + alpha / r * adapter
        equal(linear(x, task.lora_merge(**case)), expected, x=x, **case)


def agrees_with_peft(task):
    from peft import LoraConfig, get_peft_model

    case = _case(n_in=4, n_out=4)
    base = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["0"], lora_dropout=0.0))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(case["weight"])
        layer.lora_A["default"].weight.copy_(case["lora_A"])
        layer.lora_B["default"].weight.copy_(case["lora_B"])
    equal(task.lora_merge(**case), model.merge_and_unload()[0].weight, **case)


def zero_b_changes_nothing(task):
    case = _case()
    case["lora_B"] = torch.zeros_like(case["lora_B"])
    equal(task.lora_merge(**case), case["weight"], **case)


def scale_is_alpha_over_r(task):
    one, two = _case(r=4, alpha=4.0), _case(r=4, alpha=8.0)
    change = task.lora_merge(**one) - one["weight"]
    equal(change, one["lora_B"] @ one["lora_A"], **one)
    equal(task.lora_merge(**two) - two["weight"], 2 * change, **two)


def base_weight_is_left_alone(task):
    case = _case()
    first = task.lora_merge(**case)
    equal(task.lora_merge(**case), first, **case)
