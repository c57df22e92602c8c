"""The report: what its page says is what the record says, and the page needs nothing but itself."""

from __future__ import annotations

import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from in_process import llmprune
from records import PERPLEXITY, SHAPES, amend, evaluation, facts, structured, task
from tiny import build

from llmprune import pictures
from llmprune.pruning import Result
from llmprune.record import Record
from llmprune.report import error_grids, outlier_grid, page, sparsity_grid
from llmprune.tables import show

VOID = {"meta", "br", "wbr", "link", "img"}
TASKS = {"arc_easy": task(0.40625, 0.5), "boolq": task(0.625, 0.65625), "a_task_whose_name_" + "is_long_" * 12: task(0.25)}
# Steps of a search: kept, undone, kept in part, without a proposal.
SEARCH = [
    {"step": 0, "held_out": 4.0},
    {"step": 1, "held_out": 3.5, "proposed": 10, "swaps": 10, "predicted": -1.0, "batch": 4.1, "gamma": 0.1},
    {"step": 2, "held_out": 3.5, "proposed": 8, "swaps": 0, "predicted": 0.0, "batch": 3.6, "gamma": 0.1},
    {"step": 3, "held_out": 3.25, "proposed": 8, "swaps": 4, "predicted": -0.5, "batch": 3.4, "gamma": 0.05},
    {"step": 4, "held_out": 3.25, "proposed": 0, "swaps": 0, "predicted": 0.0, "batch": 3.4, "gamma": 0.05},
]
ICBS = {"holdout": 8, "accept": "holdout", "keep_best": True, "target": "text"}
BLOCKS = [{"influence": 0.5, "output_error": 0.01}, {"influence": 0.125, "output_error": 0.02}, {"influence": None}]


class Page(HTMLParser):
    """A page's elements, texts and tables. Every element must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += f" {data}" if "small" in self.open else data

    def row(self, start: str) -> list[str]:
        """The cells behind the first one that starts so."""
        (cells,) = (row[1:] for row in self.rows if row and row[0].startswith(start))
        return cells

    @property
    def headings(self) -> list[str]:
        return self.texts["h2"]


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures of nothing, for what does not depend on them: drawing takes a second a page."""
    monkeypatch.setattr("llmprune.report.render", lambda name, alt, draw: pictures.Picture(name, alt, "", "", b""))


def html(**more: object) -> str:
    return page(Record.model_validate(facts(**more)), 123_456)[0]


def refine(record: dict[str, object], **recipe: object) -> None:
    """Make it a record of a run with held-out samples: two linears with errors, whose means are easy."""
    record["recipe"] |= {"samples": 32, "seqlen": 128, "match": "block", **recipe}
    first, second = list(record["linears"].values())[:2]
    first |= {"error": 0.01, "fresh_error": 0.02, "start_fresh_error": 0.08, "rows_refused": 3}
    second |= {"error": 0.03, "fresh_error": 0.06, "start_fresh_error": 0.08, "rows_refused": 1}


@pytest.fixture(scope="module")
def full() -> str:
    """A page with every section."""
    record = facts(
        perplexity=PERPLEXITY,
        evaluation=evaluation(
            {**TASKS, "lambada": task(9.5, 4.25, metric="perplexity", higher_is_better=False)}, suite="quick"
        ),
        blocks=BLOCKS,
        kept={"ffn": [20, 16, 12], "heads": [4, 4, 2]},
        dense_widths={"ffn": 20, "heads": 4},
        reasons={"method": "it is short"},
        search=SEARCH,
    )
    refine(record, icbs=ICBS)
    for number, linear in enumerate(record["linears"].values()):
        linear["zeros"] = number * linear["zeros"] // 11
        linear["outlier_ratio"] = 0.001 * number
    return page(Record.model_validate(record), 123_456)[0]


def test_a_page_asks_for_nothing_outside_itself(full):
    tags = Page(full).tags
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:image/png;base64,")), target
    assert "@import" not in full
    assert set(re.findall(r"url\((.)", full)) <= {"#"}


def test_a_page_names_its_language_scales_to_the_device_and_describes_every_picture(full):
    tags = Page(full).tags
    assert ("html", {"lang": "en"}) in tags
    assert any(tag == "meta" and attributes.get("name") == "viewport" for tag, attributes in tags)
    labels = [attributes["aria-label"] for _, attributes in tags if attributes.get("role") == "img"]
    assert len(labels) == 2 * 10
    assert all(len(label) > 20 for label in labels)


def test_no_two_elements_share_an_id_and_every_reference_has_its_element(full):
    tags = Page(full).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    references = re.findall(r'(?:url\(#|xlink:href="#)([\w-]+)', full)
    assert set(references) <= set(ids)


def test_perplexities_in_the_table_are_the_records(full):
    assert Page(full).row("wikitext2") == ["20.125", "31.062", "1.54 ×"]


def test_task_scores_in_the_table_are_the_records(full):
    seen = Page(full)
    assert seen.row("arc_easy") == ["0.500 ± 0.012", "0.406 ± 0.011", "−0.094 −0.114 … −0.064"]
    assert seen.row("a_task_whose_name_") == ["–", "0.250 ± 0.011", "–"]
    assert seen.row("lambada")[:2] == ["4.250 ± 0.012", "9.500 ± 0.011"]


@pytest.mark.usefixtures("undrawn")
def test_a_task_says_where_its_protocol_is_another():
    tasks = {"boolq": task(0.5, protocol={"limit": 50}), "rte": task(0.5, protocol={"limit": 200})}
    words = Page(html(evaluation=evaluation(tasks))).texts["th"]
    assert [word for word in words if "limit: 50 instead of 200" in word] == [
        word for word in words if word.startswith("boolq")
    ]


@pytest.mark.usefixtures("undrawn")
def test_sizes_in_the_table_are_the_records():
    seen = Page(html())
    parameters = facts()["parameters"]
    assert seen.row("Non-zero parameters") == [
        f"{parameters['total']:,}",
        f"{parameters['total'] - parameters['zero']:,}",
    ]
    assert seen.row("Weights on disk") == ["123.5 kB", "123.5 kB"]
    assert seen.row("gate") == ["20 × 8", "480", "50.00 %"]


def test_errors_in_the_table_are_means_of_the_records(full):
    seen = Page(full)
    assert seen.row("The result, tokens of the fit") == ["0.0200"]
    assert seen.row("The result, held out") == ["0.0400"]
    assert seen.row("The method's own mask, held out") == ["0.0800"]
    assert seen.row("Taken away") == ["50.0 %"], "of 75 % and 25 %"
    assert "4 of 12 rows were worse" in full
    assert "on 4 calibration samples of 128 tokens that no linear was fitted to" in full


@pytest.mark.usefixtures("undrawn")
def test_errors_without_held_out_samples_have_no_start_to_compare_with():
    record = facts()
    refine(record)
    for linear in record["linears"].values():
        linear.pop("fresh_error", None)
        linear.pop("start_fresh_error", None)
    seen = Page(page(Record.model_validate(record), 1)[0])
    assert seen.row("The result, tokens of the fit") == ["0.0200"]
    assert not [row for row in seen.rows if row and "held out" in row[0]]
    assert "errors" not in names(record)


def test_errors_of_one_role_and_block_are_drawn_together_and_the_rest_stays_blank():
    record = facts()
    assert error_grids(Record.model_validate(record)) is None
    refine(record)
    record["linears"]["model.layers.0.mlp.experts.1.q_proj"] = {
        **record["linears"]["model.layers.0.mlp.q_proj"],
        "fresh_error": 0.04,
        "start_fresh_error": 0.16,
    }
    start, end = error_grids(Record.model_validate(record))
    assert start.cells[0][:2] == pytest.approx((0.12, 0.08))
    assert end.cells[0][:2] == pytest.approx((0.03, 0.06))
    assert all(math.isnan(value) for grid in (start, end) for row in grid.cells[1:] for value in row)
    drawn = {picture.name: picture for picture in page(Record.model_validate(record), 1)[1]}
    words = set(Page(drawn["errors"].wide).texts["text"])
    assert {"q", "k", "the method's own mask", "the result"} <= words
    assert not {"v", "o", "gate"} & words
    assert "q from 0.12 to 0.03" in drawn["errors"].alt


@pytest.mark.usefixtures("undrawn")
def test_errors_against_the_dense_model_say_so():
    record = facts()
    refine(record)
    assert "the dense model's output" not in page(Record.model_validate(record), 1)[0]
    refine(record, match="dense")
    assert "the dense model's output" in page(Record.model_validate(record), 1)[0]


def test_a_search_says_what_became_of_its_steps_and_of_what_it_predicted(full):
    (said,) = [text for text in Page(full).texts["p"] if text.startswith("iCBS took")]
    assert " ".join(said.split()) == (
        "iCBS took the held-out loss from 4.0000 to 3.2500 in 4 steps: kept 1, kept in part 1, undone 1, nothing to swap 1."
    )
    (caption,) = [" ".join(text.split()) for text in Page(full).texts["figcaption"] if text.strip().startswith("Held-out loss")]
    assert "on 4 calibration samples of 128 tokens that no step learns from" in caption
    assert "to change the loss by −1.500 in all; the held-out loss changed by −0.750." in caption


def test_steps_of_a_search_are_told_apart_as_long_as_there_is_room():
    legends = {}
    for number in (4, 400):
        steps = [{**SEARCH[1 + i % 4], "step": i + 1} for i in range(number)]
        record = facts(search=[SEARCH[0], *steps])
        refine(record, icbs=ICBS)
        drawn = {picture.name: picture for picture in page(Record.model_validate(record), 1)[1]}
        legends[number] = set(Page(drawn["search"].wide).texts["text"]) & {*pictures.OUTCOMES, "predicted"}
    assert legends == {4: {*pictures.OUTCOMES, "predicted"}, 400: {"predicted"}}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("keep_best", "end"), [(True, "3.2500"), (False, "5.0000")])
def test_a_search_ends_with_the_masks_that_were_saved(keep_best, end):
    worse = {"step": 5, "held_out": 5.0, "proposed": 2, "swaps": 2, "predicted": -0.1}
    record = facts(search=[*SEARCH, worse])
    refine(record, icbs={**ICBS, "accept": "none", "keep_best": keep_best})
    assert f"from 4.0000 to {end} in 5 steps" in page(Record.model_validate(record), 1)[0]


@pytest.mark.usefixtures("undrawn")
def test_a_search_that_kept_nothing_predicts_nothing():
    record = facts(search=[SEARCH[0], {**SEARCH[2], "step": 1, "held_out": 4.0}])
    refine(record, icbs=ICBS)
    text = page(Record.model_validate(record), 1)[0]
    assert "undone 1." in text
    assert "quadratic models" not in text


def test_the_recipe_in_the_page_reads_back(full):
    recipe = facts()["recipe"] | {"samples": 32, "seqlen": 128, "match": "block", "icbs": ICBS}
    del recipe["output"]
    assert yaml.safe_load(Page(full).texts["pre"][0]) == recipe


def test_what_a_user_named_stays_text():
    name = "<script>alert('1')</script> & $x_1$ </svg>\"><b>"
    record = facts(
        model={"given": name, "name": name, "base_model": name},
        warnings=[name],
        perplexity={**PERPLEXITY, "text": name},
        evaluation=evaluation({name: task(0.5, 0.625)}, baseline=name),
    )
    seen = Page(page(Record.model_validate(record), 1)[0])
    assert not {"script", "b"} & {tag for tag, _ in seen.tags}
    assert seen.texts["h1"] == [name]
    assert sum(name in text for text in seen.texts["text"]) == 2, "the tasks' picture, wide and narrow"


def test_the_same_record_gives_the_same_bytes():
    one, two = (page(Record.model_validate(facts(perplexity=PERPLEXITY)), 1) for _ in range(2))
    assert one[0] == two[0]
    assert [picture.png for picture in one[1]] == [picture.png for picture in two[1]]


@pytest.mark.usefixtures("undrawn")
def test_a_section_without_data_is_not_there(full):
    everything = ["Quality", "Where the zeros are", "What the decision saw", "Size", "The run"]
    assert Page(full).headings == [*everything[:3], "What refinement did", *everything[3:]]
    assert Page(html()).headings == ["Where the zeros are", "Size", "The run"]
    assert Page(html(blocks=[{"influence": None}] * 3)).headings == ["Where the zeros are", "Size", "The run"]
    assert Page(html(perplexity=PERPLEXITY, blocks=BLOCKS)).headings == everything


def names(record: dict[str, object]) -> list[str]:
    return [picture.name for picture in page(Record.model_validate(record), 1)[1]]


@pytest.mark.usefixtures("undrawn")
def test_equal_sparsities_are_a_number_and_not_a_map():
    record = facts(80)
    record["linears"]["model.layers.7.mlp.up_proj"] = {"role": "up", "shape": [100, 100], "zeros": 4960}
    assert "sparsity" not in names(record), "rounding is no decision"
    assert "Every matrix of every block is 50.0 % zero." in html()
    record["linears"]["model.layers.7.mlp.q_proj"]["zeros"] = 20
    assert "sparsity" in names(record)


def test_the_map_names_the_sparsity_of_an_even_role_and_spans_ten_points():
    record = facts()
    record["linears"]["model.layers.1.mlp.up_proj"]["zeros"] = 82
    drawn = {picture.name: picture for picture in page(Record.model_validate(record), 1)[1]}
    words = Page(drawn["sparsity"].wide).texts["text"]
    assert {"q 50%", "up"} <= set(words)
    ticks = [float(word) for word in words if re.fullmatch(r"[\d.]+", word)]
    assert max(ticks) - min(ticks[-5:]) >= 8


def test_the_grid_takes_linears_of_one_role_together_and_leaves_gaps_blank():
    linears = {
        "transformer.h.0.mlp.experts.0.up": {"role": "up", "shape": [2, 10], "zeros": 4},
        "transformer.h.0.mlp.experts.1.up": {"role": "up", "shape": [8, 10], "zeros": 56},
        "transformer.h.10.attn.q": {"role": "q", "shape": [4, 5], "zeros": 5},
    }
    grid = sparsity_grid(Record.model_validate({**facts(), "linears": linears}))
    assert grid.roles == ("up", "q")
    assert len(grid.cells) == 11
    assert grid.cells[0][0] == 0.6
    assert grid.cells[10][1] == 0.25
    assert math.isnan(grid.cells[0][1])
    assert grid.column("up") == [0.6]


def test_outliers_of_some_linears_leave_the_rest_blank():
    record = facts()
    assert outlier_grid(Record.model_validate(record)) is None
    record["linears"]["model.layers.2.mlp.k_proj"]["outlier_ratio"] = 0.125
    grid = outlier_grid(Record.model_validate(record))
    assert [value for row in grid.cells for value in row if not math.isnan(value)] == [0.125]
    assert grid.cells[2][list(SHAPES).index("k")] == 0.125


@pytest.mark.parametrize("depth", [1, 80])
def test_pictures_fit_a_phone_and_the_page(depth):
    record = facts(depth, blocks=[{"influence": 0.5, "output_error": 1e-5}] * depth)
    record["linears"]["model.layers.0.mlp.q_proj"]["zeros"] = 1
    for picture in page(Record.model_validate(record), 1)[1]:
        for svg, width in ((picture.narrow, pictures.NARROW), (picture.wide, pictures.WIDE)):
            (found,) = re.findall(r'<svg[^>]* width="([\d.]+)pt"', svg)
            assert float(found) * 96 / 72 == pytest.approx(width)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("format", ["auto", "padded", "masked"])
def test_a_structured_result_shows_widths_and_no_map_of_zeros(format):
    record = Record.model_validate(structured(format=format))
    text, drawn = page(record, 1000)
    seen = Page(text)
    assert seen.headings[0] == "What is left"
    assert {picture.name for picture in drawn} == {"kept", "blocks", "parameters", "time"}
    assert "unstructured" not in seen.texts["p"][0]
    assert "".join(seen.texts["dd"][0].split()) == "48of60"
    total, left = record.parameters.total, record.parameters.total - 288
    if format == "auto":
        assert seen.row("down") == ["8 × 12 … 20", "384", "0.00 %"]
        assert seen.row("Parameters on disk") == [f"{total:,}", f"{left:,}"]
        assert not [row for row in seen.rows if row and row[0].startswith(("Non-zero", "Parameters in use"))]
    else:
        assert seen.row("Parameters on disk") == [f"{total:,}", f"{total:,}"]
        assert seen.row("Parameters in use") == [f"{total:,}", f"{left:,}"]
    assert seen.row("Weights on disk") == ["–", "1.0 kB"]
    assert page(Record.model_validate(structured(parameters=structured()["parameters"] | {"dense_bytes": 4000})), 1)[0].count(
        "dense 4.0 kB"
    )


def test_the_parameters_picture_tells_removed_from_zero():
    words = {}
    for format in ("auto", "masked"):
        drawn = {picture.name: picture for picture in page(Record.model_validate(structured(format=format)), 1)[1]}
        words[format] = set(Page(drawn["parameters"].wide).texts["text"])
    assert "removed: 288" in words["auto"]
    assert not [word for word in words["auto"] if word.startswith("zero")]
    assert {"zero: 288", "removed: 0"} <= words["masked"]


def test_drawings_leave_their_ink_to_the_page(full):
    drawn = "".join(re.findall(r"<svg.*?</svg>", full, re.DOTALL))
    assert not [colour for colour in pictures.LIGHT.values() if colour in drawn]
    assert set(re.findall(r"var\(--(\w+)\)", drawn)) <= set(pictures.DARK) == set(pictures.LIGHT)


def test_the_terminal_names_held_out_losses_and_errors_where_there_are_some(tmp_path, capsys):
    plain, refined = facts(), facts(search=SEARCH)
    refine(refined, icbs=ICBS)
    show(Result(tmp_path, plain))
    assert "held-out" not in capsys.readouterr().out
    show(Result(tmp_path, refined))
    said = capsys.readouterr().out
    assert "3.2500, from 4.0000" in said
    assert "0.0400, from 0.0800" in said


@pytest.mark.parametrize("format", ["auto", "padded", "masked"])
def test_the_terminal_says_what_became_of_units_and_who_can_load_the_model(tmp_path, capsys, format):
    show(Result(tmp_path, structured(format=format)))
    said = capsys.readouterr().out
    assert re.search(r"FFN channels +│ 60 +│ 48 ", said)
    assert "unstructured" not in said
    assert "sparsity" not in said
    assert ("in use" in said) == (format != "auto")
    assert ("trust_remote_code=True" in said) == (format == "auto")
    assert ("loads with stock transformers" in said) == (format != "auto")
    assert {"auto": "faster everywhere", "padded": "no smaller", "masked": "same size on disk, no speed-up"}[format] in said


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    model = build("llama", folder / "model")
    outcome = llmprune("prune", "--model", model, "--method", "magnitude", "--output", folder / "pruned", "--quiet")
    assert outcome.code == 0, outcome
    return folder / "pruned"


def test_the_command_writes_a_page_and_its_pictures(pruned):
    outcome = llmprune("report", pruned)
    assert outcome.out == f"report: {pruned / 'report.html'}\n"
    first = (pruned / "report.html").read_bytes()
    assert sorted(file.name for file in (pruned / "report").iterdir()) == ["parameters.png", "time.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (pruned / "report").iterdir())
    llmprune("report", pruned)
    assert (pruned / "report.html").read_bytes() == first
    assert llmprune("verify", pruned).code == 0


def test_an_earlier_pages_pictures_go_and_other_files_stay(pruned, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("tasks.png", "holiday.png"):
        (tmp_path / "a" / name).write_bytes(b"")
    assert llmprune("report", pruned, "--output", tmp_path / "a.html").code == 0
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"holiday.png", "parameters.png", "time.png"}


@pytest.mark.parametrize("change", [{"sparsity": "much"}, {"linears": {"model.layers.0.q": {"role": "q"}}}])
def test_a_damaged_record_is_one_sentence(pruned, tmp_path, change):
    copy = shutil.copytree(pruned, tmp_path / "copy")
    amend(copy, **change)
    outcome = llmprune("report", copy)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "is damaged" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "holds no llmprune.json"),
        (["{pruned}", "--output", "page.txt"], "ends in .html"),
        (["{pruned}", "--output", "/proc/page.html"], "could not be written"),
    ],
)
def test_bad_input_is_one_sentence(pruned, arguments, words):
    outcome = llmprune("report", *(text.format(pruned=pruned) for text in arguments))
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert words in outcome.err


def test_a_search_for_the_distribution_is_told_iteration_by_iteration():
    generation = {"generation": 0, "children": 4, "evaluated_tokens": 2048, "parent_loss": 0.5, "best_loss": 0.25, "best": [0]}
    iterations = [
        {"held_out": {"before": 0.5, "found": 0.25}, "generations": [generation, generation]},
        {"held_out": {"before": 0.25, "found": 0.375}, "generations": [generation]},
    ]
    content = facts(evolution=iterations)
    content["recipe"] |= {"search": {"top_k": 512}}
    html, _ = page(Record.model_validate(content), disk_bytes=1000)
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "1 2 4,096 0.5000 0.2500 what was found" in text
    assert "2 1 2,048 0.2500 0.3750 where it began" in text
    assert "What the search did" not in page(Record.model_validate(facts()), disk_bytes=1000)[0]
