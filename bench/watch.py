"""What the machine did during a measurement: clocks, power, temperature and other work, from NVML and /proc/stat."""

import os
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch

FACTS = (
    "nvml", "driver", "gpu", "uuid", "samples", "clock_sm_mhz", "clock_mem_mhz", "clock_sm_max_mhz",
    "clock_mem_max_mhz", "power_w", "power_limit_w", "power_limit_default_w", "temperature_c", "memory_used_gb",
    "utilisation", "energy_j", "seconds", "throttle", "other_processes", "cpu_others",
)  # fmt: skip
REASONS = {  # bits of NVML's clocks event reasons
    0x01: "idle",
    0x02: "application clocks",
    0x04: "SW power cap",
    0x08: "HW slowdown",
    0x10: "sync boost",
    0x20: "SW thermal slowdown",
    0x40: "HW thermal slowdown",
    0x80: "HW power brake",
    0x100: "display clocks",
}
# Application clocks and sync boost are settings of this machine, which make it slower, but equally so in the next run.
# So does the power cap at full load, unless the limit was lowered.
THROTTLED = "HW slowdown", "SW thermal slowdown", "HW thermal slowdown", "HW power brake"
BESIDE_TORCH = 2 << 30  # bytes that the driver, a context and its libraries may take
PATIENCE = 5  # seconds to wait for an NVML that hangs, as it does when a GPU is lost
STAT = Path("/proc/stat")
SHORT = 0.5  # seconds; /proc/stat counts hundredths, which is too coarse for a shorter time


def gpu_uuid(device: torch.device | str | int) -> str | None:
    """Return NVML's name of torch's device, "GPU-..."; None for a CPU, or if torch does not know it."""
    with suppress(Exception):  # torch may raise many errors
        if (device := torch.device(device)).type == "cuda":
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return None


class Watch:
    """A context around a measurement; at its end it reports what the machine did meanwhile. It never raises.

    Args:
        uuid: of the GPU, from `gpu_uuid`; None: watch only the CPU.
        processes: how many processes of ours may use the device at a time.
        interval_s: seconds between two samples; there is one more at each end.

    `facts`: {name: value} of all FACTS, None where unknown. nvml: why it is missing; *_mhz, power_w, temperature_c,
        utilisation (0 to 1): their min, median and max; energy_j: of the whole device; throttle: {reason: share of the
        samples}; other_processes: the most at one time; cpu_others: work of other processes, in cores, on the CPUs
        that this process may use.
    `invalid`: why the measurement is unreliable, one line for each reason.
    """

    def __init__(self, uuid: str | None, processes: int = 1, interval_s: float = 0.1) -> None:
        self.facts: dict[str, Any] = dict.fromkeys(FACTS)
        self.invalid: list[str] = []
        self._uuid, self._processes = uuid, processes
        self._sampler = NvmlThread(uuid, interval_s) if uuid else None

    def __enter__(self) -> "Watch":
        self._held = [_held_by_torch()]
        if self._sampler:
            with suppress(RuntimeError):  # no more threads
                self._sampler.start()
            self._sampler.began.wait(PATIENCE)
        self._cpus = _cpus()
        self._began = perf_counter(), _busy(self._cpus), sum(os.times()[:4])
        return self

    def __exit__(self, *_: object) -> None:
        seconds, busy, own = perf_counter(), _busy(self._cpus), sum(os.times()[:4])
        seconds -= self._began[0]
        self.facts |= {"nvml": "there is no GPU to watch", "seconds": seconds}
        if busy is not None and self._began[1] is not None and seconds > 0:
            others = busy - self._began[1] - (own - self._began[2])
            self.facts["cpu_others"] = max(others, 0.0) / seconds
        if self._sampler:
            self._held.append(_held_by_torch())
            self._sampler.end()
            self.facts |= self._sampler.facts(seconds, self._processes)
            self.invalid = list(self._throttled()) + list(self._shared_gpu())
        elif self._processes == 1:  # when two builds take turns, each is other work to the other
            self.invalid = list(self._shared_cpu())

    def _throttled(self) -> Iterable[str]:
        if lost := self._sampler.lost:
            yield f"lost: {lost}"
        shares = self.facts["throttle"] or {}
        for reason in THROTTLED:
            if reason in shares:
                yield f"throttled: {reason} in {100 * shares[reason]:.3g} % of the samples"
        limit, default = self.facts["power_limit_w"], self.facts["power_limit_default_w"]
        if "SW power cap" in shares and limit is not None and default is not None and limit < default:
            yield f"throttled: the power limit is {limit:g} W, below the device's {default:g} W, and was reached"

    def _shared_gpu(self) -> Iterable[str]:
        if others := self.facts["other_processes"]:
            yield f"shared: {others} other process{'es' * (others > 1)} on the GPU"
            return
        # In a container NVML lists no processes, or only those of the container.
        used = max(self._sampler.memory_at_the_ends(), default=0)
        if used > self._processes * (max(self._held) + BESIDE_TORCH):
            yield f"shared: {used / 1e9:.1f} GB of the GPU's memory are used, torch has {max(self._held) / 1e9:.1f} GB"

    def _shared_cpu(self) -> Iterable[str]:
        others, cores = self.facts["cpu_others"], len(self._cpus)
        if others is not None and self.facts["seconds"] >= SHORT and others > cores / 10:
            yield f"shared: other work took {others:.1f} of {cores} core{'s' * (cores > 1)}"


class NvmlThread(Thread):
    """A thread that queries NVML: a call may take long, and releases the interpreter lock."""

    def __init__(self, uuid: str, interval_s: float) -> None:
        super().__init__(name="NVML", daemon=True)
        self.began, self._ended = Event(), Event()
        self.lost: str | None = None
        self._uuid, self._interval_s = uuid, interval_s
        self._error: str | None = None
        self._missing: str | None = "NVML does not answer"
        self._about: dict[str, Any] = {}
        self._samples: list[dict[str, Any]] = []
        self._energy: list[float | None] = []

    def end(self) -> None:
        """Take the last sample and stop."""
        self._ended.set()
        if self.is_alive():
            self.join(PATIENCE)

    def run(self) -> None:
        try:
            self._nvml = import_module("pynvml")
            self._nvml.nvmlInit()
        except Exception as error:  # not only NVML's: the package, or the library, may be missing or broken
            self._missing = _reason(error)
            self.began.set()
            return
        try:
            self._handle = self._find()
            self._watch()
        except Exception as error:
            self._missing = _reason(error)
        finally:
            self.began.set()
            with suppress(Exception):  # the driver may be gone
                self._nvml.nvmlShutdown()

    def _find(self) -> Any:
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except Exception:
            with suppress(Exception):  # torch names a part of a GPU (MIG) like a whole one
                return self._nvml.nvmlDeviceGetHandleByUUID(f"MIG-{self._uuid.removeprefix('GPU-')}")
            raise

    def _watch(self) -> None:
        ask, nvml = self._ask, self._nvml
        with suppress(Exception):
            self._about["driver"] = _text(nvml.nvmlSystemGetDriverVersion())
        self._about |= {
            "gpu": _text(ask("Name")),
            "uuid": _text(ask("UUID")),
            "clock_sm_max_mhz": ask("MaxClockInfo", nvml.NVML_CLOCK_SM),
            "clock_mem_max_mhz": ask("MaxClockInfo", nvml.NVML_CLOCK_MEM),
            "power_limit_w": _thousandth(ask("EnforcedPowerLimit")),
            "power_limit_default_w": _thousandth(ask("PowerManagementDefaultLimit")),
        }
        self._energy.append(_thousandth(ask("TotalEnergyConsumption")))
        self._sample()
        self.began.set()
        while not self._ended.wait(self._interval_s):
            self._sample()
        self._sample()
        self._energy.append(_thousandth(ask("TotalEnergyConsumption")))
        gone = all(value is None for value in self._samples[-1].values())
        self._missing = self._error if gone else None

    def _sample(self) -> None:
        ask, nvml = self._ask, self._nvml
        memory, rates, processes = ask("MemoryInfo"), ask("UtilizationRates"), ask("ComputeRunningProcesses")
        reasons = ask("CurrentClocksEventReasons")
        self._samples.append(
            {
                "clock_sm_mhz": ask("ClockInfo", nvml.NVML_CLOCK_SM),
                "clock_mem_mhz": ask("ClockInfo", nvml.NVML_CLOCK_MEM),
                "power_w": _thousandth(ask("PowerUsage")),
                "temperature_c": ask("Temperature", nvml.NVML_TEMPERATURE_GPU),
                "utilisation": None if rates is None else rates.gpu / 100,
                "memory": None if memory is None else memory.used,
                "reasons": ask("CurrentClocksThrottleReasons") if reasons is None else reasons,  # its old name
                # compute only: a desktop's graphics are always there, and mostly idle
                "processes": None if processes is None else len(processes),
            }
        )

    def _ask(self, what: str, *args: int) -> Any:
        """Return what nvmlDeviceGet... returns, or None if it fails."""
        try:
            return getattr(self._nvml, f"nvmlDeviceGet{what}")(self._handle, *args)
        except Exception as error:  # NVMLError; the function may be missing in this version, the library half unloaded
            self._error = _reason(error)
            if type(error).__name__ in ("NVMLError_GpuIsLost", "NVMLError_ResetRequired"):
                self.lost = self._error
            return None

    def facts(self, seconds: float, processes: int) -> dict[str, Any]:
        found = {name: _known(sample[name] for sample in self._samples) for name in (self._samples or [{}])[0]}
        facts = {"nvml": self._missing, **self._about, "samples": len(self._samples) or None}
        for name in ("clock_sm_mhz", "clock_mem_mhz", "power_w", "temperature_c", "utilisation"):
            if values := found.get(name):
                facts[name] = {"min": min(values), "median": median(values), "max": max(values)}
        if memory := found.get("memory"):
            facts["memory_used_gb"] = max(memory) / 1e9
        if reasons := found.get("reasons"):
            bits = {1 << bit for reason in reasons for bit in range(reason.bit_length()) if reason >> bit & 1}
            facts["throttle"] = {
                REASONS.get(bit, f"{bit:#x}"): fmean(bool(reason & bit) for reason in reasons) for bit in sorted(bits)
            }
        if any(counts := found.get("processes", [])):  # an empty list lacks even this process: NVML shows none here
            facts["other_processes"] = max(max(counts) - processes, 0)
        if len(self._energy) == 2 and self._energy[0] is not None:
            if self._energy[1] is not None and self._energy[1] >= self._energy[0]:
                facts["energy_j"] = self._energy[1] - self._energy[0]
        elif power := found.get("power_w"):
            facts["energy_j"] = fmean(power) * seconds
        return facts

    def memory_at_the_ends(self) -> list[int]:
        """Return the GPU's bytes in use at both ends, where torch's own are measured too."""
        return _known(sample["memory"] for sample in (self._samples[:1] + self._samples[-1:]))


def _known(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1e3


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _reason(error: Exception) -> str:
    with suppress(Exception):  # NVML asks the library, which may be gone
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return type(error).__name__


def _held_by_torch() -> int:
    """Return the bytes of the GPU's memory that torch has reserved, in use or not. Does not wait for the GPU."""
    with suppress(Exception):
        if torch.cuda.is_initialized():
            return sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))
    return 0


def _cpus() -> set[int]:
    with suppress(Exception):  # not every system has this call
        return os.sched_getaffinity(0)
    return set()


def _busy(cpus: set[int]) -> float | None:
    """Return the seconds that these CPUs have worked or were taken by other machines since boot; None if unknown."""
    with suppress(Exception):  # not Linux, or a sandbox with another format
        ticks = 0
        for name, *counts in map(str.split, STAT.read_text().splitlines()):
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cpus:
                user, nice, system, _idle, _iowait, *more = map(int, counts[:8])  # irq, softirq, steal
                ticks += user + nice + system + sum(more)
        return ticks / os.sysconf("SC_CLK_TCK") or None  # some sandboxes show zeros
    return None
