"""What the machine did during a measurement, as reported by fake NVML and /proc/stat that fail in many ways."""

import json
import os
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")  # bench needs it

from bench import watch
from bench.watch import Watch, gpu_uuid

UUID, OTHER = "GPU-11111111-2222-3333-4444-555555555555", "GPU-99999999-2222-3333-4444-555555555555"
GIB = 1 << 30
IDLE, APPLICATION, CAP, HW, SYNC, SW_HEAT, HW_HEAT, BRAKE, DISPLAY = (1 << bit for bit in range(9))


class Nvml(ModuleType):
    """pynvml with its own errors and constants, and functions that answer from `gpus`.

    A list gives successive answers, of which the last stays; an error is raised. `gone`: (sample, error): from this
    sample on, every query raises the error.
    """

    def __init__(self, real: ModuleType, gpus: dict[str, dict]):
        super().__init__("pynvml")
        vars(self).update({name: value for name, value in vars(real).items() if name.startswith("NVML")})
        self.gpus, self.gone, self.samples, self.users = gpus, None, 0, 0

    def nvmlInit(self):
        self.users += 1

    def nvmlShutdown(self):
        self._check()
        self.users -= 1

    def nvmlSystemGetDriverVersion(self):
        self._check()
        return "580.65.06"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self._check()
        if uuid not in self.gpus:
            raise self.NVMLError(self.NVML_ERROR_NOT_FOUND)
        return self.gpus[uuid]

    def __getattr__(self, name):
        what = name.removeprefix("nvmlDeviceGet")
        if what == name or not any(what in gpu for gpu in self.gpus.values()):
            raise AttributeError(name)

        def ask(gpu, *args):
            self.samples += what == "MemoryInfo"  # queried once per sample
            self._check()
            answer = gpu[what][args] if args else gpu[what]
            if isinstance(answer, list):
                answer = answer[max(min(self.samples, len(answer)), 1) - 1]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return ask

    def _check(self):
        assert threading.current_thread() is not threading.main_thread(), "a benchmark waits for NVML"
        if not self.users:
            raise self.NVMLError(self.NVML_ERROR_UNINITIALIZED)
        if self.gone and self.samples >= self.gone[0]:
            raise self.NVMLError(self.gone[1])


def processes(*pids):
    return tuple(SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in pids)


def gpu(**changes):
    clocks = {(1,): [1980, 1200], (2,): 3201}
    return {
        "Name": "NVIDIA H200",
        "UUID": UUID,
        "MaxClockInfo": {(1,): 1980, (2,): 3201},
        "EnforcedPowerLimit": 700_000,
        "PowerManagementDefaultLimit": 700_000,
        "TotalEnergyConsumption": [5_000, 12_500],
        "ClockInfo": clocks,
        "PowerUsage": [100_000, 640_500],
        "Temperature": {(0,): [40, 61]},
        "UtilizationRates": [SimpleNamespace(gpu=0), SimpleNamespace(gpu=98)],
        "MemoryInfo": [SimpleNamespace(used=1_000_000_000), SimpleNamespace(used=2_000_000_000)],
        "CurrentClocksEventReasons": [IDLE, 0],
        "ComputeRunningProcesses": processes(os.getpid()),
    } | changes


@pytest.fixture
def nvml(monkeypatch):
    fake = Nvml(pytest.importorskip("pynvml"), {UUID: gpu()})
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def held(monkeypatch):
    """Bytes of the GPU's memory that torch has reserved; tests may change them."""
    memory = {0: 0}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memory))
    monkeypatch.setattr(torch.cuda, "memory_reserved", memory.__getitem__)
    return memory


def watched(uuid=UUID, **options):
    """Watch an instant, with two samples, one at each end."""
    with Watch(uuid, **{"interval_s": 60} | options) as found:
        pass
    assert tuple(found.facts) == watch.FACTS
    assert "NVML" not in [thread.name for thread in threading.enumerate()], "the thread still runs"
    return found


def test_all_facts_are_reported(nvml):
    found = watched()
    seconds, others = found.facts.pop("seconds"), found.facts.pop("cpu_others")
    assert 0 < seconds < 60
    assert others is None or others >= 0
    assert found.facts == {
        "nvml": None,
        "driver": "580.65.06",
        "gpu": "NVIDIA H200",
        "uuid": UUID,
        "samples": 2,
        "clock_sm_mhz": {"min": 1200, "median": 1590, "max": 1980},
        "clock_mem_mhz": {"min": 3201, "median": 3201, "max": 3201},
        "clock_sm_max_mhz": 1980,
        "clock_mem_max_mhz": 3201,
        "power_w": {"min": 100.0, "median": 370.25, "max": 640.5},
        "power_limit_w": 700.0,
        "power_limit_default_w": 700.0,
        "temperature_c": {"min": 40, "median": 50.5, "max": 61},
        "memory_used_gb": 2.0,
        "utilisation": {"min": 0.0, "median": 0.49, "max": 0.98},
        "energy_j": 7.5,
        "throttle": {"idle": 0.5},
        "other_processes": 0,
    }
    assert found.invalid == []
    assert nvml.users == 0, "NVML was not shut down"


def test_first_sample_is_taken_before_the_measurement(nvml, monkeypatch):
    ask = nvml.nvmlDeviceGetName
    monkeypatch.setattr(nvml, "nvmlDeviceGetName", lambda handle: time.sleep(0.05) or ask(handle), raising=False)
    with Watch(UUID, interval_s=60) as found:
        assert nvml.samples == 1
    assert found.facts["samples"] == 2


def test_samples_are_taken_during_the_measurement(nvml):
    with Watch(UUID, interval_s=0.001) as found:
        deadline = time.monotonic() + 30
        while nvml.samples < 5:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert found.facts["samples"] == nvml.samples >= 6
    taken = nvml.samples
    time.sleep(0.02)
    assert nvml.samples == taken, "it samples after the end"


def test_error_of_the_case_propagates(nvml):
    with pytest.raises(KeyError, match="of the case"), Watch(UUID) as found:
        raise KeyError("of the case")
    assert found.facts["samples"] >= 2


def test_facts_are_null_before_and_json_after(nvml):
    new = Watch(UUID)
    assert new.facts == dict.fromkeys(watch.FACTS)
    assert new.invalid == []
    found = watched()
    assert json.loads(json.dumps(found.facts, allow_nan=False)) == found.facts


# Throttling


@pytest.mark.parametrize(
    ("reasons", "throttle", "invalid"),
    [
        ([0, HW], {"HW slowdown": 0.5}, ["throttled: HW slowdown in 50 % of the samples"]),
        ([SW_HEAT, SW_HEAT], {"SW thermal slowdown": 1}, ["throttled: SW thermal slowdown in 100 % of the samples"]),
        ([HW_HEAT, IDLE], {"idle": 0.5, "HW thermal slowdown": 0.5}, ["throttled: HW thermal slowdown in 50 % of the"]),
        ([BRAKE, 0], {"HW power brake": 0.5}, ["throttled: HW power brake in 50 % of the samples"]),
        ([HW | BRAKE, 0], {"HW slowdown": 0.5, "HW power brake": 0.5}, ["throttled: HW slow", "throttled: HW power b"]),
        ([CAP, CAP], {"SW power cap": 1}, []),
        ([APPLICATION, SYNC], {"application clocks": 0.5, "sync boost": 0.5}, []),
        ([DISPLAY, 1 << 40], {"display clocks": 0.5, "0x10000000000": 0.5}, []),
        ([0, 0], {}, []),
    ],
)
def test_throttling(nvml, reasons, throttle, invalid):
    nvml.gpus[UUID] = gpu(CurrentClocksEventReasons=reasons)
    found = watched()
    assert found.facts["throttle"] == throttle
    assert len(found.invalid) == len(invalid)
    assert all(line.startswith(start) for line, start in zip(found.invalid, invalid, strict=True))


@pytest.mark.parametrize(
    ("reasons", "limit", "invalid"),
    [
        ([0, CAP], 500_000, ["throttled: the power limit is 500 W, below the device's 700 W, and was reached"]),
        ([0, 0], 500_000, []),
        ([0, CAP], 750_000, []),
    ],
)
def test_lowered_power_limit(nvml, reasons, limit, invalid):
    nvml.gpus[UUID] = gpu(CurrentClocksEventReasons=reasons, EnforcedPowerLimit=limit)
    found = watched()
    assert found.facts["power_limit_w"] == limit / 1000
    assert found.invalid == invalid


def test_old_name_of_the_throttle_reasons(nvml):
    nvml.gpus[UUID] = gpu(CurrentClocksThrottleReasons=[0, HW_HEAT])
    del nvml.gpus[UUID]["CurrentClocksEventReasons"]
    assert watched().facts["throttle"] == {"HW thermal slowdown": 0.5}


# Missing parts

ASKED = {
    "Name": ["gpu"],
    "UUID": ["uuid"],
    "MaxClockInfo": ["clock_sm_max_mhz", "clock_mem_max_mhz"],
    "EnforcedPowerLimit": ["power_limit_w"],
    "PowerManagementDefaultLimit": ["power_limit_default_w"],
    "ClockInfo": ["clock_sm_mhz", "clock_mem_mhz"],
    "PowerUsage": ["power_w"],
    "Temperature": ["temperature_c"],
    "UtilizationRates": ["utilisation"],
    "MemoryInfo": ["memory_used_gb"],
    "CurrentClocksEventReasons": ["throttle"],
    "ComputeRunningProcesses": ["other_processes"],
}


@pytest.mark.parametrize("error", ["NO_PERMISSION", "NOT_SUPPORTED", "UNKNOWN", "FUNCTION_NOT_FOUND", None])
@pytest.mark.parametrize("what", ASKED)
def test_only_failed_queries_are_null(nvml, what, error):
    everything = watched().facts
    nvml.samples = 0
    nvml.gpus[UUID][what] = refused = nvml.NVMLError(getattr(nvml, f"NVML_ERROR_{error}")) if error else None
    if refused is None:
        del nvml.gpus[UUID][what]  # this version of the package has no such function
    elif what in ("ClockInfo", "MaxClockInfo", "Temperature"):
        nvml.gpus[UUID][what] = dict.fromkeys([(0,), (1,), (2,)], refused)
    found = watched()
    assert [name for name, value in found.facts.items() if value is None and everything[name] is not None] == [
        name for name in watch.FACTS if name in ASKED[what]
    ]
    assert found.facts["nvml"] is None
    assert found.invalid == []


def test_all_queries_are_forbidden(nvml):
    forbidden = nvml.NVMLError(nvml.NVML_ERROR_NO_PERMISSION)
    nvml.gpus[UUID] = {
        name: dict.fromkeys([(0,), (1,), (2,)], forbidden) if isinstance(value, dict) else forbidden
        for name, value in gpu().items()
    }
    found = watched()
    known = {name for name, value in found.facts.items() if value is not None}
    assert known - {"cpu_others"} == {"nvml", "driver", "samples", "seconds"}
    assert found.facts["nvml"] == "NVMLError_NoPermission: Insufficient Permissions"
    assert found.invalid == []


def test_energy_without_a_counter(nvml):
    nvml.gpus[UUID] = gpu(
        TotalEnergyConsumption=nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED), PowerUsage=[100_000, 300_000]
    )
    found = watched()
    assert found.facts["energy_j"] == pytest.approx(200 * found.facts["seconds"])
    del nvml.gpus[UUID]["PowerUsage"]
    assert watched().facts["energy_j"] is None


@pytest.mark.parametrize("energy", [[5000, 4000], [5000, "lost"]])
def test_reset_or_lost_energy_counter_is_null(nvml, energy):
    if energy[1] == "lost":
        energy = [5000, nvml.NVMLError(nvml.NVML_ERROR_UNKNOWN)]
    nvml.gpus[UUID] = gpu(TotalEnergyConsumption=energy)
    assert watched().facts["energy_j"] is None


def test_names_as_bytes(nvml):
    nvml.gpus[UUID] = gpu(Name=b"NVIDIA H200")
    assert watched().facts["gpu"] == "NVIDIA H200"


@pytest.mark.parametrize("error", ["UNINITIALIZED", "DRIVER_NOT_LOADED", "UNKNOWN"])
def test_driver_that_goes_away(nvml, error):
    nvml.gone = 2, getattr(nvml, f"NVML_ERROR_{error}")
    found = watched()
    assert found.facts["nvml"].startswith("NVMLError_")
    assert found.facts["clock_sm_mhz"] == {"min": 1980, "median": 1980, "max": 1980}
    assert found.facts["energy_j"] is None
    assert found.facts["throttle"] == {"idle": 1}
    assert found.invalid == []


@pytest.mark.parametrize(("error", "words"), [("GPU_IS_LOST", "GPU is lost"), ("RESET_REQUIRED", "requires restart")])
def test_lost_gpu_is_invalid(nvml, error, words):
    nvml.gone = 2, getattr(nvml, f"NVML_ERROR_{error}")
    found = watched()
    assert len(found.invalid) == 1
    assert found.invalid[0].startswith("lost: ")
    assert words in found.invalid[0]


def unwatched(found):
    """Check that everything that needs NVML is null. Returns: why there is no NVML."""
    known = {name for name, value in found.facts.items() if value is not None}
    assert known - {"cpu_others"} == {"nvml", "seconds"}
    assert found.invalid == []
    return found.facts["nvml"]


@pytest.mark.parametrize("error", ["LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH"])
def test_no_library(nvml, monkeypatch, error):
    def fail():
        raise nvml.NVMLError(getattr(nvml, f"NVML_ERROR_{error}"))

    monkeypatch.setattr(nvml, "nvmlInit", fail, raising=False)
    assert str(nvml.NVMLError(getattr(nvml, f"NVML_ERROR_{error}"))) in unwatched(watched())


def test_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml" in unwatched(watched())


def test_no_such_gpu(nvml):
    assert "Not Found" in unwatched(watched(OTHER))
    assert nvml.users == 0


def test_no_thread(nvml, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    monkeypatch.setattr(watch, "PATIENCE", 0.01)
    assert unwatched(watched()) == "NVML does not answer"


@pytest.mark.parametrize("hangs", ["nvmlInit", "nvmlDeviceGetMemoryInfo"])
def test_hanging_nvml_is_not_waited_for(nvml, monkeypatch, hangs):
    monkeypatch.setattr(watch, "PATIENCE", 0.05)
    goes_on = threading.Event()
    monkeypatch.setattr(nvml, hangs, lambda *args: goes_on.wait(30), raising=False)
    try:
        with Watch(UUID, interval_s=60) as found:
            pass
        assert found.facts["nvml"] == "NVML does not answer"
        assert found.facts["seconds"] is not None
        assert found.invalid == []
    finally:
        goes_on.set()
        for thread in threading.enumerate():
            if thread.name == "NVML":
                assert thread.daemon, "the process waits for it in the end"
                thread.join(30)


# Which GPU, and whose


def test_gpu_is_found_by_its_uuid(nvml, monkeypatch):
    """The first device of torch may be any of the machine's GPUs."""
    nvml.gpus = {OTHER: gpu(Name="the first", UUID=OTHER), UUID: gpu(Name="the second")}
    visible = [UUID, OTHER]
    properties = lambda device: SimpleNamespace(uuid=visible[device.index or 0].removeprefix("GPU-"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert gpu_uuid(torch.device("cuda")) == gpu_uuid("cuda:0") == UUID
    assert gpu_uuid("cuda:1") == OTHER
    assert watched(gpu_uuid("cuda")).facts["gpu"] == "the second"
    nvml.samples = 0
    assert watched(gpu_uuid("cuda:1")).facts["gpu"] == "the first"


@pytest.mark.parametrize("uuid", [UUID, "MIG-11111111-2222-3333-4444-555555555555"])
def test_complete_uuids_are_kept(monkeypatch, uuid):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    assert gpu_uuid("cuda") == uuid


def test_no_uuid(monkeypatch):
    assert gpu_uuid("cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="an old torch"))
    assert gpu_uuid("cuda") is None

    def fail(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert gpu_uuid("cuda") is None


def test_mig_instance(nvml):
    """torch names it like a GPU; it does not report clocks, power, utilisation or processes."""
    refused = nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
    name = f"MIG-{UUID.removeprefix('GPU-')}"
    own = {"Name", "UUID", "MemoryInfo"}
    part = {key: value if key in own else refused for key, value in gpu(UUID=name).items()}
    part |= {key: dict.fromkeys([(0,), (1,), (2,)], refused) for key in ("ClockInfo", "MaxClockInfo", "Temperature")}
    nvml.gpus = {name: part}
    found = watched()
    assert found.facts["nvml"] is None
    assert found.facts["uuid"] == name
    assert found.facts["memory_used_gb"] == 2.0
    assert found.facts["utilisation"] is found.facts["other_processes"] is found.facts["energy_j"] is None
    assert found.invalid == []


@pytest.mark.parametrize(
    ("pids", "allowed", "others", "invalid"),
    [
        ([1], 1, 0, []),
        ([1, 2], 1, 1, ["shared: 1 other process on the GPU"]),
        ([1, 2, 3], 1, 2, ["shared: 2 other processes on the GPU"]),
        ([1, 2], 2, 0, []),
        ([1, 2, 3], 2, 1, ["shared: 1 other process on the GPU"]),
        ([0, 0], 1, 1, ["shared: 1 other process on the GPU"]),
        ([], 1, None, []),
    ],
)
def test_other_processes(nvml, pids, allowed, others, invalid):
    nvml.gpus[UUID] = gpu(ComputeRunningProcesses=[processes(*pids), ()])
    found = watched(processes=allowed)
    assert found.facts["other_processes"] == others
    assert found.invalid == invalid


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("used", "reserved", "allowed", "shared"),
    [
        ([1 * GIB, 6 * GIB], 4 * GIB, 1, False),
        ([1 * GIB, 6 * GIB + 1], 4 * GIB, 1, True),
        ([3 * GIB, 1 * GIB], 0, 1, True),
        ([4 * GIB, 12 * GIB], 4 * GIB, 2, False),
        ([4 * GIB, 13 * GIB], 4 * GIB, 2, True),
    ],
)
def test_memory_of_other_processes(nvml, held, listed, used, reserved, allowed, shared):
    """In a container NVML lists no processes, or only those of the container."""
    held[0] = reserved
    changes = {} if listed else {"ComputeRunningProcesses": ()}
    nvml.gpus[UUID] = gpu(MemoryInfo=[SimpleNamespace(used=size) for size in used], **changes)
    found = watched(processes=allowed)
    assert found.invalid == (
        [f"shared: {max(used) / 1e9:.1f} GB of the GPU's memory are used, torch has {reserved / 1e9:.1f} GB"] * shared
    )


def test_shared_gpu_is_reported_once(nvml):
    nvml.gpus[UUID] = gpu(ComputeRunningProcesses=processes(1, 2), MemoryInfo=SimpleNamespace(used=9 * GIB))
    assert watched().invalid == ["shared: 1 other process on the GPU"]


def test_memory_that_torch_allocates_meanwhile_is_ours(nvml, held):
    nvml.gpus[UUID] = gpu(MemoryInfo=[SimpleNamespace(used=1 * GIB), SimpleNamespace(used=20 * GIB)])
    with Watch(UUID, interval_s=60) as found:
        held[0] = 19 * GIB
    assert found.invalid == []


# Other work on the CPUs


@pytest.fixture
def stat(monkeypatch, tmp_path):
    """stat(lines, own): the content of /proc/stat, in hundredths of a second, and the seconds of our own work."""
    file, now = tmp_path / "stat", {"own": (0, 0, 0, 0, 0)}
    fake = {"times": lambda: now["own"], "sched_getaffinity": lambda pid: {0, 2}, "sysconf": {"SC_CLK_TCK": 100}.get}
    monkeypatch.setattr(watch, "os", SimpleNamespace(**fake))
    monkeypatch.setattr(watch, "STAT", file)

    def write(lines, own=(0, 0, 0, 0)):
        file.write_text("\n".join(lines))
        now["own"] = (*(7 + seconds for seconds in own), 99 + sum(own))

    return write


def cpu(stat, monkeypatch, after, own, seconds=10.0, uuid=None, **options):
    """Watch the CPUs 0 and 2 for `seconds`."""
    clock = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(watch, "perf_counter", lambda: next(clock))
    stat(["cpu 9 9 9 9 9 9 9 9", *(f"cpu{n} 100 100 100 100 100 100 100 100 100 100" for n in range(3)), "intr 1 2"])
    with Watch(uuid, **options) as found:
        stat(["cpu 9 9 9 9 9 9 9 9", *after, "intr 1 2"], own)
    return found


def test_cpu_others_excludes_own_work(stat, monkeypatch):
    """10 s of two CPUs: 4 + 3.5 s of work and 0.5 s stolen, of which 5 are ours. Waiting is not work, a guest's time is
    part of a user's, and the CPU in between is not ours to use."""
    after = [
        "cpu0 300 200 200 900 900 100 100 100 300 100",
        "cpu1 1100 100 100 100 100 100 100 100 100 100",
        "cpu2 400 100 100 500 100 110 140 150 100 100",
    ]
    found = cpu(stat, monkeypatch, after, (1, 1, 2.5, 0.5))
    assert found.facts["cpu_others"] == pytest.approx((4 + 3.5 + 0.5 - 5) / 10)
    assert found.facts["seconds"] == 10
    assert found.invalid == ["shared: other work took 0.3 of 2 cores"]
    assert found.facts["nvml"] == "there is no GPU to watch"
    assert tuple(found.facts) == watch.FACTS


@pytest.mark.parametrize(
    ("others", "seconds", "allowed", "invalid"),
    [(1.9, 10, 1, False), (2.1, 10, 1, True), (2.1, 10, 2, False), (0.3, 0.4, 1, False), (0.3, 0.6, 1, True)],
)
def test_more_than_a_tenth_of_the_cores_is_invalid(stat, monkeypatch, others, seconds, allowed, invalid):
    """Of two cores; not in too short a time, and not if another process of ours takes turns."""
    after = [f"cpu{n} {100 + 50 * (others + 3):.0f} 100 100 100 100 100 100 100 100 100" for n in (0, 2)]
    found = cpu(stat, monkeypatch, after, (3, 0, 0, 0), seconds, processes=allowed)
    assert found.facts["cpu_others"] == pytest.approx(others / seconds)
    assert bool(found.invalid) is invalid


def test_cpu_others_is_not_negative(stat, monkeypatch):
    after = ["cpu0 150 100 100 100 100 100 100 100 100 100", "cpu2 100 100 100 100 100 100 100 100 100 100"]
    assert cpu(stat, monkeypatch, after, (9, 0, 0, 0)).facts["cpu_others"] == 0


@pytest.mark.parametrize(
    "lines", [["cpu0 0 0 0 0 0 0 0 0 0 0", "cpu2 0 0 0 0 0 0 0 0 0 0"], ["nonsense"], ["cpu0 x y"]]
)
def test_unusable_proc_stat_is_null(stat, monkeypatch, lines):
    found = cpu(stat, monkeypatch, lines, (1, 1, 0, 0))
    assert found.facts["cpu_others"] is None
    assert found.invalid == []


def test_no_proc_stat(monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "STAT", tmp_path / "none")
    assert unwatched(watched(None)) == "there is no GPU to watch"
    monkeypatch.setattr(watch, "STAT", watch.Path("/proc/stat"))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert watched(None).facts["cpu_others"] is None


def test_cpu_work_does_not_invalidate_a_gpu(nvml, stat, monkeypatch):
    after = [f"cpu{n} 1100 100 100 100 100 100 100 100 100 100" for n in (0, 2)]
    found = cpu(stat, monkeypatch, after, (0, 0, 0, 0), uuid=UUID)
    assert found.facts["cpu_others"] == 2
    assert found.invalid == []
