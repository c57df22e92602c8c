"""Families x methods: every cell is what the command line makes of a tiny model, checked tensor by tensor and loaded afresh.

    python tests/helpers/matrix.py              # prune every cell, write the table into README.md
    python tests/helpers/matrix.py mixtral gpt2 # only these rows anew

README's table is also what test_families.py holds every cell to, so it cannot say what the code does not do. Here a cell is
all of its runs, in the tests one of them in turn. A cell is a word, a
sentence with which the command line refused, or both: what it refused first and what it does instead.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import stock
import tiny
import torch
from checkpoints import tensors
from in_process import llmprune
from torch import Tensor

from llmprune import methods
from llmprune.models import FAMILIES, Skeleton
from llmprune.recipe import STRUCTURED
from llmprune.stream import Block
from llmprune.verify import verify
from llmprune.vision_language import TYPES

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
SPARSITY, SAMPLES, SEQLEN = 0.45, 5, 12
QUICK = ("--device", "cpu", "--calibration", "random", "--samples", SAMPLES, "--seqlen", SEQLEN, "--micro-batch", 3)

ANY, NM = ("--sparsity", SPARSITY), ("--pattern", "2:4")
SUBLAYER, DENSE = ("--sequential", "sublayer"), ("--propagate", "dense")
ICBS = ("--icbs", "steps: 1, holdout: 2, block_size: 16, positions: 16")
SEARCH = ("--search", "iterations: 1, generations: 1, offspring: 2, levels: 3, stages: [[1, 24]], top_k: 16")
Options = tuple[object, ...]
# What has to succeed for a mark in the table: both patterns, and the orders of work where a method's statistics depend on them.
RUNS: dict[str, list[Options]] = {
    "magnitude": [ANY, NM],
    "random": [ANY, NM],
    "wanda": [(*ANY, *DENSE), (*NM, *SUBLAYER), ANY],
    "sparsegpt": [(*ANY, *DENSE), (*NM, *SUBLAYER)],
    "dsnot": [ANY, NM],
    "icbs": [(*ANY, *ICBS), (*NM, *ICBS)],
    "best": [ANY, NM],
    "cfsp": [(*ANY, "--multiple-of", 8)],
    "tyr": [(*ANY, *SEARCH, "--heads", "q_balanced", "--samples", 16)],
    "wina": [(*ANY, "--allocation", "uniform")],
    "reap": [("--sparsity", 0.5)],
}
# Instead of what is refused.
OTHERWISE: dict[str, list[Options]] = {
    "cfsp": [("--format", "masked"), ("--allocation", "uniform", "--compensate", "none")],
}
# Enough experts that some can go.
CHANGES: dict[str, dict[str, object]] = {"deepseek_v3": {"n_routed_experts": 8}}
# Methods that change weights which stay.
FITTING = ("sparsegpt", "best")
WORDS = {"masks": "✓", "smaller": "smaller", "zeros": "zeros", "plan": "plan", "refused": "–"}
NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "olmo2": "OLMo 2",
    "smollm3": "SmolLM3",
    "phi3": "Phi-3",
    "opt": "OPT",
    "gpt_neox": "GPT-NeoX",
    "gpt2": "GPT-2",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "olmoe": "OLMoE",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "gemma3": "Gemma 3 (vision)",
    "llava": "LLaVA",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
VARIANTS = tiny.VARIANTS | tiny.EXPERTS | tiny.VISION_LANGUAGE


@dataclass(frozen=True)
class Cell:
    """What a method does to a family, and the sentence with which something was refused, the family's name left out."""

    word: str
    refusal: str = ""

    def __post_init__(self) -> None:
        assert self.word in WORDS


@dataclass(frozen=True)
class Pruned:
    """A finished run: its directory, its record, and the tensors by parameter name that were in memory when it was written."""

    method: str
    options: Options
    folder: Path
    record: dict[str, object]
    ran: dict[str, Tensor]


@dataclass
class Bench:
    """Tiny models, each built once, what was made of them, and the process that loads that."""

    root: Path
    process: stock.Process
    ids_NT: Tensor = field(
        default_factory=lambda: torch.randint(3, 250, (3, SEQLEN), generator=torch.Generator().manual_seed(1))
    )
    _runs: dict[tuple[object, ...], Pruned | str] = field(default_factory=dict)
    _skeletons: dict[str, Skeleton] = field(default_factory=dict)

    def model(self, variant: str) -> Path:
        """The directory of a tiny model."""
        folder = self.root / variant
        return folder if folder.exists() else tiny.build(variant, folder, **CHANGES.get(variant, {}))

    def prune(self, variant: str, method: str, *options: object) -> Pruned | str:
        """Prune through the command line, once for every set of options. Returns the sentence if it was refused."""
        key = (variant, method, *options)
        if key not in self._runs:
            self._runs[key] = self._prune(variant, method, options)
        return self._runs[key]

    def _prune(self, variant: str, method: str, options: Options) -> Pruned | str:
        source, folder = self.model(variant), self.root / f"{variant}_{len(self._runs)}"
        ran: dict[str, Tensor] = {}
        written = Block.written

        def spy(block: Block, stored: dict[str, Tensor]) -> dict[str, Tensor]:
            ran.update({name: tensor.clone() for name, tensor in stored.items()})
            return written(block, stored)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Block, "written", spy)
            flags = ("--model", source, "--output", folder, "--method", method, "--json", *QUICK, *options)
            outcome = llmprune("prune", *flags)
        if outcome.code == 2:
            assert not folder.exists()
            return sentence(outcome.err, variant, method)
        assert outcome.code == 0, outcome.err
        return Pruned(method, options, folder, json.loads(outcome.out), ran)

    def in_memory(self, variant: str, ran: Mapping[str, Tensor]) -> Tensor:
        """Logits of the model that has these tensors in its blocks: nothing of it is read from what was written."""
        if variant not in self._skeletons:
            self._skeletons[variant] = Skeleton(self.model(variant))
        return self._logits(self._skeletons[variant], ran)

    def on_disk(self, folder: Path) -> Tensor:
        """Logits of a model whose experts are fewer or narrower than any that ran: its own tensors, in our modules."""
        skeleton = Skeleton(folder)
        return self._logits(skeleton, {n: skeleton.checkpoint.read(stored) for n, stored in skeleton.stored_names.items()})

    def _logits(self, skeleton: Skeleton, stored: Mapping[str, Tensor]) -> Tensor:
        skeleton.fill_outer(head=True)
        for index in range(len(skeleton.blocks)):
            skeleton.fill_block(index, {name: stored[name] for name in skeleton.block_parameters(index)})
        with torch.no_grad():
            return skeleton.model(input_ids=self.ids_NT).logits

    def cell(self, variant: str, method: str, runs: Sequence[Options]) -> Cell:
        """Make and check some or all of a cell's `RUNS`."""
        refusal, word = "", ""
        for options in runs:
            found = self.prune(variant, method, *options)
            if isinstance(found, str):
                refusal = found
                others = (self.prune(variant, method, *options, *more) for more in OTHERWISE.get(method, []))
                found = next((other for other in others if not isinstance(other, str)), found)
            if isinstance(found, str):
                assert word in ("", "refused"), f"{method} {options}: {found}"
                word = "refused"
            else:
                assert word != "refused", f"{method} {options} is not refused like the others"
                word = self.check(variant, found)
        return Cell(word, refusal)

    def check(self, variant: str, pruned: Pruned) -> str:
        """Whether the directory is what was in memory, has the zeros it declares, and loads. Returns what it is."""
        problems = verify(pruned.folder)
        assert not problems, problems
        loaded = self.process.load(pruned.folder, self.ids_NT)
        assert loaded.amiss == {}
        assert [loaded.name] == json.loads((pruned.folder / "config.json").read_text())["architectures"]
        before, after = tensors(self.model(variant)), tensors(pruned.folder)
        source = {name: before[name] for name in before.keys() & after.keys()}
        outer = {name for name in before if not in_block(name)}
        assert outer <= after.keys()
        assert all(same(after[name], before[name]) for name in outer)
        if pruned.record.get("gating"):
            assert after.keys() == before.keys()
            assert all(same(after[name], tensor) for name, tensor in source.items())
            assert pruned.record["gating"]["measured"] == pytest.approx(SPARSITY, abs=0.05)
            assert torch.equal(loaded.logits, self.in_memory(variant, pruned.ran))
            return "plan"
        if pruned.method in STRUCTURED:
            check_sizes(before, after, pruned)
            narrower = "experts" in " ".join(after)
            expected = self.on_disk(pruned.folder) if narrower else self.in_memory(variant, pruned.ran)
            # Sums of fewer terms come in another order.
            torch.testing.assert_close(loaded.logits, expected, rtol=1e-4, atol=1e-4)
            return "zeros" if "masked" in pruned.options else "smaller"
        check_zeros(before, after, pruned)
        expected = self.in_memory(variant, pruned.ran)
        if "experts" in " ".join(after):
            # Stock code has an expert's gate and up in one product, and adds experts up in an order of its own.
            torch.testing.assert_close(loaded.logits, expected, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(loaded.logits, expected)
        return "masks"


def tested() -> Iterator[tuple[str, str]]:
    """Models and methods that there is time for in the tests.

    All methods of the first model of a family; some of its others and of vision-language models, whose decoders are among them.
    """
    for variant, (model_type, _) in VARIANTS.items():
        first = variant == next(variants(model_type)) and model_type not in TYPES
        for method in columns():
            if first or method in ("wanda", "sparsegpt", "wina", *STRUCTURED):
                yield variant, method


def in_turn(variant: str, method: str) -> Options:
    """The run of a cell that there is time for in the tests, another one from model to model."""
    runs = RUNS[method]
    return runs[list(VARIANTS).index(variant) % len(runs)]


def sentence(err: str, variant: str, method: str) -> str:
    """What was refused, in one line and without the names of the family and the method."""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    names = "|".join([variant, VARIANTS[variant][0]])
    said = re.sub(rf"'?\b({names})\b'?", "…", lines[0].removeprefix("error: "))
    return said.replace(f"--method {method}", "This method") if said.startswith("--method") else said


def in_block(name: str) -> bool:
    return re.search(r"\b(layers|h)\.\d+\.", name) is not None and not name.startswith(("vision", "visual", "model.visual"))


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether it is a matrix of a block that is no router: these, and no others, are to be pruned."""
    return in_block(name) and tensor.ndim > 1 and not re.search(r"\.(gate|router|shared_expert_gate)\.weight$", name)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def check_zeros(before: Mapping[str, Tensor], after: Mapping[str, Tensor], pruned: Pruned) -> None:
    """Every matrix of the blocks has the zeros that were asked for and recorded, +0.0, and all else its bytes."""
    linears = {fact["tensor"]: fact for fact in pruned.record["linears"].values()}  # type: ignore[attr-defined]
    assert after.keys() == before.keys()
    assert set(linears) == {name for name, tensor in after.items() if is_matrix(name, tensor)}
    assert pruned.record["coverage"] == pytest.approx(
        sum(after[name].numel() for name in linears) / sum(t.numel() for name, t in after.items() if in_block(name)), abs=1e-3
    )
    asked, all_zeros = 0, 0
    for name, source in before.items():
        if name not in linears:
            assert same(after[name], source), name
            continue
        zero = after[name] == 0
        assert linears[name]["zeros"] == zero.sum(), name
        assert not torch.signbit(after[name][zero]).any(), name
        kept = ~zero
        assert pruned.method in FITTING or torch.equal(after[name][kept], source[kept]), name
        zero_OI = zero.T if linears[name]["transposed"] else zero
        asked += source.numel()
        all_zeros += int(zero.sum())
        if "2:4" in pruned.options:
            assert (zero_OI.reshape(-1, 4).sum(1) == 2).all(), name
        elif pruned.method in ("wanda", "random", "dsnot"):
            assert (zero_OI.sum(1) == math.floor(zero_OI.shape[1] * SPARSITY)).all(), name
        elif pruned.method in ("magnitude", "sparsegpt"):
            assert zero.sum() == math.floor(zero.numel() * SPARSITY), name
    rows = sum(linear["shape"][0] for linear in linears.values())
    wanted = 0.5 if "2:4" in pruned.options else SPARSITY
    assert wanted * asked - rows <= all_zeros <= wanted * asked + rows
    assert pruned.record["sparsity"] == pytest.approx(all_zeros / asked)


def check_sizes(before: Mapping[str, Tensor], after: Mapping[str, Tensor], pruned: Pruned) -> None:
    """As many parameters are gone from the disk, or zero on it, as the record says."""
    gone = sum(t.numel() for t in before.values()) - sum(t.numel() for t in after.values())
    zeros = sum(int((t == 0).sum()) for name, t in after.items() if in_block(name))
    parameters = pruned.record["parameters"]
    assert parameters["stored"] == sum(t.numel() for t in after.values())  # type: ignore[index]
    assert gone + zeros >= parameters["zero"] > 0  # type: ignore[index]
    assert pruned.record["sparsity"] == pytest.approx(SPARSITY, abs=0.1)


# The table ----------------------------------------------------------------------------------------------------------


def columns() -> list[str]:
    return methods.names()


def rows() -> list[str]:
    """The supported families."""
    return [*(name for name in FAMILIES if not name.startswith("llmprune_")), *TYPES]


def table(cells: Mapping[tuple[str, str], Cell]) -> str:
    """The table by family and method as Markdown, refusals as numbered notes below it."""
    notes = list(dict.fromkeys(cell.refusal for cell in cells.values() if cell.refusal))
    lines = [["", *(f"`{method}`" for method in columns())], ["---"] * (len(columns()) + 1)]
    for family in rows():
        line = [NAMES[family]]
        for method in columns():
            cell = cells[family, method]
            line.append(WORDS[cell.word] + (f" ({notes.index(cell.refusal) + 1})" if cell.refusal else ""))
        lines.append(line)
    text = "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)
    return text + "\n" + "".join(f"({number}) {note}\n\n" for number, note in enumerate(notes, 1))


def read_table(text: str) -> dict[tuple[str, str], Cell]:
    """The cells of what `table` wrote, by the names in the table's margins.

    They are those of the methods and of `NAMES`.
    """
    words = {mark: word for word, mark in WORDS.items()}
    notes = dict(re.findall(r"^\((\d+)\) (.*)$", text, re.MULTILINE))
    head, _, *lines = (
        [part.strip(" `") for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    )
    cells = {}
    for name, *marks in lines:
        for method, mark in zip(head[1:], marks, strict=True):
            found = re.fullmatch(r"(\S+)(?: \((\d+)\))?", mark)
            assert found, mark
            cells[name, method] = Cell(words[found[1]], notes[found[2]] if found[2] else "")
    return cells


def in_readme() -> str:
    """What README.md has between the marks."""
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def variants(family: str) -> Iterator[str]:
    """The tiny models of a family."""
    return (name for name, (model_type, _) in VARIANTS.items() if model_type == family)


def main() -> None:
    torch.set_num_threads(1)
    written = read_table(in_readme()) if len(sys.argv) > 1 else {}
    cells = {key: written.get((NAMES[key[0]], key[1]), Cell("refused", "Not looked at.")) for key in product(rows(), columns())}
    for family in sys.argv[1:] or rows():
        with tempfile.TemporaryDirectory() as root, stock.Process(Path(root)) as process:
            bench = Bench(Path(root), process)
            variant = next(variants(family))
            cells |= {(family, method): bench.cell(variant, method, RUNS[method]) for method in columns()}
            print(family, *(cells[family, method].word for method in columns()), flush=True)
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    README.write_text(before + BEGIN + table(cells) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
