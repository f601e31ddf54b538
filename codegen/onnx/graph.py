"""An ONNX graph under construction: nodes with names that trace back, constants, weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ...ir.program import Node
from ...ir.safetensors import Entry
from ...ir.types import Dim, DType
from .types import NUMPY, STORED

OPSET: Final = 24
CONTRIB: Final = "com.microsoft"
_IR_VERSION: Final = 11
"""Of the file format: the one that came with the opset."""

Shape = Sequence[Dim | str]


@dataclass(slots=True)
class Graph:
    """Nodes in order, with what they read and give.

    `place` names the node of the program that nodes are made for: layer, module and op. It is the
    beginning of the names of these nodes and of what they give, and stands in their metadata.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    place: str = "step"
    _metadata: dict[str, str] = field(default_factory=dict)
    _constants: dict[tuple[bytes, tuple[int, ...], DType], str] = field(default_factory=dict)
    _count: int = 0

    def enter(self, node: Node) -> None:
        """From now on, nodes are made for a node of the program."""
        layer = "outside" if node.layer is None else f"layers.{node.layer}"
        self.place = "/".join(part for part in (layer, node.source, node.op) if part)
        self._metadata = {"infc.layer": "" if node.layer is None else str(node.layer)}
        self._metadata |= {"infc.module": node.source or "", "infc.op": node.op}

    def leave(self, place: str) -> None:
        """From now on, nodes are made for no node of the program."""
        self.place, self._metadata = place, {}

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attrs: Any,
    ) -> str:
        """Add a node; the name of the first value that it gives.

        `outputs` are names, or how many to make up. Attributes that are None are left out.
        """
        self._count += 1
        name = f"{self.place}/{kind}.{self._count}"
        if isinstance(outputs, int):
            outputs = [name, *(f"{name}:{i}" for i in range(1, outputs))]
        given = {key: value for key, value in attrs.items() if value is not None}
        node = helper.make_node(kind, inputs, outputs, name=name, domain=domain, **given)
        for key, text in self._metadata.items():
            node.metadata_props.append(onnx.StringStringEntryProto(key=key, value=text))
        self.nodes.append(node)
        return outputs[0]

    def split(self, x: str, axis: int) -> tuple[str, str]:
        """The two halves of x along an axis."""
        first = self.op("Split", [x], 2, axis=axis, num_outputs=2)
        return first, f"{first}:1"

    def const(self, value: Any, dtype: DType = DType.I64) -> str:
        """The name of a constant; equal ones are stored once."""
        array = np.asarray(value, NUMPY[dtype])
        key = array.tobytes(), array.shape, dtype
        if key not in self._constants:
            name = self._constants[key] = f"constant.{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """x in a shape with at most one -1."""
        return self.op("Reshape", [x, self.const(list(shape))])

    def input(self, name: str, dtype: DType, shape: Shape) -> str:
        """Declare an input of the model."""
        self.inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: DType, shape: Shape) -> None:
        """Declare an output of the model."""
        self.outputs.append(_value(name, dtype, shape))

    def external(
        self, entry: Entry, data_at: int, file: str, dtype: int, shape: Sequence[int]
    ) -> None:
        """A tensor whose data lie in another file beside the model."""
        tensor = onnx.TensorProto(name=entry.name, data_type=dtype, dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = {
            "location": file,
            "offset": data_at + entry.begin,
            "length": entry.end - entry.begin,
        }
        for key, value in place.items():
            tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
        self.initializers.append(tensor)

    def model(self, name: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """The whole model; `metadata` is what its readers may ask it for."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == CONTRIB for node in self.nodes):
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="infc"
        )
        helper.set_model_props(model, metadata)
        return model


def _value(name: str, dtype: DType, shape: Shape) -> onnx.ValueInfoProto:
    dims = [dim if isinstance(dim, int) else str(dim) for dim in shape]
    return helper.make_tensor_value_info(name, STORED[dtype], dims)
