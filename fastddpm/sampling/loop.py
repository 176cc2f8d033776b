"""Algorithm 2 of Ho et al. 2020 (arXiv:2006.11239), the sampling loop, and nothing else."""

from collections.abc import Callable, Iterator

from torch import Tensor

from fastddpm.sampling.runner import Runner

Observe = Callable[[int, Tensor], object]  # (row of the table, model output), between the two halves of a step


def reverse_process(runner: Runner, observe: Observe | None = None) -> Iterator[int]:
    """Draw x_T, then x_{t-1} from x_t, until `runner.x` is x_0.

    Args:
        runner: with a table loaded.
        observe: sees each step between the network and the update; the steps then run one operation after the other.
    Yields: after each step its row of the table, from the last one down to 0.
    """
    runner.start()  # line 1: x_T ~ N(0, I)
    for row in reversed(range(runner.steps)):  # line 2: for t = T, ..., 1
        if observe is None:
            runner.step()  # lines 3 and 4, perhaps as one CUDA graph
        else:
            model_output = runner.predict()  # eps_theta(x_t, t)
            observe(row, model_output)
            # z ~ N(0, I); x_{t-1} = (x_t - ... eps_theta(x_t, t)) / sqrt(alpha_t) + sigma_t z
            runner.update(model_output)
        yield row
