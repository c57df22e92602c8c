"""Recipes: flag over file over default, one sentence for what is wrong, YAML that reads back."""

from pathlib import Path

import pytest
import yaml

from llmprune import methods
from llmprune.errors import LLMPruneError
from llmprune.recipe import DECISIVE, Recipe, from_options, parse_nm

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


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_recipe_is_valid_and_names_a_method(file):
    recipe = from_options({"model": "llama"}, file)
    methods.load(recipe.method)
    assert set(yaml.safe_load(file.read_text())) <= set(Recipe.model_fields)


def test_methods_are_found_and_summarised_without_importing_them():
    assert {"magnitude", "random", "sparsegpt", "wanda"} <= set(methods.names())
    for name in methods.names():
        assert len(methods.summary(name)) > 20
