"""Execution providers of onnxruntime: which there are, what each needs, and what is here.

onnxruntime falls back to the CPU in silence: where a provider's library, its device or an operator
is missing, it makes a session that works, on the CPU. So a provider counts as here only when its
own proof says so (`Provider.look`), and what it runs is read from every session, see sessions.py.
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
    "Found",
    "Provider",
    "Soc",
    "Target",
    "WeightForm",
    "choose",
    "is_simulated",
    "onnxruntime",
]


def onnxruntime() -> Any:
    """The package. Raises UnsupportedError where it is not installed."""
    try:
        import onnxruntime as package
    except ImportError as e:
        raise UnsupportedError(
            f"an ONNX model needs the package onnxruntime: {install('onnx')} ({e})",
            what="onnxruntime",
        ) from e
    return package


#: The forms of weights in a graph that is made for a provider.
WeightForm = Literal["int8", "float16", "blocks"]
WEIGHT_FORMS: tuple[WeightForm, ...] = get_args(WeightForm)


@dataclass(frozen=True)
class Soc:
    """A system on a chip of Qualcomm, in QNN's numbers."""

    soc_model: int
    htp_arch: int


#: What --soc names. Source: ExecuTorch, its table of Qualcomm chipsets.
SOCS = {
    "sm8550": Soc(43, 73),  # Snapdragon 8 Gen 2
    "sm8650": Soc(57, 75),  # 8 Gen 3
    "sm8750": Soc(69, 79),  # 8 Elite
    "sm8850": Soc(87, 81),  # 8 Elite Gen 5
}


@dataclass(frozen=True)
class Found:
    """What there is of a provider. version: of its package; sdk: of the vendor's part in it, what
    compiled graphs depend on; devices: those it can use, the best first; missing: why it cannot be
    used and what to install, None: it can.
    """

    version: str | None = None
    sdk: str | None = None
    devices: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Target:
    """What a model is to run on.

    device: one of the provider's; fallback: the CPU may take what the provider does not; soc: a
    name of SOCS, None: the provider finds out; made_for: the provider that the model was made for;
    why: how it came to be, where nobody asked for exactly that.
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
    """A row. name: what --ep calls it; ep: what onnxruntime does, "": it has none; package: what
    to install; dialect: the form of a model that it wants.

    look: what proves that it is there, asked only when it is; it never raises. attach: adds it to
    SessionOptions, or returns what to give the session as `providers`.
    """

    name: str
    ep: str
    package: str
    dialect: str
    look: Callable[[], Found]
    attach: Callable[[Any, Any, Target], list[Any] | None]
    weights: tuple[
        WeightForm, ...
    ] = ()  # the forms that it takes, the best first; none: it runs nothing
    compiles: bool = False  # its compiled graphs are kept, see compiled.py


def is_simulated() -> bool:
    """Whether QNN has no NPU here but simulates one: on x86."""
    return platform.machine().lower() in ("x86_64", "amd64")


# ---- cpu -------------------------------------------------------------------------------------


def _look_cpu() -> Found:
    try:
        return Found(onnxruntime().__version__, devices=("CPU",))
    except UnsupportedError as e:
        return Found(missing=str(e))


def _attach_cpu(ort: Any, options: Any, target: Target) -> list[Any]:
    options.enable_mem_pattern = False  # a pattern for each length of the cache: none comes twice
    # threads that wait for work spin, in the way of those that have some: on cores that other
    # programs use too, two threads were 2.6 times as fast without
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ["CPUExecutionProvider"]


# ---- qnn: a plugin beside onnxruntime --------------------------------------------------------

_QNN = "QNNExecutionProvider"
_NEEDS_QNN = f"it needs the package onnxruntime-qnn, for Python 3.11 or newer: {install('qnn')}"
#: The SoC that this process simulates: QNN keeps its first architecture.
_simulated: dict[str, str] = {}


def _look_qnn() -> Found:
    try:
        plugin = importlib.import_module("onnxruntime_qnn")
        devices = _qnn_devices(onnxruntime(), plugin)
    except (ImportError, UnsupportedError, AttributeError) as e:
        return Found(missing=f"{_NEEDS_QNN} ({e})")
    except Exception as e:  # onnxruntime's own have no common root
        return Found(missing=f"its library cannot be loaded: {e}")
    version = plugin.__version__
    sdk = str(getattr(plugin.build_and_package_info, "qnn_version", version))
    if not devices:
        return Found(version, sdk, missing="onnxruntime-qnn finds no device on this machine")
    return Found(version, sdk, ("the HTP simulator" if is_simulated() else "HTP",))


def _qnn_devices(ort: Any, plugin: Any) -> list[Any]:
    """Its devices, NPUs first. The library stays registered for as long as the process lives."""

    def known() -> list[Any]:
        return [device for device in ort.get_ep_devices() if device.ep_name == _QNN]

    if not known():
        ort.register_execution_provider_library(_QNN, plugin.get_library_path())
    npu = ort.OrtHardwareDeviceType.NPU
    return sorted(known(), key=lambda device: device.device.type != npu)


def _attach_qnn(ort: Any, options: Any, target: Target) -> None:
    """The back end by its name, the SoC by both its numbers: with defaults, errors hide."""
    settings = {
        "backend_type": "htp",
        "htp_performance_mode": "burst",
        "offload_graph_io_quantization": "0",  # or the CPU gets the edges of a quantised graph
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


def _look_openvino() -> Found:
    try:
        ort = onnxruntime()
    except UnsupportedError:
        return Found(missing=_NEEDS_OPENVINO)
    if _OPENVINO not in ort.get_available_providers():
        return Found(missing=_NEEDS_OPENVINO)
    state = importlib.import_module("onnxruntime.capi._pybind_state")
    ids = state.get_available_openvino_device_ids()
    kinds = [k for k in ("NPU", "GPU", "CPU") if any(d.partition(".")[0] == k for d in ids)]
    if not kinds:
        return Found(ort.__version__, missing="OpenVINO finds no device on this machine")
    return Found(ort.__version__, devices=tuple(kinds))


def _attach_openvino(ort: Any, options: Any, target: Target) -> list[Any]:
    settings = {"device_type": target.device}
    if target.device == "CPU":
        settings["num_of_threads"] = str(target.threads)
        # or floats are computed in 16 bits on CPUs that have instructions for it
        settings["load_config"] = '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'
    return [(_OPENVINO, settings)]


# ---- coreml: in onnxruntime's wheels for macOS -----------------------------------------------

_COREML = "CoreMLExecutionProvider"
_COREML_UNITS = {"NPU": "CPUAndNeuralEngine", "GPU": "CPUAndGPU", "CPU": "CPUOnly"}


def _look_coreml() -> Found:
    try:
        ort = onnxruntime()
    except UnsupportedError as e:
        return Found(missing=str(e))
    if _COREML not in ort.get_available_providers():
        return Found(missing="it needs macOS, where the package onnxruntime holds it")
    return Found(ort.__version__, devices=tuple(_COREML_UNITS))


def _attach_coreml(ort: Any, options: Any, target: Target) -> list[Any]:
    """Core ML itself may put a node on the CPU all the same, and does not tell."""
    settings = {"ModelFormat": "MLProgram", "RequireStaticInputShapes": "1"}
    return [(_COREML, settings | {"MLComputeUnits": _COREML_UNITS[target.device]})]


# ---- those that onnxruntime cannot reach -----------------------------------------------------


def _absent(name: str, instead: str) -> Provider:
    def attach(ort: Any, options: Any, target: Target) -> None:
        raise AssertionError(f"{name} is never chosen")

    return Provider(name, "", "", "npu", lambda: Found(missing=instead), attach)


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
#: Those that run models.
RUNNERS = tuple(row.name for row in _ROWS if row.weights)


def choose(
    ep: str | None,
    made_for: str,
    *,
    threads: int,
    fallback: bool = False,
    soc: str | None = None,
) -> Target:
    """The provider to run a model on.

    ep: a name of PROVIDERS, with a device (`openvino:npu`) or without: then its best one; None:
    the one that the model was made for; "auto": that one if it is here, else the CPU provider.
    fallback: the CPU provider where it is not here. soc: a name of SOCS, for qnn.
    Raises InputError for a name that there is not, UnsupportedError for what is not here.
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
    """The device of a provider to use, and why where that is not plain. Raises UnsupportedError."""
    found = provider.look()
    if found.missing is not None:
        raise UnsupportedError(
            f"{provider.name} is not here: {found.missing}", what=provider.package or provider.name
        )
    if provider.name == "qnn" and soc is None and is_simulated():
        raise UnsupportedError(
            "qnn has no NPU on this machine and would simulate one: name the SoC with --soc",
            what="qnn without a SoC",
            supported=SOCS,
        )
    if not wanted:
        best = found.devices[0]
        is_npu = provider.name != "openvino" or best == "NPU"
        return best, "" if is_npu else "there is no NPU"
    if wanted.upper() not in found.devices:
        raise UnsupportedError(
            f"{provider.name} finds no {wanted.upper()} on this machine",
            what=f"{provider.name}:{wanted}",
            supported=[f"{provider.name}:{kind.lower()}" for kind in found.devices],
        )
    return wanted.upper(), ""
