"""Of a vision-language model the text decoder is pruned, under whatever name it lies, and the rest is copied.

What each method makes of each family is in test_families.py.
"""

import json
import math
import shutil

import pytest
import torch
from in_process import llmprune
from matrix import QUICK, in_block, same, tensors
from safetensors.torch import save_file
from tiny import VISION_LANGUAGE, build
from torch import nn
from transformers import AutoModelForImageTextToText

from llmprune import load, perplexity
from llmprune.models import Skeleton

IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return build("llava", tmp_path_factory.mktemp("llava"))


def prune(model, output, *options):
    return llmprune("prune", "--json", "--model", model, "--output", output, *QUICK, *options)


def whole(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def renamed(source, target, old, new):
    """A copy of a model with another prefix before its tensors' names, as other versions of transformers write them."""
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    changed = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors(source).items()}
    save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_only_matrices_of_the_decoder_change_and_all_parameters_are_counted(llava, tmp_path):
    outcome = prune(llava, tmp_path / "out", "--sparsity", 0.5)
    assert outcome.code == 0, outcome.err
    before, after = tensors(llava), tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    changed = {name for name in before if not same(before[name], after[name])}
    assert len(changed) == 3 * 7
    assert all(name.startswith("language_model.model.layers.") and name.endswith("_proj.weight") for name in changed)
    record = json.loads(outcome.out)
    assert record["parameters"]["total"] == whole(llava).num_parameters()
    assert record["parameters"]["decoder"] == sum(tensor.numel() for name, tensor in after.items() if in_block(name))
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text()
    loaded = load(tmp_path / "out", device="cpu")
    assert type(loaded) is type(whole(llava))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, whole(tmp_path / "out")(input_ids=IDS).logits)


def test_an_image_is_seen_through_the_pruned_decoder(llava, tmp_path):
    """Else a projector or a tower that is not what it was would not show."""
    assert prune(llava, tmp_path / "out", "--pattern", "2:4").code == 0
    model, after = whole(llava), tensors(tmp_path / "out")
    for name, parameter in model.model.language_model.named_parameters():
        parameter.copy_(after[f"language_model.model.{name}"])
    image = {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    ids = torch.tensor([[5, 260, 260, 260, 260, 6, 7]])
    assert torch.equal(whole(tmp_path / "out")(input_ids=ids, **image).logits, model(input_ids=ids, **image).logits)


@pytest.mark.parametrize(("old", "new"), [("language_model.model.", "model.language_model."), ("language_model.", "")])
def test_the_decoder_is_found_under_every_prefix(llava, tmp_path, old, new):
    other = renamed(llava, tmp_path / "other", old, new)
    for source in (llava, other):
        assert prune(source, tmp_path / f"{source.name} out", "--method", "magnitude").code == 0
    expected, found = (tensors(tmp_path / f"{source.name} out") for source in (llava, other))
    assert len(found) == len(expected)
    assert all(same(found[new + name.removeprefix(old) if name.startswith(old) else name], expected[name]) for name in expected)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_as_the_whole_models_configuration_says(tied, tmp_path):
    _, options = VISION_LANGUAGE["gemma3"]
    text = {**options["text_config"], "tie_word_embeddings": not tied}
    folder = build("gemma3", tmp_path, tie_word_embeddings=tied, text_config=text)
    logits = whole(folder)(input_ids=IDS).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert math.log(perplexity.perplexity(Skeleton(folder), IDS)) == pytest.approx(float(loss), rel=1e-5)


def test_the_model_writes_its_own_calibration_text(llava, tmp_path):
    outcome = prune(llava, tmp_path / "out", "--calibration", "self")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["calibration"]["source"] == "self"


def test_a_decoder_of_another_family_is_named(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "model")
    config = json.loads((llava / "config.json").read_text())
    config["text_config"]["model_type"] = "stablelm"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    outcome = prune(tmp_path / "model", tmp_path / "out")
    assert outcome.code == 2
    assert "Architecture 'stablelm' is not supported yet" in outcome.err
    assert not (tmp_path / "out").exists()
