"""Training: Algorithm 1 of Ho et al. 2020 (arXiv:2006.11239), with checkpoints, a log and grids of samples.

All random numbers of step k (images, flips, t, eps, dropped labels) depend only on the seed, k, the batch size and the
size of the data set. So a run that was killed and resumed takes the same steps as an uninterrupted one, and several
processes take the same steps as one. The exception is dropout, which also depends on the rank of the process.
"""

import copy
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm import checkpoints, ops
from fastddpm.checkpoints import Checkpoint
from fastddpm.checkpoints.medium import Medium, check_medium
from fastddpm.core.checks import checked_call, flag
from fastddpm.core.precision import Compute
from fastddpm.networks.fused import kind_of
from fastddpm.processes.displays import Stderr
from fastddpm.processes.distributed import Ranks, ranks
from fastddpm.processes.signals import Stopped, deferred
from fastddpm.storage.files import as_path, check_writable, locked
from fastddpm.storage.sequence_files import suffix_of
from fastddpm.train import run_folder
from fastddpm.train.batches import Batches, check_classes, check_data, check_labels
from fastddpm.train.grids import Diverged, GridPlan, Interrupted, draw_grid
from fastddpm.train.initial import load_initial, network_of_run, null_label, numbered_as
from fastddpm.train.loss import TrainingLoss
from fastddpm.train.options import TrainOptions, check_can_sample, check_options, resolve_engine
from fastddpm.train.state import RunState, load_state, run_identity, save_state
from fastddpm.train.updates import clip_gradients, learning_rate_at, update_average


@checked_call
def train(
    data: np.ndarray,
    out: str | os.PathLike[str],
    options: TrainOptions,
    *,
    labels: np.ndarray | None = None,
    classes: Sequence[str] | None = None,
    medium: Medium | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Train on images or sequences and write a checkpoint of the averaged weights to the folder `out`.

    The checkpoint has diffusers' layout; for sequences its network is a `UNet1D`.
    If the folder holds an unfinished run of the same data and options, that run is resumed. It may have another
    number of steps if the learning rates of the steps done are the same with it. A finished run is not changed. Ctrl-C
    and SIGTERM let the current step finish (under torchrun: the steps up to the next line of the log), which is saved.
    Beside the checkpoint the folder holds `training.pt` (the state to resume from), `log.jsonl` (loss and so on),
    `loss.png`, `samples/` (grids of samples) and `classes.json` (the names of the classes, if they have any). Under
    torchrun the processes share each batch: the images and the noise are the same for any number of processes, and only
    the first process writes. The state of torch's random number generators, on the CPU and on `device`, is the same
    afterwards as before.

    Args:
        data: images, [N, H, W, C] uint8; H and W multiples of 2^(levels - 1); C = 1, 3 or 4. Or sequences, [N, C, L]
            float32 in data units, such as [-1, 1], or int16, which is divided by 32768; L a multiple of
            frame * 2^(levels - 1).
        out: folder to write.
        labels: [N] integers >= 0, to train a class-conditional network.
        classes: the name of each class. With `options.init` the labels are numbered as that checkpoint names its
            classes, of which the images may lack some.
        medium: what sequences are, if they are sounds or texts; it is kept beside the checkpoint.
        device: None: the GPU if there is one, else the CPU.
        progress: show bars.
    Returns: out, as a path.
    Raises:
        ValueError: data, labels or an option is not as above; `out` cannot be written, is being written by another
            process, or holds another run, a damaged one or a checkpoint that no run wrote; or the run diverged.
        OSError: a file could not be written, for example because the disk is full.
        Stopped: Ctrl-C or SIGTERM; the steps done are saved.
        RuntimeError: another process of this job was lost.
    """
    out = as_path("out", out)
    flag("progress", progress)
    # the caller may have disabled gradients
    with torch.inference_mode(False), torch.enable_grad(), ranks(device) as group, ExitStack() as stack:
        with group.agree():
            trainer = Trainer(data, labels, out, options, group, classes, medium)
            if group.rank == 0:
                stack.enter_context(locked(check_writable(out, folder=True)))
        with group.agree():
            trainer.resume()
        group.agree_on({"the step": trainer.state.step, "precision": trainer.compute.precision, **trainer.identity})
        trainer.run(progress)
    return out


class Trainer:
    """A training run. Its folder is not touched before `resume`.

    Attributes:
        compute: device and precision.
        net: the network that is trained.
        ema: the same network with averaged weights.
        class_names: the names of its classes; None: it has none, or they have no names.
        null_label: the label that stands for no class; None: there is none.
        batches: the batch of each step.
        identity: what must be the same when the run is resumed.
        state: how far the run has come.
    """

    def __init__(
        self,
        data: np.ndarray,
        labels: np.ndarray | None,
        out: Path,
        options: TrainOptions,
        group: Ranks,
        classes: Sequence[str] | None = None,
        medium: Medium | None = None,
    ) -> None:
        options = check_options(options, group.device)
        initial = None
        if options.init is not None:
            initial = load_initial(options.init, out)
            options = replace(options, init=initial.source, schedule=initial.schedule)
            check_can_sample(options)
        shape = check_data(data, options.schedule)
        check_medium(medium, shape)
        count = check_labels(labels, data)
        self.class_names = check_classes(classes, count)
        if initial is not None and labels is not None:
            labels, count, self.class_names = numbered_as(initial, labels, count, self.class_names)
        self.null_label = null_label(options, initial, count)
        config, weights = network_of_run(options, shape, medium, initial, count, self.null_label)
        group.share(options.batch_size)  # fails if there are more processes than images in a batch
        self.options, self.medium = options, medium
        self.out, self.group = out, group
        self.compute = Compute.resolve(group.device, options.precision)
        self.engine = resolve_engine(options.engine, self.compute.device)
        device = self.compute.device
        with _random_state_restored(device), torch.device("cpu"):
            torch.manual_seed(options.seed)
            self.net = kind_of(config)(**config).to(device)
        if weights is not None:
            checkpoints.load_into(self.net, weights)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.parts = {"net": self.net, "ema": self.ema, "optimizer": self.optimizer}
        data = np.require(data, requirements=["C", "W"])  # torch takes neither negative strides nor read-only memory
        self.identity = run_identity(data, labels, self.class_names, options)
        self.state, self.saved_step = RunState(), 0
        self.batches = Batches(data, labels, self.null_label, options, group, device)
        self.grids = GridPlan.of(options, count)
        self.loss = TrainingLoss(options.schedule, device)

    def resume(self) -> None:
        """Load the state of this run from its folder, if there is one, and prepare the folder for writing."""
        state = load_state(self.out, self.options, self.identity, self.parts)
        if state is None:
            run_folder.check_is_new(self.out)
        self.state = state or RunState()
        self.saved_step = self.state.step
        if self.options.precision == "auto":  # on another device "auto" may be another precision
            before = self.state.setup.get("precision", self.compute.precision)
            try:
                self.compute = Compute.resolve(self.compute.device, before)
            except ValueError as error:
                raise ValueError(f"cannot resume the run in {self.out}: its {error}") from error
        if self.grids.every:
            check_writable(self.out / run_folder.SAMPLES, folder=True)
        if self.group.rank == 0:
            run_folder.prepare(self.out, self.state.step)
            if self.state.step:  # a kill may have come between the state and the checkpoint
                self._save_checkpoint(unless_same=True)

    def run(self, progress: bool) -> None:
        """Take the remaining steps."""
        from tqdm import tqdm

        options, state = self.options, self.state
        self.began = time.monotonic() - state.seconds
        self._start_interval()
        network = self.wrapped_network()
        silent = not progress or self.group.rank > 0
        state.setup = self._setup()
        if not silent:
            self._print_setup()
        how = {"disable": silent, "file": Stderr(), "dynamic_ncols": True}
        bar = tqdm(total=options.steps, initial=state.step, desc="train", unit="step", **how)
        losses = []
        with deferred() as caught, bar, _random_state_restored(self.compute.device):
            stop = self._draw_grid(bar, caught)  # the one that an interruption prevented
            compiling = self.engine != "eager" and state.step < options.steps
            while state.step < options.steps and not stop:
                if compiling:
                    bar.set_description("compile")  # which takes a minute or more
                loss, norm = self.step(network, state.step)
                losses.append(loss)
                state.step += 1
                bar.update()
                if compiling:
                    bar.set_description("train")
                    bar.unpause()  # leave that time out of the rate
                    compiling = False
                due = any(map(self._is_due, (options.log_every, options.save_every, self.grids.every)))
                stop = self._must_stop(bool(caught), due)
                if due or stop:
                    state.losses += self._finite_losses(losses)
                    losses = []
                    self._write(norm, bar, last=stop)
                    stop = self._draw_grid(bar, caught) or stop
            if stop or caught:
                what = f"{self.out}: stopped after step {state.step} of {options.steps}"
                number = caught[0] if caught else signal.SIGTERM  # another rank caught it, and all ranks end alike
                raise Stopped("" if self.group.rank else f"{what}; the same command resumes the run", number)

    def wrapped_network(self) -> Callable[..., Tensor]:
        """The network as `step` takes it: compiled if the engine says so, with gradients averaged over the ranks."""
        network: Any = self.net
        if self.group.size > 1:
            device_ids = [self.compute.device] if self.compute.device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True)
        if self.engine == "eager":
            return network
        return torch.compile(network, dynamic=False, mode="reduce-overhead" if "graph" in self.engine else "default")

    def step(self, network: Callable[..., Tensor], k: int) -> tuple[Tensor, Tensor]:
        """Take step k: one iteration of Algorithm 1, on this rank's share of the batch. Does not wait for a GPU.

        Returns: this rank's part of the loss, and the norm of the gradient before it was clipped.
        """
        options, compute = self.options, self.compute
        device_type, dtype = compute.device.type, compute.dtype
        self._seed_dropout(k)
        self.optimizer.zero_grad()
        # lines 2 to 4: images x_0, timesteps t, and the addresses from which noise eps ~ N(0, I) is made
        x_0, t, address, labels = self.batches.of_step(k)
        # eq. 4: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
        x_t = ops.noising(x_0, t, address, self.loss.table, dtype=dtype)
        # line 5: the gradient of |eps - eps_theta(x_t, t)|^2 (eq. 14; or of x_0 or v), averaged over the batch
        with torch.autocast(device_type, enabled=False), compute.arithmetic():  # the caller's autocast must not apply
            with torch.autocast(device_type, dtype, enabled=dtype != torch.float32):
                model_output = network(x_t, t, class_labels=labels)
            errors = self.loss(model_output, x_0, t, address, self.batches.at_0(k))
            loss = errors.sum() / (options.batch_size * x_0.shape[1:].numel())
            (loss * self.group.size).backward()  # the ranks average their gradients: the factor makes that a sum
        norm = clip_gradients(list(self.net.parameters()), options.grad_clip)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate_at(k, options)
        self.optimizer.step()
        update_average(self.ema, self.net, min(options.ema, (1 + k) / (10 + k)))
        return loss.detach(), norm

    def _seed_dropout(self, k: int) -> None:
        """Make the dropout of step k a function of the seed, k and the rank."""
        if self.net.config.get("dropout"):
            state = np.random.SeedSequence((self.options.seed, 2, k, self.group.rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))

    def _setup(self) -> dict[str, Any]:
        """The device, the sizes and so on of this run, for the state and the first line on stderr."""
        device, precision, processes = str(self.compute.device), self.compute.precision, self.group.size
        parameters = sum(weights.numel() for weights in self.net.parameters())
        samples = {"images" if self.batches.data.ndim == 4 else "sequences": len(self.batches.data)}
        run = {"device": device, "precision": precision, "engine": self.engine, "processes": processes}
        return run | {"parameters": parameters, **samples, "batch": self.options.batch_size}

    def _print_setup(self) -> None:
        done, steps = self.state.step, self.options.steps
        work = f"{done} of {steps} steps are done" if done else f"training for {steps} steps"
        how_long = "; this may take minutes or hours; the bar shows how long" * (done < steps)
        setup = ", ".join(f"{name} {value}" for name, value in self.state.setup.items())
        print(f"{self.out}: {work}, {setup}{how_long}", file=Stderr())
        if self.class_names is not None:
            names = ", ".join(f"{k} {name}" for k, name in enumerate(self.class_names))
            print(f"{self.out}: classes (kept in {run_folder.CLASSES}): {names}", file=Stderr())

    def _must_stop(self, asked: bool, due: bool) -> bool:
        """Whether to stop after this step. Several ranks agree on it only where they wait for each other anyway."""
        if self.group.size == 1:
            return asked
        if not due:
            return False
        votes = torch.tensor(float(asked), dtype=torch.float32, device=self.compute.device)
        self.group.sum_([votes])
        return bool(votes)

    def _is_due(self, every: int) -> bool:
        """Whether something that comes every so many steps, and after the last one, is due; 0: never."""
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.options.steps)

    def _finite_losses(self, losses: list[Tensor]) -> list[float]:
        """The losses of the latest steps, summed over the ranks.

        Raises: ValueError: a loss, or a weight that would be saved, is not finite.
        """
        summed = torch.stack(losses)
        self.group.sum_([summed])
        values = summed.tolist()
        bad = [i for i, loss in enumerate(values) if not math.isfinite(loss)]
        if bad or not torch.stack([weights.isfinite().all() for weights in self.ema.parameters()]).all():
            what = f"the loss is {values[bad[0]]}" if bad else "the weights are not finite"
            step = self.state.step - (len(values) - 1 - bad[0] if bad else 0)
            kept = f"keeps the checkpoint of step {self.saved_step}" if self.saved_step else "has no checkpoint yet"
            raise ValueError(f"{what} at step {step}; {self._way_out()}; {self.out} {kept}")
        return values

    def _way_out(self) -> str:
        """What to do about a run that diverged."""
        other = "" if self.compute.precision == "fp32" else ", or use precision fp32"
        return f"lower learning_rate ({self.options.learning_rate}) in a run in another folder{other}"

    def _write(self, norm: Tensor, bar: Any, last: bool) -> None:
        """Write what is due: a line of the log, the loss curve, the state and the checkpoint; these also if `last`."""
        options, state, writes = self.options, self.state, self.group.rank == 0
        state.seconds = time.monotonic() - self.began
        if self._is_due(options.log_every):
            record = self._log_record(norm)
            bar.set_postfix(loss=f"{record['loss']:.4f}")
            state.losses = []
            if writes:
                run_folder.append_to_log(self.out, record)
        # with each grid too: if drawing it is interrupted, the run resumes at this step and draws it
        if last or self._is_due(options.save_every) or self._is_due(self.grids.every):
            if writes:
                run_folder.draw_curve(self.out)
                save_state(self.out, self.identity, self.parts, state)  # after the log, which it must not be ahead of
                self._save_checkpoint()
            self.saved_step = state.step
        self._start_interval()

    def _start_interval(self) -> None:
        """Start to measure images per second, which leaves out the time of `_write`."""
        self.interval_step = self.state.step
        self.interval_began = time.monotonic()

    def _log_record(self, norm: Tensor) -> dict[str, float]:
        """A line of the log. The loss is the mean since the last line."""
        state, options = self.state, self.options
        shown = (state.step - self.interval_step) * options.batch_size
        return {
            "step": state.step,
            "loss": sum(state.losses) / len(state.losses),
            "grad_norm": float(norm),
            "learning_rate": learning_rate_at(state.step - 1, options),
            "images_per_second": shown / (time.monotonic() - self.interval_began),
            "seconds": state.seconds,
        }

    def _save_checkpoint(self, *, unless_same: bool = False) -> None:
        checkpoint = Checkpoint(
            dict(self.ema.config),
            self.ema.state_dict(),
            self.options.schedule,
            self.class_names,
            null_label=self.null_label,
            medium=self.medium,
        )
        run_folder.save_checkpoint(self.out, checkpoint, unless_same=unless_same)

    def _draw_grid(self, bar: Any, caught: list[int]) -> bool:
        """Draw the grid of this step, if one is due and does not exist yet. Returns: whether a signal prevented it."""
        suffix = suffix_of(self.batches.data.shape[1:], self.medium)
        path = self.out / run_folder.SAMPLES / f"step-{self.state.step:07d}{suffix}"
        if not self.state.step or not self._is_due(self.grids.every) or self.group.rank or path.exists():
            return False
        try:
            draw_grid(
                path,
                self.ema,
                self.batches.data.shape[1:],
                self.compute,
                self.grids,
                self.options,
                self.class_names,
                self.medium,
                show=not bar.disable,
                stopped=lambda: self.group.size == 1 and bool(caught),
            )
        except Interrupted:
            return True
        except Diverged as error:
            what = f"the network of step {self.state.step} draws no finite samples, so the run has diverged"
            raise ValueError(f"{what}; {self._way_out()}") from error
        finally:
            bar.unpause()  # leave that time out of the rate
            self._start_interval()
        return False


def _random_state_restored(device: torch.device) -> Any:
    """A context that restores the state of torch's random number generators when it ends."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
