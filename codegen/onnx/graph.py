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

_MOVING: Final = frozenset(
    {"Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
"""Ops that give elements of their first input, and no others."""

Shape = Sequence[Dim | str]


@dataclass(slots=True)
class Graph:
    """Nodes in order, with what they read and give.

    `place` names the node of the program that nodes are made for: layer, module and op. It is the
    beginning of the names of these nodes and of what they give, and stands in their metadata.

    Nodes that are equal to an earlier one, that reshape what was reshaped, and that give a value
    the shape it has are not added, and those that nothing reads are left out of the model: a
    step of one token is so short that each node counts. `exact` has the values held in float32
    that are numbers of a type of 16 bits.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    place: str = "step"
    exact: dict[str, DType] = field(default_factory=dict)
    _made: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _dims: dict[str, tuple[int, ...]] = field(default_factory=dict)  # -1: whatever is left
    _reshaped: dict[str, str] = field(default_factory=dict)  # what each was before
    _numbers: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of constants, as shapes
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
        given = {key: value for key, value in attrs.items() if value is not None}
        if isinstance(outputs, int):
            if kind == "Reshape":
                inputs = self._before(*inputs)
                target = self._numbers.get(inputs[1])
                if target is not None and self._dims.get(inputs[0]) == target:
                    return inputs[0]
            made = kind, domain, tuple(inputs), outputs, repr(sorted(given.items()))
            # onnxruntime fuses one with what reads it where nothing else does.
            if made in self._made and kind != "DequantizeLinear":
                return self._made[made]
        self._count += 1
        name = f"{self.place}/{kind}.{self._count}"
        if isinstance(outputs, int):
            outputs = [name, *(f"{name}:{i}" for i in range(1, outputs))]
            self._made[made] = name
            if kind == "Reshape":
                self._reshaped[name] = inputs[0]
                self.shaped(name, self._numbers.get(inputs[1], (0,)))
        moved = inputs if kind == "Concat" else inputs[:1] if kind in _MOVING else ()
        if len(kinds := {self.exact.get(x) for x in moved}) == 1 and (dtype := kinds.pop()):
            self.exact |= dict.fromkeys(outputs, dtype)
        node = helper.make_node(kind, inputs, outputs, name=name, domain=domain, **given)
        for key, text in self._metadata.items():
            node.metadata_props.append(onnx.StringStringEntryProto(key=key, value=text))
        self.nodes.append(node)
        return outputs[0]

    def _before(self, x: str, shape: str) -> tuple[str, str]:
        """What a `Reshape` of x can read instead: x as it was before it was reshaped."""
        takes_sizes = 0 in self._numbers.get(shape, (0,))  # 0: as long as x is there
        return (x if takes_sizes else self._reshaped.get(x, x)), shape

    def shaped(self, x: str, dims: Sequence[int]) -> None:
        """Note the shape of a value; -1 stands for a size that differs from step to step."""
        if 0 not in dims and list(dims).count(-1) <= 1:
            self._dims[x] = tuple(dims)

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
            if dtype is DType.I64 and array.ndim == 1:
                self._numbers[name] = tuple(array.tolist())
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
        nodes, read = self._needed()
        constants = set(self._constants.values()) - read
        held = [one for one in self.initializers if one.name not in constants]
        graph = helper.make_graph(nodes, name, self.inputs, self.outputs, held)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == CONTRIB for node in nodes):
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="infc"
        )
        helper.set_model_props(model, metadata)
        return model

    def _needed(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes whose results something reads, and all that is read."""
        read = {output.name for output in self.outputs}
        nodes = []
        for node in reversed(self.nodes):
            if not read.isdisjoint(node.output):
                nodes.append(node)
                read.update(node.input)
        return nodes[::-1], read


def _value(name: str, dtype: DType, shape: Shape) -> onnx.ValueInfoProto:
    dims = [dim if isinstance(dim, int) else str(dim) for dim in shape]
    return helper.make_tensor_value_info(name, STORED[dtype], dims)
