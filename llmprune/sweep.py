"""One recipe over several methods, sparsities and patterns, and the frontier of quality, sparsity and size.

    llmprune sweep --model llama --methods wanda,magnitude --sparsities 0.3,0.5,0.7 --evaluate wikitext2 --output frontier

Each combination is a run of its own in `frontier/wanda-0.5` and so on. The same command again goes on where it was: finished
runs are only looked at, by the rules of `prune`, which also refuses what has changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from . import methods, pictures
from .checkpoint import write_text
from .compare import PERPLEXITY, Comparison, as_json, cells, compare, header, notes
from .errors import LLMPruneError
from .models import resolve
from .pictures import Picture, Point, render
from .pruning import Say, check_run, prepare, run
from .ranks import launch
from .recipe import Recipe, from_options, parse_nm
from .record import read
from .report import fill, write_page

if TYPE_CHECKING:
    from .evaluation import Request

SUMMARY, PAGE = "sweep.json", "sweep.html"
# What the papers measure on.
TEXT = "wikitext2"


def combinations(recipe: Recipe, names: Sequence[str], sparsities: Sequence[str], patterns: Sequence[str]) -> list[Recipe]:
    """Every method at every sparsity and pattern, each once, with an output of its own in the recipe's.

    Args:
        recipe: what they have in common; also the method, or the sparsity and pattern, where no others are given.
        names: methods.
        sparsities, patterns: as given on the command line.

    Raises:
        LLMPruneError: an unknown method, a value that is not allowed, or nothing to sweep over.
    """
    if recipe.output is None:
        raise LLMPruneError("No folder was given for the sweep: pass --output DIR.")
    given = recipe.model_dump(exclude_unset=True, exclude={"method", "output"})
    own: dict[str, object] = {key: given.pop(key) for key in ("sparsity", "pattern") if key in given}
    varied: list[dict[str, object]] = [{"sparsity": value} for value in sparsities]
    varied += [{"pattern": value} for value in patterns]
    if not varied and not own and recipe.target_params is None:
        raise LLMPruneError("There is nothing to sweep over: pass --sparsities, such as 0.3,0.5, or --patterns, such as 2:4.")
    found = {}
    for method in names or [recipe.method]:
        methods.load(method)
        for options in varied or [own]:
            one = from_options({"evaluate": TEXT, **given, **options, "method": method})
            amount = one.pattern.replace(":", "of") if parse_nm(one.pattern) else one.target_params or f"{one.target:g}"
            output = recipe.output / f"{method}-{amount}"
            found[output] = one.model_copy(update={"output": output})
    return list(found.values())


def evaluations(
    recipes: Sequence[Recipe], *, suite: str | None = None, tasks: str | None = None, limit: str | None = None
) -> list[Request]:
    """What to evaluate of each run, as `llmprune eval` takes it; nothing if no tasks are named.

    Raises:
        LLMPruneError: an unknown task or suite, tasks without data, or a value that is not allowed.
    """
    if not suite and not tasks:
        if limit:
            raise LLMPruneError(f"--limit {limit} has no meaning without tasks: pass --suite or --tasks, or leave it out.")
        return []
    from .evaluation import request
    from .harness import PERPLEXITY as TOKEN_PERPLEXITY
    from .harness import load_suite, load_tasks

    dense = recipes[0].model
    if recipes[0].revision:
        # Evaluation takes one revision, of its model.
        dense = str(resolve(dense, revision=recipes[0].revision, say=lambda line: None).directory)
    requests = [
        request(
            model=str(recipe.output),
            baseline=dense,
            suite=suite,
            tasks=tasks,
            limit=limit,
            device=recipe.device,
            trust_remote_code=recipe.trust_remote_code,
        )
        for recipe in recipes
    ]
    names = [name.strip() for name in tasks.split(",")] if tasks else load_suite(str(suite)).tasks
    load_tasks([name for name in names if name != TOKEN_PERPLEXITY])
    return requests


def sweep(recipes: Sequence[Recipe], requests: Sequence[Request], *, say: Say, quiet: bool) -> list[Path]:
    """Carry out every recipe, and then its evaluation if there are any.

    Returns:
        The output directories.

    Raises:
        LLMPruneError: bad input. What needs no weights to be seen is seen before the first run starts.
    """
    for recipe in recipes:
        check_run(prepare(recipe, lambda line: None))
    done = []
    for number, recipe in enumerate(recipes):
        say(f"── {number + 1} of {len(recipes)}: {recipe.output}")
        done.append(run(recipe, say=say, quiet=quiet).directory)
        if requests and launch().is_main:
            from . import evaluation

            evaluation.evaluate(requests[number], say=say, quiet=quiet)
    return done


def write_summary(directory: Path, runs: Sequence[Path]) -> Comparison:
    """Write `sweep.json`, and `sweep.html` with the frontiers as PNG beside it."""
    found = compare(runs)
    write_text(directory / SUMMARY, json.dumps(as_json(found), indent=2) + "\n")
    record, *others = map(read, runs)
    # What is a share of different things is compared as a share of the model.
    alike = all(other.parameters.prunable == record.parameters.prunable for other in others)
    drawn = frontiers(found, record.parameters.total, record.parameters.prunable if alike else None)
    html = fill(
        "sweep.html.j2",
        model=record.model.name,
        pictures=drawn,
        header=header(found),
        cells=cells(found),
        notes=notes(found),
        zeros=any(row.method and not row.structured for row in found.rows),
    )
    write_page(html, drawn, directory / PAGE)
    return found


def frontiers(comparison: Comparison, total: int, prunable: int | None) -> list[Picture]:
    """Perplexity, and the mean score of the tasks where more is better, against sparsity.

    What was measured in another way than the first of its column is left out.

    Args:
        total: the dense model's parameters.
        prunable: those that a sparsity is a share of; None to take sparsities of the whole model.
    """
    measured = {column: row.values[column] for row in comparison.rows for column in row.values}
    tasks = [column for column in comparison.columns if column != PERPLEXITY and measured[column].higher_is_better]
    drawn = []
    for name, label, columns in (
        ("perplexity", PERPLEXITY, [PERPLEXITY]),
        ("tasks", f"mean score of {', '.join(tasks)}" if len(tasks) < 4 else f"mean score of {len(tasks)} tasks", tasks),
    ):
        points, dense = [], None
        for number, row in enumerate(comparison.rows):
            if not columns or any(column not in row.values or (number, column) in comparison.marks for column in columns):
                continue
            quality = fmean(row.values[column].value for column in columns)
            if row.method:
                nm = row.pattern if ":" in row.pattern else None
                sparsity = 1 - row.nonzero / total if prunable is None else row.sparsity
                points.append(Point(row.method, sparsity, quality, nm))
            else:
                dense = quality
        if points:
            said = "; ".join(f"{one.series} {one.pattern or f'{one.sparsity:.0%}'}: {one.quality:.4g}" for one in points)
            draw = pictures.frontier(
                points,
                dense,
                label,
                log=name == "perplexity",
                total=total,
                prunable=prunable or total,
                across="sparsity of the prunable weights" if prunable else "share of the model's parameters that was removed",
            )
            alt = f"{label} against sparsity. " + (f"dense: {dense:.4g}; " if dense is not None else "") + said
            drawn.append(render(name, alt, draw))
    return drawn
