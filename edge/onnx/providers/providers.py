"""The table of onnxruntime's execution providers: what each needs, and whether it works here.

onnxruntime falls back to the CPU without an error: if a provider's library, its device or an
operator is missing, the session works, but on the CPU. So `Provider.look` checks each provider in a
way of its own, and sessions.py reads from every session what the provider really runs.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from edge.errors import InputError, UnsupportedError, brief
from edge.extras import install

__all__ = [
    "PROVIDERS",
    "RUNNERS",
    "SOCS",
    "WEIGHT_FORMS",
    "Availability",
    "Provider",
    "Soc",
    "Target",
    "WeightForm",
    "choose",
    "is_simulated",
    "onnxruntime",
]


def onnxruntime() -> Any:
    """The package onnxruntime. Raises UnsupportedError if it is not installed."""
    try:
        import onnxruntime as package
    except ImportError as e:
        raise UnsupportedError(
            f"an ONNX model needs the package onnxruntime: {install('onnx')} ({e})",
            what="onnxruntime",
        ) from e
    return package


#: A form of weights in a graph for a provider.
WeightForm = Literal["int8", "float16", "blocks"]
WEIGHT_FORMS: tuple[WeightForm, ...] = get_args(WeightForm)


@dataclass(frozen=True)
class Soc:
    """The numbers that QNN has for a system on a chip of Qualcomm."""

    soc_model: int
    htp_arch: int


#: The names that --soc takes. Source: ExecuTorch's table of Qualcomm chipsets.
SOCS = {
    "sm8550": Soc(43, 73),  # Snapdragon 8 Gen 2
    "sm8650": Soc(57, 75),  # 8 Gen 3
    "sm8750": Soc(69, 79),  # 8 Elite
    "sm8850": Soc(87, 81),  # 8 Elite Gen 5
}


@dataclass(frozen=True)
class Availability:
    """The state of a provider on this machine.

    version: of its package. sdk: version of the vendor's SDK in it, on which compiled graphs
    depend. devices: the usable ones, the best first. missing: why the provider cannot be used and
    what to install, None: it can be used.
    """

    version: str | None = None
    sdk: str | None = None
    devices: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Target:
    """The provider and device that a model runs on.

    device: one of the provider's. fallback: the CPU may run what the provider cannot. soc: a name
    of SOCS, None: the provider finds out. made_for: the provider that the model was made for.
    why: the reason for this target, if the caller did not ask for it.
    """

    provider: Provider
    device: str
    threads: int
    fallback: bool = False
    soc: str | None = None
    made_for: str = "cpu"
    why: str = ""

    def __str__(self) -> str:
        name = f"{self.provider.name} on {self.device}"
        if self.soc:
            name += f" for {self.soc}"
        return f"{name} ({self.why})" if self.why else name


@dataclass(frozen=True)
class Provider:
    """A row of the table.

    name: as --ep has it. ep: onnxruntime's name, "": onnxruntime does not have this provider.
    package: what to install. dialect: the dialect of models for it. look: finds out whether it
    works here, and never raises. attach: adds it to SessionOptions, or returns the argument
    `providers` of the session. weights: the forms that it takes, the best first; empty: it runs no
    models. compiles: its compiled graphs are kept, see compiled.py.
    """

    name: str
    ep: str
    package: str
    dialect: str
    look: Callable[[], Availability]
    attach: Callable[[Any, Any, Target], list[Any] | None]
    weights: tuple[WeightForm, ...] = ()
    compiles: bool = False


def is_simulated() -> bool:
    """Whether QNN simulates an NPU on this machine: on x86."""
    return platform.machine().lower() in ("x86_64", "amd64")


# ---- cpu -------------------------------------------------------------------------------------


def _look_cpu() -> Availability:
    try:
        return Availability(onnxruntime().__version__, devices=("CPU",))
    except UnsupportedError as e:
        return Availability(missing=str(e))


def _attach_cpu(ort: Any, options: Any, target: Target) -> list[Any]:
    options.enable_mem_pattern = False  # each length of the cache has a pattern that is used once
    # Threads that wait for work would spin, and delay threads that work. On cores that other
    # programs used too, two threads were 2.6 times as fast without spinning.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ["CPUExecutionProvider"]


# ---- qnn: a plugin of onnxruntime ------------------------------------------------------------

_QNN = "QNNExecutionProvider"
_NEEDS_QNN = f"it needs the package onnxruntime-qnn, for Python 3.11 or newer: {install('qnn')}"
#: "soc": the SoC that this process simulates. QNN keeps the first architecture of a process.
_simulated: dict[str, str] = {}


def _look_qnn() -> Availability:
    try:
        plugin = importlib.import_module("onnxruntime_qnn")
        devices = _qnn_devices(onnxruntime(), plugin)
    except (ImportError, UnsupportedError, AttributeError) as e:
        return Availability(missing=f"{_NEEDS_QNN} ({e})")
    except Exception as e:  # onnxruntime's exceptions have no common base class
        return Availability(missing=f"its library cannot be loaded: {e}")
    version = plugin.__version__
    sdk = str(getattr(plugin.build_and_package_info, "qnn_version", version))
    if not devices:
        return Availability(version, sdk, missing="onnxruntime-qnn finds no device on this machine")
    return Availability(version, sdk, ("the HTP simulator" if is_simulated() else "HTP",))


def _qnn_devices(ort: Any, plugin: Any) -> list[Any]:
    """QNN's devices, NPUs first. The library stays registered until the process ends."""

    def known() -> list[Any]:
        return [device for device in ort.get_ep_devices() if device.ep_name == _QNN]

    if not known():
        ort.register_execution_provider_library(_QNN, plugin.get_library_path())
    npu = ort.OrtHardwareDeviceType.NPU
    return sorted(known(), key=lambda device: device.device.type != npu)


def _attach_qnn(ort: Any, options: Any, target: Target) -> None:
    """Name the back end, and give both numbers of the SoC: defaults would hide errors."""
    settings = {
        "backend_type": "htp",
        "htp_performance_mode": "burst",
        "offload_graph_io_quantization": "0",  # else the CPU quantises inputs and outputs
    }
    if target.soc:
        first = _simulated.setdefault("soc", target.soc)
        if is_simulated() and first != target.soc:
            raise UnsupportedError(
                f"this process simulates {first} already, {target.soc} needs another one",
                what=f"{target.soc} after {first}",
            )
        soc = SOCS[target.soc]
        settings |= {"soc_model": str(soc.soc_model), "htp_arch": str(soc.htp_arch)}
    devices = _qnn_devices(ort, importlib.import_module("onnxruntime_qnn"))
    options.add_provider_for_devices(devices[:1], settings)


# ---- openvino: an onnxruntime of its own -----------------------------------------------------

_OPENVINO = "OpenVINOExecutionProvider"
_NEEDS_OPENVINO = (
    "it needs the package onnxruntime-openvino in the place of onnxruntime: "
    f"pip uninstall onnxruntime; {install('openvino')}"
)


def _look_openvino() -> Availability:
    try:
        ort = onnxruntime()
    except UnsupportedError:
        return Availability(missing=_NEEDS_OPENVINO)
    if _OPENVINO not in ort.get_available_providers():
        return Availability(missing=_NEEDS_OPENVINO)
    state = importlib.import_module("onnxruntime.capi._pybind_state")
    ids = state.get_available_openvino_device_ids()
    kinds = [k for k in ("NPU", "GPU", "CPU") if any(d.partition(".")[0] == k for d in ids)]
    if not kinds:
        return Availability(ort.__version__, missing="OpenVINO finds no device on this machine")
    return Availability(ort.__version__, devices=tuple(kinds))


def _attach_openvino(ort: Any, options: Any, target: Target) -> list[Any]:
    settings = {"device_type": target.device}
    if target.device == "CPU":
        settings["num_of_threads"] = str(target.threads)
        # Else CPUs with 16-bit float instructions compute floats in 16 bits.
        settings["load_config"] = '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'
    return [(_OPENVINO, settings)]


# ---- coreml: in onnxruntime's wheels for macOS -----------------------------------------------

_COREML = "CoreMLExecutionProvider"
_COREML_UNITS = {"NPU": "CPUAndNeuralEngine", "GPU": "CPUAndGPU", "CPU": "CPUOnly"}


def _look_coreml() -> Availability:
    try:
        ort = onnxruntime()
    except UnsupportedError as e:
        return Availability(missing=str(e))
    if _COREML not in ort.get_available_providers():
        return Availability(missing="it needs macOS, where the package onnxruntime holds it")
    return Availability(ort.__version__, devices=tuple(_COREML_UNITS))


def _attach_coreml(ort: Any, options: Any, target: Target) -> list[Any]:
    """Core ML may still run a node on the CPU, and does not report it."""
    settings = {"ModelFormat": "MLProgram", "RequireStaticInputShapes": "1"}
    return [(_COREML, settings | {"MLComputeUnits": _COREML_UNITS[target.device]})]


# ---- providers that onnxruntime cannot use ---------------------------------------------------


def _absent(name: str, instead: str) -> Provider:
    def attach(ort: Any, options: Any, target: Target) -> None:
        raise AssertionError(f"{name} is never chosen")

    return Provider(name, "", "", "npu", lambda: Availability(missing=instead), attach)


_ROWS = (
    Provider(
        "cpu",
        "CPUExecutionProvider",
        "onnxruntime",
        "cpu",
        _look_cpu,
        _attach_cpu,
        weights=("blocks", "int8", "float16"),
    ),
    Provider(
        "qnn",
        _QNN,
        "onnxruntime-qnn",
        "npu",
        _look_qnn,
        _attach_qnn,
        weights=("int8", "float16", "blocks"),
        compiles=True,
    ),
    Provider(
        "openvino",
        _OPENVINO,
        "onnxruntime-openvino",
        "npu",
        _look_openvino,
        _attach_openvino,
        weights=("blocks", "float16"),
    ),
    Provider(
        "coreml",
        _COREML,
        "onnxruntime",
        "npu",
        _look_coreml,
        _attach_coreml,
        weights=("float16",),
    ),
    _absent(
        "rknpu",
        "no package of onnxruntime drives Rockchip's NPU: language models run there in RKLLM, with "
        ".rkllm files of its own converter",
    ),
    _absent(
        "hailo",
        "no package of onnxruntime drives a Hailo: it runs .hef files of Hailo's own compiler, in "
        "HailoRT",
    ),
    _absent(
        "vitisai",
        "the package index has no onnxruntime that drives a Ryzen AI: AMD's installer of the Ryzen "
        "AI software brings its own",
    ),
    _absent(
        "nnapi",
        "no package of onnxruntime for Python has NNAPI: it is in the Android library alone, for "
        "Java and C, and Google has given it up; on a Snapdragon take qnn",
    ),
)
PROVIDERS = {row.name: row for row in _ROWS}
#: The names of providers that run models.
RUNNERS = tuple(row.name for row in _ROWS if row.weights)


def choose(
    ep: str | None,
    made_for: str,
    *,
    threads: int,
    fallback: bool = False,
    soc: str | None = None,
) -> Target:
    """Choose the provider and the device to run a model on.

    ep: a name of PROVIDERS, with a device (`openvino:npu`) or without, which means its best device;
    None: the provider that the model was made for; "auto": that provider if it works here, else
    the CPU provider. fallback: take the CPU provider if the other one does not work here. soc: a
    name of SOCS, for qnn. Raises InputError for an unknown name, UnsupportedError for a provider
    or device that does not work here.
    """
    if soc is not None and soc not in SOCS:
        raise InputError(f"soc {brief(soc)}: one of {', '.join(SOCS)}")
    name, _, device = (made_for if ep in (None, "auto") else ep or "").partition(":")
    if name not in PROVIDERS:
        raise InputError(f"ep {brief(ep or made_for)}: one of auto, {', '.join(PROVIDERS)}")
    if soc is not None and name != "qnn" and ep != "auto":
        raise InputError(f"soc {soc} is for qnn, this is to run on {name}")
    try:
        device, why = _device(PROVIDERS[name], device, soc)
    except UnsupportedError as e:
        if not (fallback or ep == "auto") or name == "cpu":
            raise
        name, device, soc, why = "cpu", "CPU", None, str(e)
        _device(PROVIDERS["cpu"], "", None)
    return Target(
        PROVIDERS[name], device, threads, fallback, soc if name == "qnn" else None, made_for, why
    )


def _device(provider: Provider, wanted: str, soc: str | None) -> tuple[str, str]:
    """The device of a provider to use, and the reason, "" if it needs none.

    wanted: the device that was asked for, "": the best. Raises UnsupportedError.
    """
    availability = provider.look()
    if availability.missing is not None:
        raise UnsupportedError(
            f"{provider.name} is not here: {availability.missing}",
            what=provider.package or provider.name,
        )
    if provider.name == "qnn" and soc is None and is_simulated():
        raise UnsupportedError(
            "qnn has no NPU on this machine and would simulate one: name the SoC with --soc",
            what="qnn without a SoC",
            supported=SOCS,
        )
    if not wanted:
        best = availability.devices[0]
        is_npu = provider.name != "openvino" or best == "NPU"
        return best, "" if is_npu else "there is no NPU"
    if wanted.upper() not in availability.devices:
        raise UnsupportedError(
            f"{provider.name} finds no {wanted.upper()} on this machine",
            what=f"{provider.name}:{wanted}",
            supported=[f"{provider.name}:{kind.lower()}" for kind in availability.devices],
        )
    return wanted.upper(), ""
