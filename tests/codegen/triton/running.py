"""Steps of a planned program by the interpreter: what an executor does, in plain arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from infc.codegen.triton.backend import Generated, generate
from infc.codegen.triton.calls import ARGUMENTS_OF_TILES, KernelCode
from infc.codegen.triton.options import TritonOptions
from infc.ir.interpret import WeightSource
from infc.ir.launches import (
    Argument,
    Extent,
    Form,
    Integer,
    Launch,
    Pointer,
    Real,
    TensorMap,
)
from infc.ir.program import HIDDEN, LOGITS, Program, hidden_width, vocabulary_size
from infc.ir.resources import KvGroup
from infc.ir.targets import Target, resolve_target
from infc.runtime.sampling.adjustments import ADJUSTED
from infc.runtime.scheduling.step import Step, StepOutput

from .interpreting import Bytes, Call, Matrix, Place

TARGET = resolve_target("sm_90")


def as_bytes(array: NDArray[np.generic]) -> Bytes:
    """The bytes of an array."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def tensor_bytes(tensor: torch.Tensor) -> Bytes:
    """The bytes of a tensor of any type."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().copy()


class Carrier(Protocol):
    """What carries out launches."""

    def run(self, calls: Sequence[Call], arrays: Mapping[str, Bytes]) -> dict[str, Bytes]:
        """The arrays after the calls."""
        ...


@dataclass(slots=True)
class Runner:
    """A program, its weights and its pages; pages begin as NaN, or as codes with scales of NaN."""

    program: Program
    weights: WeightSource
    process: Carrier
    num_blocks: int = 16
    target: Target = TARGET
    options: TritonOptions = field(default_factory=TritonOptions)
    made: Generated = field(init=False)
    pages: dict[str, Bytes] = field(default_factory=dict)
    tokens_before: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self) -> None:
        self.made = generate(self.program, self.target, self.options)
        for group in self.program.resources:
            self.pages[group.name] = np.full(self.num_blocks * group.bytes_per_block(), 0xFF, "u1")

    def run(self, step: Step, form: str | None = None) -> StepOutput:
        """What the step returns; `form` names one other than the first that fits."""
        one_query = step.num_tokens == step.num_sequences
        chosen = self._form(step, one_query=one_query, name=form)
        sizes, arrays = self._arrays(step, chosen)
        calls = [self._call(one, sizes) for one in chosen.launches if _needed(one, step)]
        places = [
            one.place if isinstance(one, Matrix) else one
            for call in calls
            for one in call.arguments
        ]
        used = {place.array for place in places if isinstance(place, Place)}
        after = self.process.run(calls, {name: arrays[name] for name in sorted(used)})
        for name in self.pages:
            self.pages[name] = after.get(f"state:{name}", self.pages[name])
        return self._output(step, {**arrays, **after})

    def _form(self, step: Step, *, one_query: bool, name: str | None) -> Form:
        for form in self.made.forms:
            fits = step.num_tokens <= form.max_tokens and (one_query or not form.one_query)
            if name == form.name or (name is None and fits):
                return form
        raise LookupError(name or step.num_tokens)

    def _arrays(self, step: Step, form: Form) -> tuple[dict[str, int], dict[str, Bytes]]:
        counts = np.diff(step.query_starts)
        tiles = [(b, r) for b, n in enumerate(counts) for r in range(0, n, form.query_tile)]
        pairs = np.array(tiles, np.int32).reshape(-1, 2)
        rows = step.logits_rows
        rows = np.arange(len(step.logits_index), dtype=np.int32) if rows is None else rows
        changes = step.adjustments
        sizes = {
            "T": step.num_tokens,
            "R": len(step.logits_index),
            "B": step.num_sequences,
            "D": len(step.draws),
            "A": 0 if changes is None else len(changes.rows),
            "L": len(rows),
            "P": len(step.carried),
            "C": max((len(one) for one in step.block_copies), default=0),
            "tiles": len(tiles),
        }
        vocab, width = vocabulary_size(self.program), hidden_width(self.program)
        arrays = {
            "arena": np.full(self.made.arena_bytes, 0x7F, np.uint8),
            **{f"step:{k}": as_bytes(v) for k, v in self._step_arrays(step, pairs, rows).items()},
            **{f"state:{name}": pages for name, pages in self.pages.items()},
            "output:tokens": as_bytes(np.full(sizes["D"], -7, np.int32)),
            f"output:{LOGITS}": as_bytes(np.full(sizes["L"] * (vocab or 0), np.nan, np.float32)),
            f"output:{HIDDEN}": as_bytes(np.full(sizes["R"] * (width or 0), np.nan, np.float32)),
        }
        for weight in self.made.weights:
            arrays[f"weight:{weight.name}"] = tensor_bytes(self.weights(weight.name))
        return sizes, arrays

    def _step_arrays(
        self, step: Step, tiles: NDArray[np.int32], rows: NDArray[np.int32]
    ) -> Mapping[str, NDArray[np.generic]]:
        changes = step.adjustments
        none = np.zeros(0, np.int32)
        arrays: dict[str, NDArray[np.generic]] = {
            **{"token_ids": step.token_ids, "positions": step.positions},
            **{"query_starts": step.query_starts, "context_lengths": step.context_lengths},
            **{"logits_index": step.logits_index, "logits_rows": rows, "carried": step.carried},
            **{"draws": step.draws, "tokens_before": self.tokens_before},
            **{"tile_sequences": tiles[:, 0], "tile_rows": tiles[:, 1]},
            "adjusted": np.zeros(0, ADJUSTED) if changes is None else changes.rows,
        }
        for name in ("bias_ids", "bias", "count_ids", "counts", "masks"):
            arrays[name] = none if changes is None else getattr(changes, name)
        most = max((len(one) for one in step.block_copies), default=0)
        for place, group in enumerate(self.program.resources):
            assert isinstance(group, KvGroup)
            table = np.zeros((step.num_sequences, self.made.table_width[group.name]), np.int32)
            table[:, : step.block_tables[place].shape[1]] = step.block_tables[place]
            copies = np.zeros((most, 2), np.int32)
            copies[: len(step.block_copies[place])] = step.block_copies[place]
            arrays[f"block_table:{group.name}"] = table
            arrays[f"slots:{group.name}"] = step.slots[place]
            arrays[f"block_copies:{group.name}"] = copies
        return arrays

    def _call(self, launch: Launch, sizes: Mapping[str, int]) -> Call:
        code = self.made.codes[launch.kernel]
        arguments: list[Place | Matrix | int | float] = []
        for (_, kind), argument in by_parameter(code, launch):
            match argument:
                case Pointer():
                    arguments.append(_place(argument, kind.removeprefix("*")))
                case TensorMap():
                    place = _place(
                        argument.base, kind.removeprefix("tensordesc<").partition("[")[0]
                    )
                    rows, columns = (extent.evaluate(sizes) for extent in argument.shape)
                    box, swizzle = argument.box, argument.swizzle_bytes
                    arguments.append(Matrix(place, (rows, columns), (box[0], box[1]), swizzle))
                case Integer(value=value):
                    arguments.append(value.evaluate(sizes))
                case Real(value=number):
                    arguments.append(number)
        grid = tuple(_size(extent, sizes) for extent in launch.grid)
        return Call(code.plain(), grid, tuple(arguments), launch.dependent)

    def _output(self, step: Step, after: Mapping[str, Bytes]) -> StepOutput:
        vocab, width = vocabulary_size(self.program), hidden_width(self.program)
        hidden = None
        if step.wants_hidden and width is not None:
            hidden = after[f"output:{HIDDEN}"].view(np.float32).reshape(-1, width)
        logits = after[f"output:{LOGITS}"].view(np.float32).reshape(step.num_logits, vocab or 0)
        return StepOutput(after["output:tokens"].view(np.int32), logits, hidden)


def by_parameter(code: KernelCode, launch: Launch) -> Iterator[tuple[tuple[str, str], Argument]]:
    """Each parameter with its argument; of those for a matrix in tiles, the descriptor."""
    arguments = iter(launch.arguments)
    for parameter in code.parameters:
        argument = next(arguments)
        yield parameter, argument
        if isinstance(argument, TensorMap):
            check_numbers(argument, [next(arguments) for _ in range(ARGUMENTS_OF_TILES - 1)])
    assert not list(arguments), "arguments without a parameter"


def check_numbers(matrix: TensorMap, rest: Sequence[Argument]) -> None:
    """Behind a descriptor are its shape and strides, these as words of 64 bits."""
    rows, columns = matrix.shape
    expected = (rows, columns, columns, Extent(0), Extent(1), Extent(0))
    assert rest == [Integer(extent) for extent in expected]


def _place(pointer: Pointer, kind: str) -> Place:
    name = "arena" if pointer.space == "arena" else f"{pointer.space}:{pointer.name}"
    return Place(name, pointer.offset, kind)


def _size(extent: Extent, sizes: Mapping[str, int]) -> int:
    return extent.evaluate(sizes)


def _needed(launch: Launch, step: Step) -> bool:
    return {
        "always": True,
        "copies": any(len(one) for one in step.block_copies),
        "head": step.needs_head,
        "draws": len(step.draws) > 0,
        "sampled": bool(step.draws["temperature"].any()),
        "adjusted": step.adjustments is not None,
        "logits": step.num_logits > 0,
        "hidden": step.wants_hidden,
    }[launch.when]
