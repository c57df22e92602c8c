"""Recovery: low-rank adapters trained after pruning, with ranks by block importance, merged with every mask kept.

    llmprune recover llama-cfsp-0.3 --minutes 10
    llmprune.recovery.recover("llama-cfsp-0.3", steps=100)

IG-LoRA of CFSP (arXiv 2409.13199, section 3.3): the blocks that turn the hidden states more get adapters of higher rank. The
paper names the idea and no formula, and no code was released. Ours: rank_l ~ sigmoid(13.1 (B_l - mean B)), B_l the mean angle
between a block's input and output over pi, as CFSP's own budget has it; whole ranks by largest remainders between a least and
a most, whose sum is that of the same rank everywhere. alpha = 2 r in every block.

Samples that are held out of the training judge it a few times on the way (`training`), and what is merged (`adapters`) is the
best of these, which is nothing at all if their loss never fell. The whole model is in memory, at the compute dtype, with the
activations of one micro-batch; adapters, gradients and the optimiser's state are float32.

The result is again a complete directory of `llmprune`, whose record says under `recovery` what was done.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from . import calibration, card, corpus
from .calibration import TokenSet
from .checkpoint import Checkpoint, hash_file
from .errors import LLMPruneError
from .models import Skeleton, load_tokenizer, resolve
from .options import Role
from .output import RECIPE, Output, check_directory, check_space, settled_recipe
from .packing import config_as_stored
from .pruning import Result, peak_rss, versions
from .recipe import from_options, validated
from .sampling import sample_from_model
from .settings import CPU_SEQLEN, PAPER_SEQLEN, choose_device, choose_dtype
from .training import HOLDOUT, LOOKS, MICRO_TOKENS, Trainer
from .verify import pruned_record, read_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]

# Steps where neither they nor minutes are given.
STEPS = 100
# On a CPU and on a GPU: samples to draw, and tokens of a step.
SAMPLES, STEP_TOKENS = (256, 1024), (1024, 32_768)
# What the record keeps of a linear; how well its pruned weights matched the dense ones is over once they are trained.
LINEAR_FACTS = ("role", "shape", "tensor", "transposed", "zeros", "outlier_ratio", "expert", "tokens", "fallback")
# What of the pruned model's record is not so for the recovered one.
OUTDATED = (
    *("identity", "recipe_sha256", "index_sha256", "copied", "shards", "storage", "perplexity", "evaluation"),
    "peak_gpu_bytes",
)


class Options(BaseModel):
    """What a recovery does. What is None is chosen for the model and the machine, and the record says what was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Path | None = None
    overwrite: bool = False
    rank: int = Field(8, ge=1)
    least_rank: int | None = Field(None, ge=1)
    most_rank: int | None = Field(None, ge=1)
    direction: Literal["importance", "inverse", "pruned", "uniform"] = "importance"
    targets: tuple[Role, ...] = ()
    learning_rate: float = Field(1e-3, gt=0)
    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)
    calibration: str | None = None
    samples: int | None = Field(None, ge=HOLDOUT)
    seqlen: int | None = Field(None, ge=2)
    batch_size: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**32)
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    trust_remote_code: bool = False

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.least <= self.rank <= self.most:
            raise LLMPruneError(
                f"--rank {self.rank} is the mean of ranks between --least-rank {self.least} and --most-rank {self.most}: give "
                "bounds on both sides of it."
            )
        return self

    @property
    def least(self) -> int:
        """The lowest rank of a block."""
        return self.least_rank if self.least_rank is not None else min(2, self.rank)

    @property
    def most(self) -> int:
        """The highest rank of a block."""
        return self.most_rank if self.most_rank is not None else 4 * self.rank


# Options that decide what the weights become.
DECISIVE = (
    *("rank", "least_rank", "most_rank", "direction", "targets", "learning_rate", "steps", "samples", "seqlen"),
    *("batch_size", "seed", "dtype"),
)
# Open values that an unfinished run has settled already.
CONTINUED = ("calibration", "samples", "seqlen", "batch_size", "seed", "dtype")


def recover(directory: str | Path, *, progress: bool = False, **options: object) -> Result:
    """Train what `prune` wrote, and write the better model to another directory.

    Args:
        directory: the pruned model.
        progress: show bars and say what happens.
        options: the fields of `Options`, by name, also as text.

    Raises:
        LLMPruneError: bad input; nothing half-written looks whole.
    """
    return run(Path(directory), request(**options), say=print if progress else lambda line: None, quiet=not progress)


def request(**options: object) -> Options:
    """Options that may be text, as from a command line. Raises `LLMPruneError` for a value that is not allowed."""
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := [key for key in given if key not in Options.model_fields]:
        raise LLMPruneError(f"Unknown option {unknown[0]!r}: known are {', '.join(Options.model_fields)}.")
    if "steps" in given and "minutes" in given:
        raise LLMPruneError("Both --steps and --minutes say how long to train: give one of them.")
    return validated(Options, given)


def run(directory: Path, options: Options, *, say: Say, quiet: bool) -> Result:
    """Carry out a recovery, or finish one. `say` gets a line at a time for people; `quiet` hides progress bars."""
    started = time.time()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LLMPruneError(f"Recovery trains in one process and was started in {os.environ['WORLD_SIZE']}: start one.")
    parent = pruned_record(directory)
    place = options.output or default_output(directory)
    check_directory(place, directory, overwrite=options.overwrite)
    earlier = {} if options.overwrite else _earlier(place)
    options = options.model_copy(
        update={key: earlier[key] for key in CONTINUED if getattr(options, key) is None and key in earlier}
    )
    device, _ = choose_device(from_options({"model": str(directory), "device": options.device}))
    skeleton = Skeleton(directory, device=device, trust_remote_code=options.trust_remote_code)
    options, reasons = _settle(options, parent, skeleton, device)
    for key, reason in reasons.items():
        say(f"  {key} = {getattr(options, key)}: {reason}")
    if not place.exists():
        check_space(place, skeleton.checkpoint.nbytes)
    _check_memory(skeleton, options)
    options, tokens = _tokens(options, parent, skeleton, quiet)
    say(f"training text: {tokens.source}: {tokens.note}")
    trainer = Trainer(skeleton, tokens.ids_NT, options, parent, say)
    if options.steps is None:
        options, reason = _settle_steps(options, earlier, trainer)
        say(f"  steps = {options.steps}: {reason}")
        reasons["steps"] = reason
    assert options.steps
    identity = _identity(options, parent, skeleton, tokens)
    output = _open_output(place, options, skeleton, identity)
    try:
        if output.complete:
            say(f"{place} already holds this recovery's finished result: nothing to do.")
        else:
            output.check_space()
            trainer.run(options.steps, output, quiet=quiet)
            _write_weights(trainer, output, parent)
            record = _record(trainer, output, directory, parent, options, reasons, tokens)
            record |= {"seconds": round(time.time() - started, 1), "peak_rss_bytes": peak_rss()}
            if skeleton.device.type == "cuda":
                record["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(skeleton.device)
            # Whatever made the pruned directory a model goes along, also files of a method's own.
            others = {name: (directory / name).read_bytes() for name in parent["copied"]}
            others["config.json"] = config_as_stored(others["config.json"], None)
            output.finish((directory / RECIPE).read_text(encoding="utf-8"), record, others)
        card.write(place)
        return Result(place, output.read_record())
    finally:
        output.release()


def default_output(directory: Path) -> Path:
    """`DIR-recovered`, beside it."""
    return directory.parent / f"{directory.resolve().name}-recovered"


# Before the first step ------------------------------------------------------------------------------------------


def _earlier(directory: Path) -> dict[str, object]:
    """The settled options of the recovery that a directory holds, finished or not; empty where it holds none."""
    found = settled_recipe(directory).get("recovery")
    if found is None and (directory / "llmprune.json").is_file():
        found = read_record(directory).get("recovery", {}).get("options")
    return dict(cast("dict[str, object]", found or {}))


def _settle(options: Options, parent: dict[str, object], skeleton: Skeleton, device: str) -> tuple[Options, dict[str, str]]:
    """Fill in all but samples and steps. Returns also the reason for each value that was open.

    Raises:
        LLMPruneError: targets that the model does not have; a sequence length beyond its limit.
    """
    reasons: dict[str, str] = {}
    values: dict[str, object] = {}
    recipe = cast("dict[str, object]", parent["recipe"])

    def choose(key: str, value: object, reason: str) -> None:
        if getattr(options, key) is None:
            values[key], reasons[key] = value, reason

    roles = list(dict.fromkeys(linear.role for linear in skeleton.all_linears()))
    if unknown := [role for role in options.targets if role not in roles]:
        raise LLMPruneError(
            f"--targets names {unknown[0]!r}, and this model's linears are {', '.join(roles)}: give some of these."
        )
    stored = next(iter(skeleton.block_entries(0).values())).dtype
    dtype, why = choose_dtype(from_options({"model": "-", "dtype": options.dtype}), skeleton.device.type, stored)
    choose("dtype", dtype, why)
    skeleton.dtype = getattr(torch, dtype)
    on_gpu, limit = skeleton.device.type == "cuda", skeleton.max_tokens
    longest = min(limit or PAPER_SEQLEN, PAPER_SEQLEN if on_gpu else CPU_SEQLEN)
    own = cast("int | None", recipe.get("seqlen"))
    choose("seqlen", own or longest, "as the model was pruned" if own else "what a GPU takes" if on_gpu else "quick on a CPU")
    seqlen = options.seqlen or own or longest
    if limit and seqlen > limit:
        raise LLMPruneError(f"--seqlen {seqlen} is beyond the {limit} tokens this model takes: use at most {limit}.")
    choose("batch_size", max(STEP_TOKENS[on_gpu] // seqlen, 1), f"about {STEP_TOKENS[on_gpu]} tokens a step")
    choose("seed", recipe.get("seed", 0), "the pruning's")
    if recipe.get("calibration"):
        choose("calibration", recipe["calibration"], "what the model was pruned on")
    elif corpus.hub_reachable():
        choose("calibration", "c4", "the papers' text")
    else:
        choose("calibration", "self", "the Hub cannot be reached, so the dense model writes text")
    return options.model_copy(update={**values, "device": device}), reasons


def _check_memory(skeleton: Skeleton, options: Options) -> None:
    """Raise `LLMPruneError` if the model and what training adds to it do not fit in memory."""
    assert options.seqlen
    width = skeleton.dtype.itemsize
    tokens = max(MICRO_TOKENS[skeleton.device.type == "cuda"], options.seqlen)
    shapes = [linear.shape for linear in skeleton.all_linears()]
    # Values, gradients, both moments and the best so far; each linear's input and output and as much again between them;
    # logits, their softmax and its gradient.
    adapters = 5 * 4 * options.rank * sum(map(sum, shapes))
    passed = sum(sum(linear.shape) * skeleton.share_of_tokens(linear) for linear in skeleton.all_linears())
    activations = int(2 * tokens * passed * width) + 4 * tokens * skeleton.vocab_size * 4
    needed = skeleton.parameters() * width + adapters + activations
    if needed > skeleton.free_memory():
        raise LLMPruneError(
            f"Recovery has the whole model in memory, which takes {needed / 1e9:.1f} GB with activations where "
            f"{skeleton.free_memory() / 1e9:.1f} GB are free: lower --seqlen, or give --dtype bfloat16."
        )


def _tokens(options: Options, parent: dict[str, object], skeleton: Skeleton, quiet: bool) -> tuple[Options, TokenSet]:
    """The training samples. Where their number is open: many, or as many as the model was pruned on if the text has no more."""
    recipe = cast("dict[str, object]", parent["recipe"])
    tokenizer = load_tokenizer(skeleton.checkpoint.directory, trust_remote_code=options.trust_remote_code)
    many, own = SAMPLES[skeleton.device.type == "cuda"], cast("int | None", recipe.get("samples"))
    if options.samples is not None:
        counts = [options.samples]
    elif options.calibration == "self":  # text that takes long to write, and may have been written already
        counts = [own or many // 4]
    else:
        counts = [many, own] if own and own < many else [own or many]
    for count in counts:
        try:
            tokens = _draw_tokens(options, count, parent, skeleton, tokenizer, quiet)
            break
        except LLMPruneError:
            if count == counts[-1]:
                raise
    if count < HOLDOUT:
        raise LLMPruneError(
            f"Recovery holds out every {HOLDOUT}th sample and would get the {count} that the model was pruned on: give "
            f"--samples {HOLDOUT} or more."
        )
    return options.model_copy(update={"samples": count}), tokens


def _draw_tokens(
    options: Options,
    samples: int,
    parent: dict[str, object],
    skeleton: Skeleton,
    tokenizer: PreTrainedTokenizerBase | None,
    quiet: bool,
) -> TokenSet:
    assert options.calibration
    assert options.seqlen
    assert options.seed is not None
    recipe, given = (cast("dict[str, str]", parent[key]) for key in ("recipe", "model"))

    def write_own(samples: int, seqlen: int, seed: int) -> Tensor:
        dense = resolve(given["given"], revision=recipe.get("revision")).directory
        return sample_from_model(
            dense,
            samples,
            seqlen,
            seed,
            model_key=Checkpoint.open(dense).fingerprint(),
            device=str(skeleton.device),
            dtype=skeleton.dtype,
            trust_remote_code=options.trust_remote_code,
            quiet=quiet,
        )

    return calibration.calibration_set(
        options.calibration,
        tokenizer,
        samples=samples,
        seqlen=options.seqlen,
        seed=options.seed,
        vocab_size=skeleton.vocab_size,
        sampler=write_own,
    )


def _settle_steps(options: Options, earlier: dict[str, object], trainer: Trainer) -> tuple[Options, str]:
    """How long to train where no number of steps is given, and why. What a run has begun with, it goes on with."""
    if earlier.get("steps") is not None and (options.minutes is None or earlier.get("minutes") == options.minutes):
        steps, reason = int(str(earlier["steps"])), "as in the run that the output directory holds"
    elif options.minutes is None:
        steps, reason = STEPS, "enough for most of the gain in a few minutes; more if given"
    else:
        seconds, looking = trainer.measure_step()
        left = 60 * options.minutes - (LOOKS + 1) * looking
        steps = max(int(left / seconds), 1)
        reason = f"{options.minutes:g} minutes at {seconds:.2f} s a step; only --steps {steps} gives the same bytes again"
    return options.model_copy(update={"steps": steps}), reason


def _identity(options: Options, parent: dict[str, object], skeleton: Skeleton, tokens: TokenSet) -> dict[str, str]:
    """What must be equal for two runs to give the same bytes; the dense model's hash is the parent's."""
    identity = {"model weights": cast("dict[str, str]", parent["identity"])["model weights"]}
    identity["pruned weights"] = skeleton.checkpoint.fingerprint()[:16]
    identity["model config"] = hash_file(skeleton.checkpoint.directory / "config.json")[:16]
    settled = options.model_dump(mode="json")
    identity |= {key.replace("_", "-"): str(settled[key]) for key in DECISIVE}
    identity |= {"device": skeleton.device.type, "training tokens": tokens.sha256[:16]}
    return identity | {f"{name} version": version for name, version in versions().items() if name != "python"}


def _open_output(place: Path, options: Options, skeleton: Skeleton, identity: dict[str, str]) -> Output:
    return Output(
        place,
        skeleton.checkpoint,
        [[skeleton.stored_names[name] for name in skeleton.block_parameters(i)] for i in range(len(skeleton.blocks))],
        skeleton.outer_tensors(),
        identity,
        settled={"recovery": _settled(options)},
        overwrite=options.overwrite,
    )


def _settled(options: Options) -> dict[str, object]:
    return options.model_dump(mode="json", exclude={"output", "overwrite"})


# After the last step --------------------------------------------------------------------------------------------


def _write_weights(trainer: Trainer, output: Output, parent: dict[str, object]) -> None:
    """Merge the adapters block by block."""
    skeleton = trainer.skeleton
    assert trainer.adapters
    adapters = {adapter.linear.name: adapter for adapter in trainer.adapters.all}
    facts = cast("dict[str, dict[str, object]]", parent["linears"])
    output.write_outer()
    for index in range(output.finished_blocks, len(skeleton.blocks)):
        names = [skeleton.stored_names[name] for name in skeleton.block_parameters(index)]
        tensors = {name: skeleton.checkpoint.read(name) for name in names}
        linears: dict[str, object] = {}
        for linear in skeleton.linears[index]:
            name = skeleton.stored_names[f"{linear.name}.weight"]
            if linear.name in adapters:
                tensors[name] = adapters[linear.name].merged(tensors[name])
            if linear.name in facts:
                zeros = tensors[name].numel() - int(torch.count_nonzero(tensors[name]))
                kept = {key: value for key, value in facts[linear.name].items() if key in LINEAR_FACTS}
                linears[linear.name] = {**kept, "zeros": zeros}
        output.write_block(index, tensors, {"linears": linears})


def _record(
    trainer: Trainer,
    output: Output,
    directory: Path,
    parent: dict[str, object],
    options: Options,
    reasons: dict[str, str],
    tokens: TokenSet,
) -> dict[str, object]:
    """What llmprune.json says: the pruning's record where it still holds, and what the recovery did."""
    facts = [cast("dict[str, dict[str, int]]", block["linears"]) for block in output.block_facts()]
    linears = {name: fact for block in facts for name, fact in block.items()}
    parameters, sparsity = dict(cast("dict[str, int]", parent["parameters"])), parent["sparsity"]
    if "kept" not in parent:  # where channels or heads are gone, these count what is gone and not zeros
        parameters["zero"] = sum(fact["zeros"] for fact in linears.values())
        sparsity = parameters["zero"] / parameters["prunable"]
    blocks = cast("list[dict[str, object]]", parent.get("blocks") or [{} for _ in facts])
    assert trainer.adapters
    recovery = {
        "from": str(directory),
        "options": _settled(options),
        "reasons": reasons,
        "text": {"source": tokens.source, "sha256": tokens.sha256, "note": tokens.note},
        "trained_parameters": trainer.adapters.values_P.numel(),
        "ranks": trainer.rank_B,
        "importance": trainer.importance_B,
        "history": trainer.history,
        "best_step": int(trainer.best["step"]),
        "held_out": {"before": trainer.history[0]["held_out"], "after": trainer.best["held_out"]},
        "train_tokens": trainer.done * trainer.batch_size * int(options.seqlen or 0),
        "seconds": {key: round(value, 2) for key, value in trainer.seconds.items()},
        **({"before": parent["perplexity"]} if parent.get("perplexity") else {}),
        **({"earlier": parent["recovery"]} if parent.get("recovery") else {}),
    }
    return {
        **{key: value for key, value in parent.items() if key not in OUTDATED},
        "versions": versions(),
        "sparsity": sparsity,
        "parameters": parameters,
        "blocks": [{**block, "rank": rank} for block, rank in zip(blocks, trainer.rank_B, strict=True)],
        "linears": linears,
        "clock_seconds": {},
        "recovery": recovery,
    }


def verdict(record: dict[str, object]) -> str:
    """What a recovery came to, in one sentence."""
    found = cast("dict[str, object]", record["recovery"])
    loss = cast("dict[str, float]", found["held_out"])
    if not found["best_step"]:
        return (
            f"The held-out loss did not fall below the pruned model's {loss['before']:.4f}, and the weights are that model's: "
            "keep it, or train again with another --learning-rate, more --steps or more text."
        )
    options = cast("dict[str, object]", found["options"])
    return (
        f"Held-out loss {loss['before']:.4f} before, {loss['after']:.4f} after {found['best_step']} of {options['steps']} "
        f"steps (perplexity {math.exp(loss['before']):.3f} and {math.exp(loss['after']):.3f})."
    )
