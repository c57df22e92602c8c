"""Refinement and reconstruction in whole runs: what composes, what is recorded, what the dense model is matched with."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from in_process import llmprune as command
from tiny import save_llama
from transformers import LlamaForCausalLM

import llmprune
from llmprune import methods, record, refinement
from llmprune.checkpoint import Checkpoint
from llmprune.models import Skeleton
from llmprune.patterns import NM, Unstructured
from llmprune.recipe import Recipe
from llmprune.reconstruction import dense_target
from llmprune.statistics import CrossHessian
from llmprune.stream import Stream

OPTIONS = {"calibration": "random", "samples": 9, "seqlen": 24, "device": "cpu"}
PATTERNS = {"row": {"sparsity": 0.5, "group": "row"}, "layer": {"sparsity": 0.6, "group": "layer"}, "2:4": {"pattern": "2:4"}}
REFINES, RECONSTRUCTS = ("none", "dsnot", "icbs"), ("none", "sparsegpt", "lstsq")
BEST = {
    "allocation": "block-influence",
    "group": "layer",
    "sequential": "sublayer",
    "match": "dense",
    "reconstruct": "lstsq",
    "rounds": 15,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    # Weights large enough that blocks change what passes through them.
    return save_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=2, initializer_range=0.2)


def tensors_of(directory):
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


@pytest.fixture(scope="module")
def dense(model_dir):
    return tensors_of(model_dir)


@pytest.fixture
def prune(model_dir, tmp_path):
    """Prune the tiny model with these options: its directory, its linears' tensors and its record."""
    runs = itertools.count()

    def run(**options):
        result = llmprune.prune(str(model_dir), output=tmp_path / str(next(runs)), **{**OPTIONS, **options})
        tensors = tensors_of(result.directory)
        return result.directory, {name: tensors[f"{name}.weight"] for name in result.record["linears"]}, result.record

    return run


def written(directory):
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


def assert_obeys(removed, pattern):
    """Exactly what the pattern removes is removed."""
    if pattern == "2:4":
        assert (removed.view(-1, 4).sum(dim=1) == 2).all()
    elif pattern == "row":
        assert (removed.sum(dim=1) == removed.shape[1] // 2).all()
    else:
        assert int(removed.sum()) == removed.numel() * 6 // 10


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_combination_removes_exactly_what_was_declared(prune, dense, method, pattern):
    for refine, reconstruct in itertools.product(REFINES, RECONSTRUCTS):
        options = {"method": method, "refine": refine, "reconstruct": reconstruct, **PATTERNS[pattern]}
        directory, weights, written_record = prune(**options)
        linears = record.read(directory).linears
        for name, weight in weights.items():
            assert_obeys(weight == 0, pattern)
            assert linears[name].zeros == int((weight == 0).sum())
            if reconstruct == "none":  # kept weights keep their bits
                assert torch.equal(weight, dense[f"{name}.weight"] * (weight != 0)), options
            # SparseGPT's own sweep, which chooses its masks as it goes, fits all samples and holds out none.
            swept = reconstruct == "sparsegpt" and (method, refine) != ("sparsegpt", "none")
            if swept or refine == "icbs" or reconstruct == "lstsq":
                assert {"error", "fresh_error", "start_fresh_error"} <= written_record["linears"][name].keys(), options


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("match", ["block", "dense"])
def test_masks_chosen_with_the_weights_remove_exactly_what_was_declared(prune, match, pattern):
    _, weights, _ = prune(reconstruct="lstsq", rounds=3, match=match, sequential="sublayer", **PATTERNS[pattern])
    for weight in weights.values():
        assert_obeys(weight == 0, pattern)


@pytest.mark.parametrize("pattern", [{}, {"pattern": "2:4"}], ids=str)
def test_method_dsnot_is_wanda_refined_by_dsnot_to_the_byte(prune, pattern):
    assert written(prune(method="dsnot", **pattern)[0]) == written(prune(method="wanda", refine="dsnot", **pattern)[0])


def test_method_best_is_its_spelled_out_options_to_the_byte(prune):
    assert written(prune(method="best")[0]) == written(prune(method="wanda", **BEST)[0])


def test_method_best_in_nm_is_its_spelled_out_options_to_the_byte(prune):
    spelled_out = {key: value for key, value in BEST.items() if key not in ("allocation", "group")}
    assert written(prune(method="best", pattern="2:4")[0]) == written(prune(method="wanda", pattern="2:4", **spelled_out)[0])


@pytest.mark.parametrize(
    "options",
    [{"refine": "dsnot"}, {"refine": "icbs"}, {"refine": "icbs", "reconstruct": "lstsq"}, {"method": "best"}],
    ids=str,
)
def test_micro_batches_do_not_change_a_byte(prune, options):
    assert written(prune(micro_batch=1, **options)[0]) == written(prune(micro_batch=4, **options)[0])


@pytest.mark.parametrize("refine", ["dsnot", "icbs"])
def test_refining_changes_the_mask(prune, refine):
    assert written(prune(refine=refine)[0]) != written(prune()[0])


def mean_error(written_record, key):
    return sum(facts[key] for facts in written_record["linears"].values()) / len(written_record["linears"])


def test_on_fresh_samples_least_squares_beat_the_sweep_which_beats_no_update(stories260k, tmp_path):
    # On the dense model's inputs all three have the same masks.
    options = {"refine": "icbs", "propagate": "dense", "calibration": "random", "samples": 16, "seqlen": 64, "device": "cpu"}
    fitted, swept, masked = (
        mean_error(llmprune.prune(str(stories260k), output=tmp_path / name, reconstruct=name, **options).record, "fresh_error")
        for name in ("lstsq", "sparsegpt", "none")
    )
    assert fitted < swept < masked


def test_icbs_leaves_no_linear_worse_on_fresh_samples_than_its_start(prune):
    _, _, written_record = prune(refine="icbs")
    for facts in written_record["linears"].values():
        assert facts["fresh_error"] <= facts["start_fresh_error"] * (1 + 1e-5)


def test_with_fewer_than_eight_samples_nothing_is_held_out_and_no_fresh_error_is_claimed(prune):
    _, _, written_record = prune(samples=7, refine="icbs", reconstruct="lstsq")
    for facts in written_record["linears"].values():
        assert "error" in facts
        assert not {"fresh_error", "start_fresh_error", "rows_refused"} & facts.keys()


# The dense model in the same place.


@dataclass
class Memory:
    """Stands in for the output directory."""

    tensors: dict = field(default_factory=dict)
    finished_blocks: int = 0

    def write_outer(self):
        pass

    def write_block(self, index, tensors, facts):
        self.tensors[index] = {name: tensor.clone() for name, tensor in tensors.items()}

    def read_block(self, index):
        return {name: tensor.clone() for name, tensor in self.tensors[index].items()}


@pytest.fixture(scope="module")
def ids_NT():
    return torch.randint(0, 61, (9, 20), generator=torch.Generator().manual_seed(1))


def inputs_of(model, ids_NT):
    """What linears read on the samples that are fitted, [T, I], and the residual stream where o and down write, [T, O]."""
    inputs, stream = {}, {}

    def see(into, name, module, args, kwargs):
        state = args[0] if args else kwargs["hidden_states"]
        into[name] = state.detach()[torch.arange(len(ids_NT)) % 8 != 7].double().flatten(0, 1)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(lambda *call, name=name: see(inputs, name, *call), with_kwargs=True)
    for index, layer in enumerate(model.model.layers):
        for place, name in ((layer, "self_attn.o_proj"), (layer.post_attention_layernorm, "mlp.down_proj")):
            name = f"model.layers.{index}.{name}"
            place.register_forward_pre_hook(lambda *call, name=name: see(stream, name, *call), with_kwargs=True)
    model(ids_NT)
    return inputs, stream


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_each_target_is_the_minimiser_found_by_running_both_models(model_dir, ids_NT, micro_batch):
    damping, targets = 0.1, {}
    stream = Stream(
        Skeleton(model_dir), ids_NT, output=Memory(), sequential="sublayer", match_dense=True, micro_batch=micro_batch
    )
    dense, pruned = (LlamaForCausalLM.from_pretrained(model_dir) for _ in range(2))
    for block in stream.blocks():
        for linear, statistic in block.observe(CrossHessian):
            weight = linear.weight_OI.clone()
            targets[linear.name] = dense_target(weight, statistic.missing_OI(weight), statistic.mean_II, damping)
            linear.keep(Unstructured(0.5).keep(weight.abs()))
            pruned.get_submodule(linear.name).weight.data.copy_(linear.weight_OI)
    dense_inputs, dense_stream = inputs_of(dense, ids_NT)
    pruned_inputs, pruned_stream = inputs_of(pruned, ids_NT)
    assert targets.keys() == pruned_inputs.keys()
    for name, found in targets.items():
        weight, inputs = dense.get_submodule(name).weight.detach().double(), pruned_inputs[name]
        wanted = dense_inputs[name] @ weight.T
        if name in dense_stream:
            wanted += dense_stream[name] - pruned_stream[name]
        # One least-squares problem: the outputs, and under them what keeps the target near the dense weight.
        share, stay = ((1 - damping) / len(inputs)) ** 0.5, inputs.square().mean(dim=0).mul(damping).sqrt()
        left = torch.cat([inputs * share, stay.diag()])
        expected = torch.linalg.lstsq(left, torch.cat([wanted * share, (weight * stay).T])).solution.T
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(weight.abs().max()), msg=name)
        if not name.startswith("model.layers.0.self_attn.q"):
            assert name.split(".")[-1] in ("k_proj", "v_proj") or not torch.allclose(found.double(), weight, rtol=0, atol=1e-3)


def test_what_the_stream_has_lost_counts_for_what_is_added_to_it_and_nothing_else(model_dir, ids_NT):
    stream = Stream(Skeleton(model_dir), ids_NT, output=Memory(), sequential="sublayer", match_dense=True)
    for block in stream.blocks():
        for linear, statistic in block.observe(CrossHessian):
            assert (statistic.gaps_OI is not None) == (linear.role in ("o", "down"))
            if linear.role in ("o", "down"):
                lost = statistic.gaps_OI.abs().max()
                assert (lost > 0) == ((linear.block, linear.role) != (0, "o"))
            linear.keep(NM(2, 4).keep(linear.weight_OI.abs()))


def test_while_nothing_is_removed_the_dense_model_is_matched_as_it_is(prune, dense):
    _, weights, _ = prune(method="best", sparsity=0)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, dense[f"{name}.weight"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("reconstruct", ["none", "lstsq"])
def test_icbs_towards_the_dense_model_removes_what_was_declared_and_says_how_near_it_came(prune, dense, reconstruct, pattern):
    options = {"refine": "icbs", "sequential": "sublayer", "reconstruct": reconstruct, **PATTERNS[pattern]}
    directory, weights, written_record = prune(match="dense", **options)
    assert written(directory) != written(prune(**options)[0])
    for name, weight in weights.items():
        assert_obeys(weight == 0, pattern)
        facts = written_record["linears"][name]
        assert {"error", "fresh_error", "start_fresh_error", "rows_refused"} <= facts.keys()
        if reconstruct == "none":
            assert torch.equal(weight, dense[f"{name}.weight"] * (weight != 0))
            assert facts["fresh_error"] <= facts["start_fresh_error"] * (1 + 1e-5)
    assert mean_error(written_record, "fresh_error") < mean_error(written_record, "start_fresh_error")


@pytest.mark.parametrize("reconstruct", ["none", "lstsq"])
def test_towards_the_dense_model_no_row_of_icbs_is_worse_on_fresh_samples(model_dir, ids_NT, reconstruct, monkeypatch):
    recipe = Recipe(
        model="tiny", sparsity=0.5, damping=0.1, refine="icbs", reconstruct=reconstruct, match="dense", sequential="sublayer"
    )
    refine, refused = refinement.refined, []

    def spy(linear, keep, score, inputs, pattern, recipe, target):
        better = refine(linear, keep, score, inputs, pattern, recipe, target)
        kept_value, fresh = (target if reconstruct == "lstsq" else linear.weight_OI).double(), inputs.fresh.mean_II.double()
        before, after = (target.double() - kept_value * each for each in (keep, better))
        before, after = ((each @ fresh * each).sum(dim=1) for each in (before, after))
        assert (after <= before * (1 + 1e-5)).all()
        refused.append(linear.facts["rows_refused"])
        return better

    monkeypatch.setattr(refinement, "refined", spy)
    stream = Stream(Skeleton(model_dir), ids_NT, output=Memory(), sequential="sublayer", match_dense=True)
    methods.load("wanda").prune(stream, recipe)
    assert len(refused) == 14
    assert sum(refused) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"match": "dense", "rounds": 3, "sequential": "sublayer"},
        {"match": "dense", "refine": "icbs", "sequential": "sublayer", "reconstruct": "none"},
        {"refine": "icbs", "sequential": "sublayer"},
        {"refine": "icbs"},
    ],
    ids=str,
)
def test_a_run_resumed_after_half_of_the_blocks_gives_the_same_bits(model_dir, ids_NT, options):
    recipe = Recipe(**{"model": "tiny", "sparsity": 0.5, "damping": 0.1, "reconstruct": "lstsq", **options})

    def run(memory):
        how = {"sequential": recipe.sequential, "match_dense": recipe.match == "dense"}
        methods.load("wanda").prune(Stream(Skeleton(model_dir), ids_NT, output=memory, **how), recipe)
        return memory.tensors

    whole = run(Memory())
    resumed = run(Memory({0: whole[0]}, finished_blocks=1))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, resumed[1][name]) for name, tensor in whole[1].items())


# What makes no sense.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rounds", "3"], ["--rounds 3", "--reconstruct lstsq"]),
        (["--rounds", "3", "--reconstruct", "sparsegpt"], ["--rounds 3", "is sparsegpt"]),
        (["--rounds", "-1", "--reconstruct", "lstsq"], ["rounds", "-1"]),
        (["--match", "dense", "--sequential", "sublayer"], ["--match dense", "--reconstruct lstsq or --refine icbs"]),
        (["--match", "dense", "--sequential", "sublayer", "--refine", "dsnot"], ["--match dense", "--refine icbs"]),
        (["--match", "dense", "--refine", "icbs"], ["--match dense", "--sequential sublayer"]),
        (["--match", "dense", "--reconstruct", "lstsq"], ["--match dense", "--sequential sublayer"]),
        (["--match", "dense", "--reconstruct", "lstsq", "--sequential", "sublayer", "--propagate", "dense"], ["--propagate"]),
        (["--refine", "icbs", "--sparsity", "0"], ["--sparsity 0", "no mask to refine"]),
        (["--method", "dsnot", "--sparsity", "0"], ["--sparsity 0", "no mask to refine"]),
        (["--refine", "wanda"], ["refine", "'wanda'", "icbs"]),
        (["--reconstruct", "obs"], ["reconstruct", "'obs'", "lstsq"]),
        (["--damping", "0", "--refine", "icbs"], ["damping", "greater than 0"]),
        (["--damping", "1", "--refine", "icbs"], ["damping", "less than 1"]),
        (["--dsnot", "cycles: 10"], ["--dsnot", "--refine dsnot"]),
        (["--dsnot", "cycles: 10", "--refine", "icbs"], ["--dsnot", "--refine dsnot"]),
        (["--dsnot", "cycles: 10", "--method", "icbs"], ["--dsnot", "--refine dsnot"]),
        (["--icbs", "steps: 3"], ["--icbs", "--method icbs"]),
        (["--icbs", "steps: 3", "--refine", "icbs"], ["--icbs", "--method icbs"]),
        (["--method", "dsnot", "--dsnot", "cycles"], ["--dsnot", "'cycles'", "name: value"]),
        (["--method", "dsnot", "--dsnot", "cycles: 10, accept"], ["--dsnot", "name: value"]),
        (["--method", "dsnot", "--dsnot", "{"], ["--dsnot", "name: value"]),
        (["--method", "dsnot", "--dsnot", "[1]: 2"], ["--dsnot", "name: value"]),
        (["--method", "dsnot", "--dsnot", "cycles: many"], ["dsnot.cycles", "many"]),
        (["--method", "dsnot", "--dsnot", "cycles: -1"], ["dsnot.cycles", "-1"]),
        (["--method", "dsnot", "--dsnot", "accept: never"], ["dsnot.accept", "never", "always"]),
        (["--method", "dsnot", "--dsnot", "skip: [mlp]"], ["dsnot.skip", "mlp", "gate"]),
        (["--method", "dsnot", "--dsnot", "threshold: 0.5"], ["threshold", "accept=always"]),
        (["--method", "dsnot", "--dsnot", "cycle: 10"], ["dsnot.cycle", "cycles"]),
        (["--method", "icbs", "--icbs", "steps"], ["--icbs", "'steps'", "name: value"]),
        (["--method", "icbs", "--icbs", "step: 3"], ["icbs.step", "steps"]),
        (["--method", "icbs", "--steps", "0"], ["steps", "0"]),
        (["--method", "icbs", "--steps", "many"], ["steps", "many"]),
        (["--steps", "0"], ["--steps 0", "wanda"]),
        (["--steps", "3", "--refine", "icbs"], ["--steps 3"]),
        (["--method", "icbs", "--reconstruct", "lstsq"], ["--reconstruct lstsq", "--method icbs"]),
        (["--preset", "paper"], ["--preset paper", "wanda"]),
        (["--preset", "paper", "--refine", "icbs"], ["--preset paper"]),
        (["--preset", "quick", "--method", "dsnot"], ["preset", "'quick'", "paper"]),
        (["--preset", "fast", "--method", "dsnot"], ["--preset fast", "dsnot"]),
        (["--pattern", "2:4", "--group", "layer", "--refine", "icbs"], ["--group layer", "2:4"]),
        (["--pattern", "2:4", "--allocation", "block-influence"], ["--allocation block-influence", "2:4"]),
        # What a method implies is not what the user has given.
        (["--method", "best", "--reconstruct", "none"], ["--method best", "--reconstruct none"]),
        (["--method", "best", "--sequential", "block"], ["--method best", "--sequential block"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_what_makes_no_sense_is_refused_in_one_sentence_and_writes_nothing(model_dir, tmp_path, flags, words):
    base = [f"--{key}={value}" for key, value in OPTIONS.items()]
    outcome = command("prune", "--model", model_dir, "--output", tmp_path / "out", *base, *flags)
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err
    assert list(tmp_path.iterdir()) == []
