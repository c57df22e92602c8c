"""The pipeline: calibration samples flow through decoder blocks, one block resident at a time.

    for block in stream.blocks():
        for linear, norm in block.observe(InputNorm):
            linear.keep(...)

When the loop moves on, the stream takes the samples through the pruned block, writes the block's shard, journals it
and drops it, while the next block is already being read. How often a block runs:

- `sequential="block"` (the papers): all statistics come from the dense block, then the pruned block runs once more. The
  observing pass stops at the last linear's input, whose product nobody needs.
- `sequential="sublayer"`: a linear is pruned as soon as its own inputs are complete and is used pruned from then on,
  so the samples cross the block once. Every micro-batch's forward is a coroutine that waits at each linear until all
  the others have arrived there, which works for any architecture because the model's own code runs.
- `match_dense` (with sublayer): the samples cross the dense model, too, one input ahead, so that a statistic sees what a
  linear reads in both models, and what the residual stream has lost: twice.
- `propagate="dense"`: the next block sees the dense block's output; the samples cross the block once.

Of a block with experts each expert's matrices are linears of their own, observed on the tokens that are routed to them; all
experts run in every forward, so that every micro-batch meets every linear (`experts`).

The model's own forward runs once with recorders in place of the blocks, so each block is later called with exactly the
arguments (masks per layer type, position embeddings, ...) that the model would have passed.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from .errors import LLMPruneError
from .experts import Experts
from .models import Linear, Skeleton
from .output import Output
from .ranks import Ranks
from .statistics import CrossHessian, Ends, Statistic, all_finite, by_sample

if TYPE_CHECKING:
    from .activation_plan import Plan

S = TypeVar("S", bound=Statistic)
C = TypeVar("C", bound="Cutter")
Propagate = Literal["pruned", "dense"]
Sequential = Literal["block", "sublayer"]


class _Stop(Exception):
    """Ends a forward whose remaining result nobody needs. Private, so that no model's own error is mistaken for it."""


@dataclass
class Clock:
    """Seconds the main thread spent in each part of a run."""

    capture: float = 0.0
    observe: float = 0.0
    decide: float = 0.0
    advance: float = 0.0
    read_wait: float = 0.0
    write_wait: float = 0.0
    forwards: float = field(default=0.0, metadata={"unit": "block forwards of the whole calibration set"})

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - start)


class Activations:
    """Hidden states of all samples, [samples, tokens, features], in memory or in a memory-mapped file."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, offload: Path | None) -> None:
        self.file: Path | None = None
        if offload is None:
            self.states_NTI = torch.empty(shape, dtype=dtype)
        else:
            self.file = offload / f"llmprune-activations-{time.time_ns():x}.bin"
            count = shape[0] * shape[1] * shape[2]
            try:
                offload.mkdir(parents=True, exist_ok=True)
                with open(self.file, "wb") as stream:
                    # A mapped file with holes is a SIGBUS when the disk runs full; without them it is an error here.
                    os.posix_fallocate(stream.fileno(), 0, count * dtype.itemsize)
            except OSError as error:
                if self.file.exists():
                    self.file.unlink()
                raise LLMPruneError(
                    f"--offload-activations {offload} cannot hold {count * dtype.itemsize / 1e9:.2f} GB of activations "
                    f"({error}): give a directory on a disk with room."
                ) from error
            self.states_NTI = torch.from_file(str(self.file), shared=True, size=count, dtype=dtype).view(shape)
            # The mapping keeps the file alive; without a name nothing is left behind, however the run ends.
            self.file.unlink()

    def __getitem__(self, batch: slice) -> Tensor:
        return self.states_NTI[batch]

    def __setitem__(self, batch: slice, states_BTI: Tensor) -> None:
        self.states_NTI[batch] = states_BTI


class Replay:
    """The arguments each block got from the model's own forward, besides the hidden states."""

    def __init__(self) -> None:
        self.calls: dict[tuple[int, int], tuple[tuple[object, ...], dict[str, object]]] = {}
        self._pool: list[Tensor] = []

    def record(self, batch: int, block: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.calls[batch, block] = (
            tuple(self._share(value) for value in args),
            {key: self._share(value) for key, value in kwargs.items()},
        )

    def _share(self, value: object) -> object:
        """Masks and rotary tables are the same for every micro-batch: keep one copy of equal tensors."""
        if isinstance(value, tuple):
            return tuple(self._share(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        for known in self._pool:
            alike = (known.shape, known.dtype, known.device) == (value.shape, value.dtype, value.device)
            if known is value or (alike and torch.equal(known, value)):
                return known
        self._pool.append(value)
        return value


class Cutter(Protocol):
    """How a structured method's blocks lie on the disk."""

    def store(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors as they are written, from those that ran."""

    def restore(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors as they ran, from those that were written."""


def _return_free_memory() -> None:
    """Give freed pages back to the system, where the C library can.

    Weights live as long as their block, activations for moments; on one heap they leave holes, and without this resident
    memory grows by a tenth of a block with every block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


class Stream:
    """Moves calibration samples through the blocks of a model.

    Args:
        skeleton: the model without weights.
        ids_NT: calibration token ids, int64 [samples, tokens], of this rank; None for methods that need no data.
        output: where finished blocks go; None to only look (evaluation, dry runs).
        micro_batch: samples per forward. Statistics do not depend on it.
        propagate, sequential: see the module's docstring.
        offload: directory for the hidden states' memory-mapped file.
        advance_progress: called once per finished block with its name.
        ranks: the other processes of the run.
        keep_last: run the samples through the last block, too, whose output pruning does not need.
        match_dense: see the module's docstring.
        compare_ends: measure each block's influence, which runs with an output do for the record.
        sparsities: of every block, where they are not all the recipe's.
        first_sample: how many samples of the calibration set come before this rank's.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        ids_NT: Tensor | None,
        *,
        output: Output | None = None,
        micro_batch: int = 1,
        propagate: Propagate = "pruned",
        sequential: Sequential = "block",
        offload: Path | None = None,
        advance_progress: Callable[[str], None] = lambda name: None,
        ranks: Ranks | None = None,
        keep_last: bool = False,
        match_dense: bool = False,
        compare_ends: bool = False,
        sparsities: list[float] | None = None,
        first_sample: int = 0,
    ) -> None:
        self.skeleton = skeleton
        self.ids_NT = ids_NT
        self.output = output
        self.propagate, self.sequential = propagate, sequential
        self.advance_progress = advance_progress
        self.ranks = ranks or Ranks()
        self.keep_last = keep_last
        self.match_dense = match_dense
        self.compare_ends = compare_ends or output is not None
        self.sparsities = sparsities
        self.first_sample = first_sample
        # All ranks' samples, for what looks at the whole model.
        self.calibration_NT = ids_NT
        self.clock = Clock()
        self.replay = Replay()
        self.batches: list[slice] = []
        self.activations: Activations | None = None
        # What the dense model has in the same place, where the two are matched.
        self.dense_activations: Activations | None = None
        # How blocks are made smaller, once a method has decided that.
        self.cutter: Cutter | None = None
        # What every linear may leave out of its inputs, once a method that leaves weights alone has decided that.
        self.plan: Plan | None = None
        self._forward = False
        self._writing: Future[None] | None = None
        # What the latest block's input and output have to do with each other.
        self.ends = Ends()
        # The linear that runs last in a block with these linears, once the first forward has shown it. All by place.
        self.last: dict[tuple[str, ...], str] = {}
        # Linears that read the same tensor as another which runs before them (k and v: q), likewise.
        self.leaders: dict[str, str] = {}
        if ids_NT is not None:
            samples = len(ids_NT)
            self.batches = [slice(i, min(i + micro_batch, samples)) for i in range(0, samples, micro_batch)]
        self._offload = offload

    # Hidden states -----------------------------------------------------------------------------------------------

    def capture(self) -> None:
        """Embed the samples and record what each block is called with: the model's own forward, blocks left out."""
        assert self.ids_NT is not None
        last = len(self.skeleton.blocks) - 1

        def record(batch: int, block: int, *args: object, hidden_states: Tensor | None = None, **kwargs: object) -> Tensor:
            if hidden_states is None:
                hidden_states, args = args[0], args[1:]  # type: ignore[assignment]
            assert hidden_states is not None
            self.replay.record(batch, block, args, kwargs)
            if block == 0:
                self._store(batch, hidden_states)
                if self.dense_activations:
                    self.dense_activations[self.batches[batch]] = hidden_states
            if block == last:
                raise _Stop
            return hidden_states

        with self.clock.measure("capture"), self.outer_loaded(head=False):
            for batch in range(len(self.batches)):
                with self.blocks_replaced(partial(record, batch)), suppress(_Stop):
                    self.skeleton.model.base_model(input_ids=self._ids(batch), use_cache=False)

    @contextmanager
    def outer_loaded(self, *, head: bool) -> Iterator[None]:
        """The embedding, the final norm and, where asked for, the head are in memory inside this context."""
        self.skeleton.fill_outer(head=head)
        try:
            yield
        finally:
            self.skeleton.empty_outer()

    @contextmanager
    def blocks_replaced(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Inside, block i's forward is `forward(i, ...)`. The modules stay, and with them the attributes models read."""
        for index, block in enumerate(self.skeleton.blocks):
            block.forward = partial(forward, index)
        try:
            yield
        finally:
            for block in self.skeleton.blocks:
                del block.forward

    def _ids(self, batch: int) -> Tensor:
        assert self.ids_NT is not None
        return self.ids_NT[self.batches[batch]].to(self.skeleton.device)

    def _store(self, batch: int, hidden_BTI: Tensor) -> None:
        if self.activations is None:
            assert self.ids_NT is not None
            shape = (*self.ids_NT.shape, hidden_BTI.shape[-1])
            self.activations = Activations(shape, hidden_BTI.dtype, self._offload)
            if self.match_dense:
                self.dense_activations = Activations(shape, hidden_BTI.dtype, self._offload)
        self.activations[self.batches[batch]] = hidden_BTI

    def hidden(self, batch: int) -> Tensor:
        """A micro-batch's current hidden states, [samples, tokens, features], on the device."""
        assert self.activations is not None
        return self.activations[self.batches[batch]].to(self.skeleton.device)

    def forward(self, block: int, batch: int) -> Tensor:
        """A block's output for a micro-batch, [samples, tokens, features]."""
        return self._run(block, batch, self.hidden(batch))

    def gap(self, part: slice) -> Tensor:
        """How far a micro-batch of the pruned model is from the dense model, at a block's input."""
        assert self.activations is not None
        assert self.dense_activations is not None
        return (self.dense_activations[part] - self.activations[part]).to(self.skeleton.device)

    def forward_dense(self, block: int, batch: int) -> None:
        """Take a micro-batch of the dense model through a block that is dense, if only until the forward gets there."""
        assert self.dense_activations is not None
        part = self.batches[batch]
        self.dense_activations[part] = self._run(block, batch, self.dense_activations[part].to(self.skeleton.device))

    def _run(self, block: int, batch: int, hidden_BTI: Tensor) -> Tensor:
        args, kwargs = self.replay.calls[batch, block]
        output = self.skeleton.blocks[block](hidden_BTI, *args, **kwargs)
        # Older architectures return a tuple. A tensor must not be indexed: [0] would keep one sample only.
        return output[0] if isinstance(output, tuple) else output

    def finish_forward(self, block: int, batch: int, output_BTI: Tensor) -> None:
        """Check a block's output, compare it with the input and make it the input of the next block."""
        if not all_finite(output_BTI):
            raise LLMPruneError(
                f"Block {block} produced NaN or infinite activations in {self.skeleton.dtype}: check the weights, or "
                "compute in a wider type with --dtype float32."
            )
        if self.compare_ends:
            self.ends.update(self.hidden(batch), output_BTI)
        self._store(batch, output_BTI)

    def skip(self, blocks: int) -> None:
        """Take the captured samples through the first blocks, as the checkpoint has them."""
        for index in range(blocks):
            self.skeleton.fill_block(index, self._read_block(index, finished=0))
            for batch in range(len(self.batches)):
                self.finish_forward(index, batch, self.forward(index, batch))
            self.skeleton.empty_block(index)

    # Blocks ------------------------------------------------------------------------------------------------------

    def survey(self, *, propagate: Propagate = "dense") -> Stream:
        """A stream over the same samples that only looks: nothing is written, and every block's output is computed."""
        survey = Stream(
            self.skeleton,
            self.ids_NT,
            propagate=propagate,
            sequential="block" if propagate == "dense" else "sublayer",
            offload=self._offload,
            advance_progress=self.advance_progress,
            ranks=self.ranks,
            keep_last=propagate == "dense",
            compare_ends=propagate == "dense",
            first_sample=self.first_sample,
        )
        survey.batches, survey.clock = self.batches, self.clock
        return survey

    def operate(self, cutter: C) -> C:
        """From now on blocks are written as `cutter` says."""
        self.cutter = cutter
        return cutter

    def blocks(self, *, forward: bool = True) -> Iterator[Block]:
        """The blocks that remain to be pruned, in order; finished ones are replayed from the output.

        Args:
            forward: whether the samples go through the blocks; a method that has seen all it needs only writes.
        """
        finished = self.output.finished_blocks if self.output else 0
        count = len(self.skeleton.blocks)
        if finished == count:
            return
        self._forward = forward and self.ids_NT is not None
        first = 0 if self._forward else finished  # without samples there is nothing to replay
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            reading = reader.submit(self._read_block, first, finished)
            if self.output and self.ranks.is_main:
                self._writing = writer.submit(self.output.write_outer)
            if self._forward:
                self.capture()
            for index in range(first, count):
                with self.clock.measure("read_wait"):
                    stored = reading.result()
                if index < finished and self.cutter and self.propagate == "pruned":
                    stored = self.cutter.restore(index, stored)
                if index + 1 < count:
                    reading = reader.submit(self._read_block, index + 1, finished)
                if index < finished and self.match_dense:
                    self._advance_dense(index)
                self.skeleton.fill_block(index, stored)
                self.ends = Ends()
                block = Block(self, index)
                if index >= finished:
                    yield block
                block.advance()
                if index >= finished and self.output and self.ranks.is_main:
                    written = block.written(stored)
                    facts = block.facts(written)
                    self.finish_writing()
                    tensors = {self.skeleton.stored_name(name): tensor for name, tensor in written.items()}
                    self._writing = writer.submit(self.output.write_block, index, tensors, facts)
                    del written, tensors
                self.skeleton.empty_block(index)
                self.advance_progress(f"block {index}")
                del stored, block
                _return_free_memory()
            self.finish_writing()

    def _advance_dense(self, index: int) -> None:
        """Replay a finished block as it was before it was pruned."""
        self.skeleton.fill_block(index, self._read_block(index, finished=0))
        with self.clock.measure("advance"):
            for batch in range(len(self.batches)):
                self.forward_dense(index, batch)
        self.skeleton.empty_block(index)

    def finish_writing(self) -> None:
        """Wait until what is being written is on the disk and its memory free.

        Raises:
            LLMPruneError: it could not be written.
        """
        if self._writing:
            with self.clock.measure("write_wait"):
                self._writing.result()
            self._writing = None

    def _read_block(self, index: int, finished: int) -> dict[str, Tensor]:
        """A block's tensors by parameter name, in their stored dtype.

        A finished block is read back pruned, unless the next block is to see the dense one. Runs in a thread of its own, where
        no torch operation may run in parallel: a second pool of OpenMP threads makes those of the first one sleep between
        operations, which slows every forward by a fifth.
        """
        if index < finished and self.propagate == "pruned":
            assert self.output is not None
            written = self.output.read_block(index)
            names = {self.skeleton.stored_name(name): name for name in self.skeleton.block_parameters(index)}
            return {names[stored]: tensor for stored, tensor in written.items()}
        names = self.skeleton.stored_names
        return {name: self.skeleton.checkpoint.read(names[name]) for name in self.skeleton.block_parameters(index)}


class Block:
    """One resident decoder block, between the samples that came in and the shard that goes out."""

    def __init__(self, stream: Stream, index: int) -> None:
        self.stream = stream
        self.index = index
        self.linears = stream.skeleton.linears[index]
        # The samples already are this block's output.
        self._advanced = not stream._forward or (index == len(stream.skeleton.blocks) - 1 and not stream.keep_last)
        self._places = tuple(linear.place for linear in self.linears)
        self._needs_dense_output = stream.propagate == "dense" and not self._advanced
        # What a method has to say about the block in the record.
        self.notes: dict[str, object] = {}

    def observe(self, kind: type[S], roles: Container[str] | None = None) -> Iterator[tuple[Linear, S]]:
        """The block's linears in the order they run, each with its inputs' statistic over all samples.

        Linears that read the same tensor (q, k and v; gate and up) share one statistic object. With
        `sequential="sublayer"` a linear runs as the caller leaves it before the next one is observed.

        Args:
            kind: the statistic.
            roles: of the linears that are looked at, the same in all blocks of a stream; by default all.

        Raises:
            LLMPruneError: an activation is NaN or infinite.
        """
        one_pass = self.stream.sequential == "sublayer" and not self._needs_dense_output
        linears = [linear for linear in self.linears if roles is None or linear.role in roles]
        if one_pass:
            return self._yielded(self._observe_one_pass(kind, linears))
        return self._yielded(self._observe(linears, lambda linear, inputs: kind(inputs.shape[-1], inputs.device), shared=True))

    def observe_each(self, own: Callable[[Linear], S], roles: Container[str] | None = None) -> Iterator[tuple[Linear, S]]:
        """Like `observe`, but every linear has a statistic of its own, and the block runs as it is while it is observed.

        Args:
            own: makes a linear's statistic.
            roles: of the linears that are looked at, the same in all blocks of a stream; by default all.

        Raises:
            LLMPruneError: an activation is NaN or infinite.
        """
        linears = [linear for linear in self.linears if roles is None or linear.role in roles]
        return self._yielded(self._observe(linears, lambda linear, inputs: own(linear), shared=False))

    def _yielded(self, pairs: Iterator[tuple[Linear, S]]) -> Iterator[tuple[Linear, S]]:
        clock = self.stream.clock
        while True:
            with clock.measure("observe"):
                pair = next(pairs, None)
            if pair is None:
                return
            linear, statistic = pair
            self._check(linear, statistic)
            if linear.expert is not None:
                linear.facts["tokens"] = statistic.seen
            # Deciding takes copies of the largest matrix: not while the block before this one is still in memory.
            self.stream.finish_writing()
            with clock.measure("decide"):
                yield linear, statistic
                _return_free_memory()

    def _observe(
        self, linears: list[Linear], kind: Callable[[Linear, Tensor], S], *, shared: bool
    ) -> Iterator[tuple[Linear, S]]:
        """Statistics of all linears from one forward of the block as it is; `shared` by those that read the same tensor."""
        stream = self.stream
        statistics: dict[Linear, S] = {}
        latest: Tensor | None = None
        owner: Linear | None = None
        samples, first = 1, 0

        def see(linear: Linear, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal latest, owner
            inputs = args[0]
            if shared and inputs is latest and owner is not None:
                statistics.setdefault(linear, statistics[owner])
            else:
                latest, owner = inputs, linear
                if linear not in statistics:
                    statistics[linear] = kind(linear, inputs)
                statistics[linear].update(by_sample(args, samples), first)
            if linear.place == stream.last.get(self._places) and not self._needs_dense_output:
                raise _Stop

        handles = [linear.module.register_forward_pre_hook(partial(see, linear)) for linear in linears]
        try:
            for batch, part in enumerate(stream.batches):
                samples, first = part.stop - part.start, stream.first_sample + part.start
                try:
                    output = stream.forward(self.index, batch)
                except _Stop:
                    pass
                else:
                    if statistics:
                        stream.last[self._places] = list(statistics)[-1].place
                    if self._needs_dense_output:
                        stream.finish_forward(self.index, batch, output)
                latest = owner = None
        finally:
            for handle in handles:
                handle.remove()
        self._advanced |= self._needs_dense_output
        stream.clock.forwards += 1
        for statistic in {id(s): s for s in statistics.values()}.values():
            stream.ranks.add(statistic)
        yield from statistics.items()

    def _observe_one_pass(self, kind: type[S], linears: list[Linear]) -> Iterator[tuple[Linear, S]]:
        """Like `_observe`, but each linear is yielded as soon as all samples have reached it.

        Where the dense model is matched, its micro-batches wait for the pruned model's at the same input; before the linears
        that read it are pruned, they go ahead to the next.
        """
        stream = self.stream
        hub = getcurrent()
        order = {linear: position for position, linear in enumerate(linears)}
        statistics: dict[Linear, S] = {}
        leaders: dict[str, str] = {}

        def pause(linear: Linear, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            worker, inputs = getcurrent(), args[0]
            if inputs is not worker.inputs:
                assert linear.place not in stream.leaders, f"{linear.name} does not read what its like in block 0 read"
                worker.args, worker.inputs, worker.leader = args, inputs, linear
                if worker.ahead is not None or not stream.match_dense:
                    if linear not in statistics:
                        statistics[linear] = kind(inputs.shape[-1], inputs.device)
                    self._see(statistics[linear], worker)
                hub.switch(linear)
            elif worker.is_dense:
                return
            elif linear.place not in stream.leaders:  # the first such block: who reads whose input is not known yet
                leaders[linear.place] = worker.leader.place
                statistics[linear] = statistics[worker.leader]
                hub.switch(linear)
            if self._advanced and linear.place == stream.last.get(self._places):
                raise _Stop

        def write(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            worker = getcurrent()
            worker.written += output.reshape(worker.part.stop - worker.part.start, -1, output.shape[-1])

        def run(batch: int) -> None:
            with suppress(_Stop):
                if getcurrent().is_dense:
                    stream.forward_dense(self.index, batch)
                    return
                output = stream.forward(self.index, batch)
                if not self._advanced:
                    stream.finish_forward(self.index, batch, output)

        def begin(batch: int, ahead: greenlet | None, *, is_dense: bool) -> greenlet:
            worker = greenlet(run, hub)
            worker.part, worker.args, worker.inputs, worker.leader = stream.batches[batch], (), None, None
            worker.ahead, worker.is_dense, worker.written = ahead, is_dense, 0.0
            return worker

        handles = [linear.module.register_forward_pre_hook(partial(pause, linear)) for linear in linears]
        if stream.match_dense:
            writers = [linear.module for linear in self.linears if stream.skeleton.writes(linear)]
            writers += [module for module in stream.skeleton.blocks[self.index].modules() if isinstance(module, Experts)]
            handles += [module.register_forward_hook(write) for module in writers]
        try:
            batches = range(len(stream.batches))
            dense = [begin(batch, None, is_dense=True) for batch in batches if stream.match_dense]
            for batch, worker in enumerate(dense):
                worker.switch(batch)
            workers = [begin(batch, dense[batch] if dense else None, is_dense=False) for batch in batches]
            waiting: dict[int, Linear] = {}
            for batch, worker in enumerate(workers):
                if arrived := worker.switch(batch):
                    waiting[batch] = arrived
            while waiting:
                linear = min(waiting.values(), key=order.__getitem__)
                # Of many experts each would leave a Hessian behind.
                needed = {linear, *(workers[batch].leader for batch in waiting)}
                for other in [other for other in statistics if other not in needed]:
                    del statistics[other]
                if linear.place not in leaders:
                    for worker in dense:
                        worker.switch()
                    stream.ranks.add(statistics[linear])
                yield linear, statistics[linear]
                # Those that read the same tensor are decided, too, so that a sample runs through all of them at once.
                for other in linears:
                    if stream.leaders.get(other.place) == linear.place:
                        yield other, statistics[linear]
                for batch in [batch for batch, at in waiting.items() if at is linear]:
                    if arrived := workers[batch].switch():
                        waiting[batch] = arrived
                    else:
                        del waiting[batch]
            if order:
                stream.last[self._places] = linear.place
            stream.leaders |= leaders
        finally:
            for handle in handles:
                handle.remove()
        self._advanced = True
        stream.clock.forwards += 2 if stream.match_dense else 1

    def _see(self, statistic: Statistic, worker: greenlet) -> None:
        """Show a statistic what a micro-batch brings to a linear, and what the dense model's has there, where it is matched."""
        stream, part = self.stream, worker.part
        samples, first = part.stop - part.start, stream.first_sample + part.start
        own = by_sample(worker.args, samples)
        if worker.ahead is None:
            statistic.update(own, first)
            return
        assert isinstance(statistic, CrossHessian)
        assert worker.ahead.leader is worker.leader, "the dense and the pruned model run through a block in one order"
        if worker.leader.expert is not None:  # the two models send it different tokens: there is nothing to compare
            statistic.update_pair(own, own, first, None)
            return
        gap = None
        if stream.skeleton.writes(worker.leader):
            gap = stream.gap(part) + (worker.ahead.written - worker.written)
        statistic.update_pair(own, by_sample(worker.ahead.args, samples), first, gap)

    def _check(self, linear: Linear, statistic: Statistic) -> None:
        if not statistic.is_finite():
            raise LLMPruneError(
                f"The input of {linear.name!r} holds NaN or infinite activations in {self.stream.skeleton.dtype}: check "
                "the weights, or compute in a wider type with --dtype float32."
            )

    def advance(self) -> None:
        """Take the samples through the block as it is now, unless they already are beyond it."""
        if self._advanced:
            return
        with self.stream.clock.measure("advance"):
            for batch in range(len(self.stream.batches)):
                self.stream.finish_forward(self.index, batch, self.stream.forward(self.index, batch))
        self._advanced = True
        self.stream.clock.forwards += 1

    @property
    def sparsity(self) -> float | None:
        """The share of weights that this block loses, where it is not the recipe's."""
        return self.stream.sparsities[self.index] if self.stream.sparsities else None

    @property
    def influence(self) -> float | None:
        """1 - the mean cosine similarity of the block's input and output (ShortGPT, arXiv 2403.03853, equation 1).

        Over the samples of this rank; None for a block whose output nobody needed.
        """
        return self.stream.ends.influence

    def measure_importance(self) -> float:
        """The mean angle between the block's input and output, over pi, of all ranks' samples; once the block has advanced."""
        self.stream.ranks.add(self.stream.ends)
        return self.stream.ends.angle

    def written(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The block's tensors, by parameter name, as they go to the disk."""
        cutter = self.stream.cutter
        return cutter.store(self.index, stored) if cutter else stored

    def facts(self, written: Mapping[str, Tensor]) -> dict[str, object]:
        """What became of the block and its linears, for the record."""
        linears = {}
        for linear in self.linears:
            weight = written.get(f"{linear.name}.weight")
            if weight is not None:  # of a sub-layer that was removed nothing is left
                linears[linear.name] = {
                    "role": linear.role,
                    "shape": list(weight.shape[::-1] if linear.transposed else weight.shape),
                    "tensor": self.stream.skeleton.stored_name(f"{linear.name}.weight"),
                    "transposed": linear.transposed,
                    **({} if linear.expert is None else {"expert": linear.expert}),
                    "zeros": weight.numel() - int(torch.count_nonzero(weight)),
                    **linear.facts,
                }
        allotted = {} if self.sparsity is None else {"sparsity": self.sparsity}
        return {"influence": self.influence, **allotted, **self.notes, "linears": linears}
