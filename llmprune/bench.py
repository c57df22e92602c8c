"""`llmprune bench`: how fast models write text on this machine, beside what the bytes they read allow.

    bench(request(model="llama-wina", against=["llama-teal"]), say=print, quiet=False)

One sequence, greedily, a token at a time: then every weight is read for every token, and reading is what takes the time. So
the bounds here are bytes and not operations,

    bytes per token = weights read + thresholds and bases of gates + keys and values of the context,
    floor           = bytes per token / bandwidth,                                                                         (1)

with the bandwidth measured in the same run. All models take turns, in an order that moves on with every round, so that noise
hits them alike; what is compared is compared within a round. Results are medians with quartiles over rounds, one
`BenchResult` for each model, in a format of flat fields that rows of several machines can be pooled in.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from . import __version__
from .activation_plan import Plan
from .bench_result import BenchResult, Role, earlier, spread, write
from .checkpoint import Checkpoint
from .errors import LLMPruneError
from .gguf import embedded_smollm2
from .loading import check_model, load
from .models import ALIASES, EMBEDDED, LENGTH_KEYS, load_tokenizer, resolve
from .progress import bar
from .pruning import Say
from .recipe import Dtype, from_options, validated
from .record import Record, find
from .runtime.dispatch import check_backend, synchronize
from .runtime.gating import apply
from .settings import choose_device
from .traffic import Probe, Traffic, cache_bytes, device_name, gated_weights_read, last_level_cache, weights_read

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

PROMPT, NEW, REPEATS = 128, 32, 5
NONE = "none"
# The prompt, over and over until it is long enough: which inputs a gate leaves out depends on the text.
TEXT = (
    "The ferry left the harbour an hour late, because the wind had turned in the night and the captain wanted to see the "
    "far shore before he trusted the weather. On deck a woman with a red scarf was reading a letter for the third time. It "
    "came from her brother, who had bought a small vineyard in the hills and asked her to spend the summer there; he wrote "
    "about the well that had run dry, about the two dogs, and about the price of glass, which had doubled since the spring. "
    "She folded the paper, looked at the gulls and counted the days. By noon the clouds were gone. "
)
# Processor time over time below which the machine was not ours; several threads make it more than 1.
ALONE = 0.9


class Request(BaseModel):
    """What to measure. None means: the default, which the results state.

    Attributes:
        against: more models, beside the first.
        baseline: what speed-ups are over; "none" for none.
        prompt, tokens: how many stand there before, and how many are then written, in every round.
        prefill: measure also how fast the prompt is read.
        backend: what computes gated linears.
        output: file that the results are added to, .csv or .json.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    against: tuple[str, ...] = ()
    baseline: str | None = None
    prompt: int | None = Field(None, ge=1)
    tokens: int = Field(NEW, ge=1)
    repeats: int = Field(REPEATS, ge=1)
    prefill: bool = True
    device: str | None = None
    dtype: Dtype | None = None
    backend: str | None = None
    trust_remote_code: bool = False
    output: Path | None = None


def request(**options: object) -> Request:
    """Options that may be text, as from a command line.

    Raises:
        LLMPruneError: a value that is not allowed.
    """
    return validated(Request, options)


# Who takes part.


@dataclass(frozen=True, eq=False)
class _Entry:
    """A model before it is loaded. `plan` is what it is to leave out while it runs."""

    role: Role
    name: str
    given: str
    checkpoint: Checkpoint
    plan: Plan | None
    facts: Record | None

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def longest(self) -> int | None:
        """The longest sequence that the model takes, where its configuration says so."""
        config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        return next((int(config[key]) for key in LENGTH_KEYS if config.get(key)), None)


def _entries(request: Request, say: Say) -> list[_Entry]:
    """The baseline, the model and the others, all that needs no weights checked."""
    asked = _open(request.model, "model", request, say)
    baseline = _baseline(asked, request, say)
    others = [_open(model, "against", request, say) for model in request.against]
    return _named([*([baseline] if baseline else []), asked, *others])


def _open(model: str, role: Role, request: Request, say: Say) -> _Entry:
    source = resolve(model, say=say)
    checkpoint = check_model(source.directory, trust_remote_code=request.trust_remote_code)
    return _Entry(role, source.name, model, checkpoint, Plan.load(source.directory), find(source.directory))


def _named(entries: list[_Entry]) -> list[_Entry]:
    """With names that tell them apart."""
    names = [entry.name for entry in entries]
    return [replace(entry, name=f"{entry.given} ({entry.role})") if names.count(entry.name) > 1 else entry for entry in entries]


def _baseline(asked: _Entry, request: Request, say: Say) -> _Entry | None:
    """The model named; else the same weights without gates; else the dense model of the record, if this machine has it."""
    if request.baseline == NONE:
        return None
    if request.baseline:
        return _open(request.baseline, "baseline", request, say)
    if asked.plan:
        return replace(asked, role="baseline", name=f"{asked.name} without gates", plan=None)
    if asked.facts is None:
        return None
    given = asked.facts.model.given
    found = _local(given, asked.facts.model.base_model)
    if found is None:
        say(f"{asked.name} was made from {given}, which is not on this machine: without --baseline there is no speed-up.")
        return None
    entry = _open(str(found), "baseline", request, lambda line: None)
    if not entry.checkpoint.fingerprint().startswith(asked.facts.identity["model weights"]):
        say(f"{given} is not the model that {asked.name} was made from: without --baseline there is no speed-up.")
        return None
    say(f"{asked.name} was made from {given}: it is the baseline.")
    return entry


def _local(given: str, base_model: str | None) -> Path | None:
    """A model directory, found without the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(given).expanduser().exists() or (given in EMBEDDED and embedded_smollm2()):
        return resolve(given).directory
    try:
        config = try_to_load_from_cache(ALIASES.get(given, base_model or given), "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) and any(Path(config).parent.glob("*.safetensors")) else None


def _prompt_length(request: Request, entries: Sequence[_Entry]) -> int:
    """The prompt's tokens, so that with those to come they are no more than any model takes."""
    longest, name = min((entry.longest or sys.maxsize, entry.name) for entry in entries)
    prompt = request.prompt or max(1, min(PROMPT, longest - request.tokens))
    if prompt + request.tokens > longest:
        raise LLMPruneError(
            f"A prompt of {prompt} tokens and {request.tokens} new ones are more than the {longest} that {name} takes: give a "
            "smaller --prompt or fewer --tokens."
        )
    return prompt


def _check_memory(request: Request, entries: Sequence[_Entry], device: torch.device) -> None:
    """Raise `LLMPruneError` if the models cannot be in memory together, as they must be to take turns."""
    itemsize = getattr(torch, request.dtype).itemsize if request.dtype else None
    needed = sum(
        tensor.numel * (itemsize or tensor.dtype.itemsize) for entry in entries for tensor in entry.checkpoint.entries.values()
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise LLMPruneError(
            f"{len(entries)} models take {needed / 1e9:.1f} GB together, and {free / 1e9:.1f} GB are free: leave out "
            "--against, give --baseline none, or --dtype bfloat16."
        )


# Measuring.


@dataclass(eq=False)
class _Contender:
    """A loaded model, what it reads, and its times: prompts and tokens in seconds, one a round."""

    entry: _Entry
    model: PreTrainedModel
    ids_1T: Tensor
    first_11: Tensor
    prefilled: Cache | None
    traffic: Traffic
    dense: float
    active: float | None
    backend: str | None
    notes: list[str]
    prefill_R: list[float] = field(default_factory=list)
    decode_R: list[float] = field(default_factory=list)

    def measure(self, tokens: int) -> None:
        """One round."""
        if self.prefilled:
            cache = copy.deepcopy(self.prefilled)
        else:
            start = self._now()
            cache, _ = _prefill(self.model, self.ids_1T)
            self.prefill_R.append(self._now() - start)
        next_11 = self.first_11
        start = self._now()
        for _ in range(tokens):
            next_11 = _step(self.model, next_11, cache)
        self.decode_R.append((self._now() - start) / tokens)

    def _now(self) -> float:
        synchronize(self.ids_1T.device)
        return time.perf_counter()


def _prepare(entry: _Entry, request: Request, prompt: int, device: torch.device, dtype: str | None) -> _Contender:
    """Load a model and let it write once, which warms it up and shows what it reads."""
    notes: list[str] = []
    model = load(entry.directory, device=str(device), dtype=dtype, trust_remote_code=request.trust_remote_code, gated=False)
    gates = apply(model, entry.plan, backend=request.backend or "auto") if entry.plan else None
    ids_1T = _prompt(entry.directory, model, prompt, trust_remote_code=request.trust_remote_code)
    if ids_1T is None:
        notes.append("there is no tokenizer that fits, so the prompt is of random tokens")
        ids_1T = _random_prompt(model, prompt)
    ids_1T = ids_1T.to(device)
    cache, first_11 = _prefill(model, ids_1T)
    prefilled = None if request.prefill else copy.deepcopy(cache)
    next_11, context = first_11, 0
    with gates.counting() if gates else nullcontext() as activity:
        for _ in range(request.tokens):
            next_11 = _step(model, next_11, cache)
            context += cache_bytes(cache, model)
    dense = weights_read(model)
    traffic, active, backend = dense, None, None
    if gates and activity:
        running = {linear.name: linear.backend for linear in gates.report()}
        traffic, active, backend = gated_weights_read(model, gates, activity.active), activity.share, _summary(running.values())
    if any(parameter.ndim > 2 for parameter in model.parameters()):
        notes.append("some weights have more than two dimensions, of which a token may read a part: all are counted")
    traffic = replace(traffic, cache=context / request.tokens)
    return _Contender(entry, model, ids_1T, first_11, prefilled, traffic, dense.total, active, backend, notes)


def _summary(backends: Iterable[str]) -> str:
    """What computes the gated linears: `cpp`, or `cpp 180, dense 30`."""
    counts = Counter(backends)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _prompt(directory: Path, model: PreTrainedModel, length: int, *, trust_remote_code: bool = False) -> Tensor | None:
    """Tokens [1, length] of the text, None where no tokenizer of the model's makes them."""
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        return None
    ids = tokenizer(TEXT * (1 + length // len(TEXT.split()))).input_ids[:length]
    return torch.tensor([ids]) if len(ids) == length and max(ids) < _vocabulary(model) else None


def _random_prompt(model: PreTrainedModel, length: int) -> Tensor:
    return torch.randint(_vocabulary(model), (1, length), generator=torch.Generator().manual_seed(0))


def _vocabulary(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.num_embeddings


def _prefill(model: PreTrainedModel, ids_1T: Tensor) -> tuple[Cache, Tensor]:
    """The cache after a prompt, and the likeliest next token [1, 1]."""
    # All of the prompt's logits would cost more than they are worth, of a large vocabulary.
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    outputs = model(input_ids=ids_1T, use_cache=True, **last)
    return outputs.past_key_values, outputs.logits[:, -1:].argmax(dim=-1)


def _step(model: PreTrainedModel, ids_11: Tensor, cache: Cache) -> Tensor:
    """The likeliest token after another [1, 1], whose keys and values go into the cache."""
    return model(input_ids=ids_11, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)


@torch.no_grad()
def bench(request: Request, *, say: Say, quiet: bool) -> list[BenchResult]:
    """Measure a model, its baseline and what else was named, in one run. Nothing but `request.output` is written.

    Args:
        say: gets a line at a time for people.
        quiet: hide progress bars.

    Raises:
        LLMPruneError: bad input, or models that do not fit in memory together.
    """
    if request.output:
        earlier(request.output)
    if request.backend:
        check_backend(request.backend)
    where, _ = choose_device(from_options({"model": request.model, "device": request.device}))
    device = torch.device(where)
    entries = _entries(request, say)
    if request.backend and not any(entry.plan for entry in entries):
        say("warning: --backend had no effect: none of these models has gates.")
    prompt = _prompt_length(request, entries)
    _check_memory(request, entries, device)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    found: dict[_Entry, _Contender] = {}
    dtype: str | None = request.dtype
    with bar("bench", len(entries) * (request.repeats + 1), quiet=quiet, still=True) as advance:
        # The model that was asked about settles the dtype of all.
        for entry in sorted(entries, key=lambda entry: entry.role != "model"):
            found[entry] = _prepare(entry, request, prompt, device, dtype)
            dtype = dtype or str(found[entry].model.dtype).removeprefix("torch.")
            advance(f"{entry.name}, warm-up")
        contenders = [found[entry] for entry in entries]
        probe = Probe(device)
        _rounds(contenders, probe, request, advance)
    results = [_result(contender, contenders[0], probe, request, started) for contender in contenders]
    for note in dict.fromkeys(note for result in results for note in result.notes):
        say(f"warning: {', '.join(result.name for result in results if note in result.notes)}: {note}.")
    if request.output:
        write(results, request.output)
    return results


def _rounds(contenders: Sequence[_Contender], probe: Probe, request: Request, advance: Callable[[str], None]) -> None:
    """All take turns, and in every round another one begins."""
    wall, processor = time.perf_counter(), time.process_time()
    for turn in range(request.repeats):
        probe.measure()
        for place in range(len(contenders)):
            contender = contenders[(turn + place) % len(contenders)]
            contender.measure(request.tokens)
            advance(f"{contender.entry.name}, round {turn + 1}")
    share = (time.process_time() - processor) / (time.perf_counter() - wall)
    if contenders[0].ids_1T.device.type == "cpu" and share < ALONE:
        for contender in contenders:
            contender.notes.append(f"other processes had the processor for {1 - share:.0%} of the time or more")


def _result(contender: _Contender, first: _Contender, probe: Probe, request: Request, started: str) -> BenchResult:
    """What was measured of a model; `first` is the baseline, if there is one."""
    entry, traffic, prompt = contender.entry, contender.traffic, contender.ids_1T.shape[1]
    decode = spread([1 / seconds for seconds in contender.decode_R])
    prefill = spread([prompt / seconds for seconds in contender.prefill_R]) if contender.prefill_R else None
    bandwidth = spread(probe.rates)
    floor = bandwidth.middle / traffic.total
    compared = first.entry.role == "baseline"
    speedup = spread(_ratios(first.decode_R, contender.decode_R)) if compared else None
    ahead = spread(_ratios(first.prefill_R, contender.prefill_R)) if compared and prefill else None
    device = contender.ids_1T.device
    cache_size = last_level_cache(device)
    in_cache = None if cache_size is None else contender.dense <= cache_size
    notes = list(contender.notes)
    if cache_size and in_cache:
        notes.append(
            f"the weights fit in the last-level cache ({cache_size / 2**20:.0f} MiB), so this is the speed of a cache and says "
            "nothing about larger models"
        )
    elif decode.middle > floor:
        notes.append("it was read faster than the bandwidth that was measured: other work disturbed the measurement")
    facts = entry.facts
    return BenchResult(
        time=started,
        role=entry.role,
        name=entry.name,
        model=entry.given,
        method=facts.method if facts else None,
        pattern=facts.what if facts else None,
        sparsity=None if facts is None else facts.gating.sparsity if facts.gating else facts.sparsity,
        device=str(device),
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        dtype=str(contender.model.dtype).removeprefix("torch."),
        torch=torch.__version__,
        transformers=version("transformers"),
        llmprune=__version__,
        backend=contender.backend,
        batch=1,
        prompt_tokens=prompt,
        new_tokens=request.tokens,
        repeats=request.repeats,
        context=prompt + (request.tokens + 1) / 2,
        prefill_tokens_per_second=prefill.middle if prefill else None,
        prefill_tokens_per_second_low=prefill.low if prefill else None,
        prefill_tokens_per_second_high=prefill.high if prefill else None,
        decode_tokens_per_second=decode.middle,
        decode_tokens_per_second_low=decode.low,
        decode_tokens_per_second_high=decode.high,
        active=contender.active,
        bytes_per_token=traffic.total,
        bytes_linears=traffic.linears,
        bytes_head=traffic.head,
        bytes_other=traffic.other,
        bytes_gates=traffic.gates,
        bytes_cache=traffic.cache,
        gb_per_second=traffic.total * decode.middle / 1e9,
        bandwidth_gb_per_second=bandwidth.middle / 1e9,
        bandwidth_gb_per_second_low=bandwidth.low / 1e9,
        bandwidth_gb_per_second_high=bandwidth.high / 1e9,
        bandwidth_probe=probe.description,
        floor_tokens_per_second=floor,
        share_of_floor=decode.middle / floor,
        speedup=speedup.middle if speedup else None,
        speedup_low=speedup.low if speedup else None,
        speedup_high=speedup.high if speedup else None,
        predicted_speedup=first.traffic.total / traffic.total if compared else None,
        prefill_speedup=ahead.middle if ahead else None,
        last_level_cache_bytes=cache_size,
        in_cache=in_cache,
        prefill_seconds=contender.prefill_R,
        decode_seconds=contender.decode_R,
        notes=notes,
    )


def _ratios(baseline_R: Sequence[float], ours_R: Sequence[float]) -> list[float]:
    """How many times as fast, round by round."""
    return [theirs / ours for theirs, ours in zip(baseline_R, ours_R, strict=True)]
