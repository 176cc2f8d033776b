"""Algorithm 2 of Ho et al. 2020 (arXiv:2006.11239), the sampling loop, and nothing else."""

from collections.abc import Callable, Iterator

from torch import Tensor

from fastddpm.sampling.runner import Runner

Observe = Callable[[int, Tensor], object]  # (row of the table, predicted x_0), between the two halves of a step


def reverse_process(
    runner: Runner,
    observe: Observe | None = None,
    *,
    before: Callable[[int], object] | None = None,
    resample: int = 1,
) -> Iterator[int]:
    """Draw x_T, then x_{t-1} from x_t, until `runner.x` is x_0.

    Args:
        runner: with a table loaded; with capture_step=False if there is an observe or an x_0_fn.
        observe: sees each step between the network and the update.
        before: called with each row before its step.
        resample: how often to take each step but the last, going back to x_t before each repetition (RePaint).
    Yields: after each step its row of the table, from the last one down to 0.
    """
    split = observe is not None or runner.conditions.x_0_fn is not None
    runner.start()  # line 1: x_T ~ N(0, I)
    for row in reversed(range(runner.steps)):  # line 2: for t = T, ..., 1
        if before is not None:
            before(row)
        for visit in range(resample if row else 1):
            if visit:
                runner.renoise()
            if split:
                _take_in_halves(runner, row, observe)
            else:
                runner.step()  # lines 3 and 4, perhaps as one CUDA graph
            yield row
        if resample > 1:
            runner.first_visit()


def _take_in_halves(runner: Runner, row: int, observe: Observe | None) -> None:
    model_output = runner.predict()  # eps_theta(x_t, t)
    x_0 = runner.x_0(model_output)  # eq. 15
    if observe is not None:
        observe(row, x_0)
    # z ~ N(0, I); x_{t-1} = (x_t - ... eps_theta(x_t, t)) / sqrt(alpha_t) + sigma_t z
    runner.update(model_output, None if runner.conditions.x_0_fn is None else x_0)
