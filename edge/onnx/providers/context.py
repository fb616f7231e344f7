"""Checks that a graph, compiled elsewhere, is for this provider, SDK and SoC.

QNN's simulator runs a graph of another SoC without an error, and a device may crash.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edge.errors import UnsupportedError
from edge.onnx.providers.providers import SOCS

if TYPE_CHECKING:
    from edge.onnx.files.proto import OnnxFile
    from edge.onnx.providers.providers import Target

__all__ = ["require"]

#: The format of onnxruntime-qnn: format, back end, SDK, version of the back end, arch, SoC, ...
_COMPATIBILITY = re.compile(r"v\d+:\d+:[\d.]+:[\d.]+:(\d{1,4}):(\d{1,4})\b")


def require(graph: OnnxFile, target: Target) -> None:
    """Raise UnsupportedError for a graph compiled for another provider, SDK or SoC."""
    nodes = [node for node in graph.nodes if node.op == "EPContext"]
    if not nodes:
        return
    availability = target.provider.look()
    advice = f"it was compiled elsewhere and cannot run on {target}: get the model for that"
    for node in nodes:
        source = _text(node.attributes.get("source"))
        if source not in ("", target.provider.ep):
            raise UnsupportedError(f"{graph.path} is for {source}: {advice}", what=source)
        sdk = _text(node.attributes.get("ep_sdk_version")).removeprefix("v")
        ours = availability.sdk
        if sdk and ours and not f"{sdk}.".startswith(f"{ours}."):
            raise UnsupportedError(
                f"{graph.path} is of SDK {sdk}, here is {ours}: {advice}", what=f"SDK {sdk}"
            )
    match = _COMPATIBILITY.match(
        graph.metadata.get(f"ep_compatibility_info.{target.provider.ep}", "")
    )
    if match and target.soc:
        arch, soc = map(int, match.groups())
        wanted = SOCS[target.soc]
        if (soc, arch) != (wanted.soc_model, wanted.htp_arch):
            raise UnsupportedError(
                f"{graph.path} is for the SoC {soc} of QNN's: {advice}", what=f"SoC {soc}"
            )


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
