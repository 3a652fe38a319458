"""Properties of `zero_memory`. References: the figures printed in the paper (arXiv:1910.02054, figure 1 and table 1)."""

from llmcore_hf.learning.grading import equal

GB = 1e9


def _agrees_with(task, n_params, figures):
    for (world_size, stage), gigabytes in figures.items():
        case = {"n_params": n_params, "world_size": world_size, "stage": stage}
        # the paper prints three digits
        equal(task.zero_memory(**case) / GB, gigabytes, 0.02, unit="GB", **case)


def without_zero_16_bytes_each(task):
    for world_size in (1, 8, 64):
        case = {"n_params": 1000, "world_size": world_size, "stage": 0}
        equal(task.zero_memory(**case), 16000.0, **case)


def figures_of_the_paper(task):
    _agrees_with(task, 7.5e9, {(64, 0): 120.0, (64, 1): 31.4, (64, 2): 16.6, (64, 3): 1.88})


def table_of_the_paper(task):
    figures = {
        (4, 1): 896,
        (4, 2): 704,
        (4, 3): 512,
        (16, 1): 608,
        (16, 2): 368,
        (16, 3): 128,
        (64, 1): 536,
        (64, 2): 284,
        (64, 3): 32,
    }
    _agrees_with(task, 128e9, figures)


def one_gpu_saves_nothing(task):
    for stage in (0, 1, 2, 3):
        case = {"n_params": 1000, "world_size": 1, "stage": stage}
        equal(task.zero_memory(**case), 16000.0, **case)


def stage_limits_of_many_gpus(task):
    for stage, left in ((1, 4.0), (2, 2.0), (3, 0.0)):
        case = {"n_params": 1, "world_size": 10**9, "stage": stage}
        equal(task.zero_memory(**case), left, **case)
