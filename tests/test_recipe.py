"""Recipes: flag over file over default, one sentence for what is wrong, YAML that reads back."""

from pathlib import Path

import pytest
import yaml

from llmprune import methods
from llmprune.errors import LLMPruneError
from llmprune.options import PRESETS, DsnotOptions, IcbsOptions
from llmprune.recipe import DECISIVE, IMPLIED, Recipe, from_options, parse_nm

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: llama\nmethod: magnitude\nsparsity: 0.3\n")
    recipe = from_options({"method": "wanda", "sparsity": None}, file)
    assert (recipe.method, recipe.sparsity, recipe.seed) == ("wanda", 0.3, 0)


def test_a_recipe_reads_back_from_its_own_yaml(tmp_path):
    recipe = Recipe(model="llama", method="sparsegpt", pattern="2:4", samples=7, output=Path("x"))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert from_options({}, file) == recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "1"}, r"outside \[0, 1\)"),
        ({"sparsity": "-0.1"}, r"outside \[0, 1\)"),
        ({"sparsity": "nan"}, r"outside \[0, 1\)"),
        ({"sparsity": "many"}, "'many'"),
        ({"pattern": "2:4", "sparsity": "0.6"}, "contradicts sparsity 0.6"),
        ({"pattern": "4:4"}, "0 < N < M"),
        ({"pattern": "0:4"}, "0 < N < M"),
        ({"pattern": "blocks"}, "Unknown pattern 'blocks'"),
        ({"pattern": "2:4", "group": "row"}, "--group row has no meaning"),
        ({"group": "column"}, "'column'"),
        ({"samples": "0"}, "samples"),
        ({"seqlen": "1"}, "seqlen"),
        ({"dtype": "int8"}, "'int8'"),
        ({"propagate": "both"}, "'both'"),
    ],
)
def test_what_is_not_allowed_is_one_sentence_with_the_value(options, message):
    with pytest.raises(LLMPruneError, match=message) as caught:
        from_options({"model": "llama", **options})
    assert "\n" not in str(caught.value)


def test_no_model_is_an_error():
    with pytest.raises(LLMPruneError, match="No model given"):
        from_options({})


def test_an_nm_pattern_implies_its_sparsity():
    assert Recipe(model="m", pattern="1:4").target == 0.75
    assert Recipe(model="m", pattern="2:4", sparsity=0.5).target == 0.5
    assert parse_nm("4:8") == (4, 8)


def test_every_decisive_option_exists():
    assert set(DECISIVE) <= set(Recipe.model_fields)


@pytest.mark.parametrize("method", IMPLIED)
def test_a_methods_name_stands_for_its_options_and_what_is_given_goes_before_them(method):
    recipe = Recipe(model="m", method=method)
    assert {key: getattr(recipe, key) for key in IMPLIED[method]} == IMPLIED[method]
    assert Recipe(model="m", method="best", rounds=3).rounds == 3
    assert Recipe(model="m", method="dsnot", refine="none").dsnot is None


def test_options_of_a_method_may_be_text_or_a_mapping_and_exist_only_where_they_are_used():
    assert Recipe(model="m").dsnot is Recipe(model="m").icbs is None
    assert Recipe(model="m", refine="dsnot").dsnot == DsnotOptions()
    wanted = DsnotOptions(accept="always", skip=("q", "down"))
    for given in ("accept: always, skip: [q, down]", {"accept": "always", "skip": ["q", "down"]}):
        assert Recipe(model="m", method="dsnot", dsnot=given).dsnot == wanted


def test_the_papers_settings_are_those_published_but_for_what_is_given():
    assert Recipe(model="m", method="dsnot", preset="paper").dsnot == DsnotOptions(**PRESETS["dsnot"]["paper"])
    assert Recipe(model="m", method="icbs", preset="paper").icbs == IcbsOptions(**PRESETS["icbs"]["paper"])
    assert Recipe(model="m", method="dsnot", preset="paper", dsnot="cycles: 7").dsnot.cycles == 7
    assert Recipe(model="m", method="icbs", preset="paper", steps=9, icbs="steps: 5").icbs.steps == 9


@pytest.mark.parametrize(
    "options",
    [
        {"method": "best", "sparsity": 0.7},
        {"method": "best", "pattern": "2:4"},
        {"method": "dsnot", "preset": "paper"},
        {"method": "dsnot", "dsnot": "accept: always, skip: [q]", "reconstruct": "lstsq"},
        {"method": "icbs", "preset": "paper", "steps": 3},
        {"refine": "icbs", "damping": 0.2},
    ],
    ids=str,
)
def test_refining_recipes_read_back_from_their_own_yaml(options, tmp_path):
    recipe, file = from_options({"model": "llama", **options}), tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert from_options({}, file) == recipe


@pytest.mark.parametrize("name", ["dsnot", "icbs"])
def test_an_unknown_option_of_a_method_is_answered_with_the_methods_options(name):
    fields = {"dsnot": DsnotOptions, "icbs": IcbsOptions}[name].model_fields
    with pytest.raises(LLMPruneError, match=rf"'{name}\.speed'.*{', '.join(fields)}"):
        from_options({"model": "m", "method": name, name: "speed: 3"})


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_recipe_is_valid_and_names_a_method(file):
    recipe = from_options({"model": "llama"}, file)
    methods.load(recipe.method)
    assert set(yaml.safe_load(file.read_text())) <= set(Recipe.model_fields)


def test_methods_are_found_and_summarised_without_importing_them():
    assert {"magnitude", "random", "sparsegpt", "wanda"} <= set(methods.names())
    for name in methods.names():
        assert len(methods.summary(name)) > 20
