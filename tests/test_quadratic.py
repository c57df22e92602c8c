"""The solver of cardinality-constrained binary quadratics, against enumeration, recomputation and the formulas it rests on."""

import itertools
import math

import pytest
import torch

from llmprune import quadratic
from llmprune.errors import LLMPruneError
from llmprune.quadratic import energy, fisher, flip, solve

METHODS = ["auto", "descent", "anneal", "exhaustive"]
LARGE = ["descent", "anneal"]


def generic(size, seed, groups=1, dtype=torch.float64):
    """A symmetric indefinite problem: h, C, pruned, group."""
    generator = torch.Generator().manual_seed(seed)
    C = torch.randn(size, size, generator=generator, dtype=dtype)
    C = (C + C.T) / 2
    h = torch.randn(size, generator=generator, dtype=dtype)
    pruned = torch.rand(size, generator=generator) < 0.5
    return h, C.fill_diagonal_(0), pruned, torch.randint(groups, (size,), generator=generator)


def block(size, samples, seed, gamma=0.75, ridge=1e-3):
    """A block of weights with per-sample gradients: w, pruned, G, and its h and C."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(size, generator=generator, dtype=torch.float64)
    G = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    pruned = torch.rand(size, generator=generator) < 0.5
    return w, pruned, G, *flip(w, pruned, G.mean(0), fisher(G), gamma, ridge)


def balanced(pruned, z, group=None):
    group = torch.zeros(len(z), dtype=torch.int64) if group is None else group
    return all(
        int(z[member & pruned].sum()) == int(z[member & ~pruned].sum()) for member in (group == g for g in group.unique())
    )


def every_allowed(pruned, group=None):
    """Every z that keeps the number of pruned weights in every group."""
    subsets = (torch.tensor(bits, dtype=torch.bool) for bits in itertools.product([False, True], repeat=len(pruned)))
    return [z for z in subsets if balanced(pruned, z, group)]


def minimum(h, C, pruned, group=None):
    Z = torch.stack(every_allowed(pruned, group)).to(h)
    return (Z @ h + torch.einsum("mi,ij,mj->m", Z, C, Z) / 2).min().item()


def best_swap_change(h, C, pruned, group, z):
    """The least change of the energy by one swap, all pairs recomputed in float64."""
    h, C, zero = h.double(), C.double(), z.double()
    sign = 1 - 2 * zero
    cost = sign * (h + C @ zero)
    change = cost[:, None] + cost + sign[:, None] * sign * C
    now = pruned ^ z
    allowed = now[:, None] & ~now & (group[:, None] == group)
    return change[allowed].min().item()


@pytest.mark.parametrize("seed", range(20))
def test_tiny_problems_are_solved_exactly(seed):
    size = 8 + seed % 3
    _, sides, _, *fisher_rank_4 = block(size, 4, seed)
    for h, C, pruned, group in [generic(size, seed, groups=1 + seed % 3), (*fisher_rank_4, sides, None)]:
        least = minimum(h, C, pruned, group)
        for method in ("auto", "exhaustive", "anneal"):
            assert solve(h, C, pruned, group_N=group, method=method).energy == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_energy_is_recomputed_between_zero_and_the_minimum_and_counts_are_kept(method, seed):
    h, C, pruned, group = generic(9, 100 + seed, groups=2)
    solution = solve(h, C, pruned, group_N=group, method=method)
    z = solution.toggle_N.double()
    assert solution.energy == pytest.approx((h @ z + z @ C @ z / 2).item(), abs=1e-12)
    assert minimum(h, C, pruned, group) - 1e-12 <= solution.energy <= 0
    assert balanced(pruned, solution.toggle_N, group)


@pytest.mark.parametrize("method", LARGE)
@pytest.mark.parametrize("groups", [1, 7, 60])
def test_larger_problems_gain_and_keep_the_counts_of_every_group(method, groups):
    h, C, pruned, group = generic(90, 3, groups)
    solution = solve(h, C, pruned, group_N=group, method=method)
    assert solution.energy < 0
    assert solution.toggle_N.any()
    assert balanced(pruned, solution.toggle_N, group)


@pytest.mark.parametrize("gamma", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_fisher_block_never_predicts_more_than_half_gamma_squared(gamma, ridge):
    _, pruned, _, h, C = block(120, 4, 0, gamma, ridge)
    floor = -(gamma**2) / 2
    assert floor <= solve(h, C, pruned).energy < 0.8 * floor


@pytest.mark.parametrize("seed", range(5))
def test_annealing_is_never_worse_than_descent_and_better_on_frustrated_problems(seed):
    h, C, pruned, _ = generic(60, seed)
    assert solve(h, C, pruned, method="anneal").energy <= solve(h, C, pruned, method="descent").energy
    frustrated = [generic(60, 10 * seed + i)[:3] for i in range(3)]
    assert any(solve(*p, method="anneal").energy < solve(*p, method="descent").energy - 1e-6 for p in frustrated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shortlist", [1, 5, 128])
@pytest.mark.parametrize("groups", [1, 4, 30])
def test_no_swap_improves_on_descent(dtype, shortlist, groups, monkeypatch):
    monkeypatch.setattr(quadratic, "SHORTLIST", shortlist)
    h, C, pruned, group = generic(80, 5, groups, dtype)
    z = solve(h, C, pruned, group_N=group, method="descent").toggle_N
    assert best_swap_change(h, C, pruned, group, torch.zeros_like(z)) < 0
    assert best_swap_change(h, C, pruned, group, z) > -100 * torch.finfo(dtype).eps * 10


@pytest.mark.parametrize("groups", [1, 4])
def test_every_step_of_descent_lowers_the_energy_by_what_it_said(groups, monkeypatch):
    h, C, pruned, group = generic(80, 6, groups)
    energies, changes = [], []
    best_swap = quadratic._best_swap

    def recording(problem, sign, field, count):
        torch.testing.assert_close(field, h + C @ (sign < 0).double())
        energies.append(energy(h, C, sign < 0))
        change, pair = best_swap(problem, sign, field, count)
        changes.append(change)
        return change, pair

    monkeypatch.setattr(quadratic, "_best_swap", recording)
    solve(h, C, pruned, group_N=group, method="descent")
    applied = [
        (after - before, said) for before, after, said in zip(energies, energies[1:], changes, strict=False) if said < -1e-9
    ]
    assert len(applied) > 10
    assert all(math.isclose(change, said, abs_tol=1e-9) for change, said in applied)


def test_descent_finds_a_pair_that_is_not_on_the_shortlist():
    # 400 weights that cost 1 hide a pair that costs 2 and 2 and gains 5 by going together.
    h = torch.ones(402, dtype=torch.float64)
    C = torch.zeros(402, 402, dtype=torch.float64)
    pruned = torch.arange(402) % 2 == 0
    h[[300, 301]] = 2
    C[300, 301] = C[301, 300] = -5
    solution = solve(h, C, pruned, method="descent")
    assert solution.toggle_N.nonzero()[:, 0].tolist() == [300, 301]
    assert solution.energy == -1


def test_replicas_at_one_temperature_follow_the_boltzmann_distribution(monkeypatch):
    for name, value in {"REPLICAS": 20_000, "SMALL": 20, "HOT": 0.5, "WARM": 0.5, "COLD": 0.5}.items():
        monkeypatch.setattr(quadratic, name, value)
    h, C, pruned, group = generic(7, 1, groups=2)
    problem = quadratic._problem(h, C, pruned, group)
    final_RN = quadratic._anneal(problem, torch.zeros_like(pruned), 0)
    states = every_allowed(pruned, group)
    assert len(states) > 4
    heat = 0.5 * problem.scale_N.mean().item()
    expected = torch.tensor([-energy(h, C, z) / heat for z in states]).softmax(0)
    seen = torch.tensor([(final_RN == z).all(1).double().mean() for z in states])
    assert seen.sum() == pytest.approx(1)
    # Five standard errors of the largest share.
    assert (seen - expected).abs().max() < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize(("size", "method"), [(16, "exhaustive"), (17, "anneal")])
def test_auto_enumerates_up_to_sixteen_weights_and_anneals_above(size, method):
    h, C, pruned, _ = generic(size, 17)
    assert torch.equal(solve(h, C, pruned).toggle_N, solve(h, C, pruned, method=method).toggle_N)


@pytest.mark.parametrize("method", LARGE)
def test_one_seed_gives_one_solution(method):
    h, C, pruned, group = generic(50, 7, groups=3)
    first, second = (solve(h, C, pruned, group_N=group, method=method, seed=4) for _ in range(2))
    assert torch.equal(first.toggle_N, second.toggle_N)
    assert first.energy == second.energy


def test_seeds_differ():
    h, C, pruned, _ = generic(300, 7)
    problem = quadratic._problem(h, C, pruned, None)
    assert not torch.equal(quadratic._anneal(problem, pruned, 0), quadratic._anneal(problem, pruned, 1))


@pytest.mark.parametrize("method", ["descent", "exhaustive"])
def test_the_order_of_the_weights_does_not_matter(method):
    h, C, pruned, group = generic(12, 8, groups=2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    z = solve(h, C, pruned, group_N=group, method=method).toggle_N
    permuted = solve(h[order], C[order][:, order], pruned[order], group_N=group[order], method=method).toggle_N
    assert z.any()
    assert torch.equal(permuted, z[order])


@pytest.mark.parametrize("method", LARGE)
@pytest.mark.parametrize("scale", [2.0**-40, 3.0, 1e9])
def test_scaling_the_problem_does_not_change_the_solution(method, scale):
    h, C, pruned, _ = generic(40, 9)
    assert torch.equal(solve(scale * h, scale * C, pruned, method=method).toggle_N, solve(h, C, pruned, method=method).toggle_N)


def test_group_names_do_not_matter():
    h, C, pruned, group = generic(40, 10, groups=5)
    renamed = torch.tensor([7, -3, 1000, 0, 12])[group]
    assert torch.equal(solve(h, C, pruned, group_N=group).toggle_N, solve(h, C, pruned, group_N=renamed).toggle_N)


@pytest.mark.parametrize("method", LARGE)
def test_without_coupling_the_cheapest_of_both_sides_are_paired_while_it_gains(method):
    h, _, pruned, _ = generic(60, 11)
    pairs = [a + b for a, b in zip(h[pruned].sort().values.tolist(), h[~pruned].sort().values.tolist(), strict=False)]
    solution = solve(h, torch.zeros(60, 60, dtype=torch.float64), pruned, method=method)
    assert solution.energy == pytest.approx(sum(pair for pair in pairs if pair < 0), abs=1e-12)
    assert int(solution.toggle_N.sum()) == 2 * sum(pair < 0 for pair in pairs)


def test_equal_gains_go_to_the_lowest_index():
    h = torch.full((310,), -1.0)
    h[300:] = 0.5
    solution = solve(h, torch.zeros(310, 310), torch.arange(310) < 300, method="descent")
    assert solution.toggle_N.nonzero()[:, 0].tolist() == [*range(10), *range(300, 310)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pruned", [torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)])
def test_nothing_is_toggled_where_one_side_is_empty(method, pruned):
    h, C, _, _ = generic(8, 12)
    solution = solve(-h.abs(), C, pruned, method=method)
    assert not solution.toggle_N.any()
    assert solution.energy == 0


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_toggled_in_groups_of_one(method):
    h, C, pruned, _ = generic(8, 13)
    assert not solve(-h.abs(), C, pruned, group_N=torch.arange(8), method=method).toggle_N.any()


@pytest.mark.parametrize("method", METHODS)
def test_groups_that_cannot_swap_do_not_keep_others_from_it(method):
    h = torch.tensor([-9.0, -9.0, -9.0, -1.0, 0.5])
    pruned = torch.tensor([True, True, False, True, False])
    solution = solve(h, torch.zeros(5, 5), pruned, group_N=torch.tensor([0, 0, 1, 2, 2]), method=method)
    assert solution.toggle_N.tolist() == [False, False, False, True, True]
    assert solution.energy == -0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 16])
@pytest.mark.parametrize("h", [0.0, 1.0])
def test_nothing_is_toggled_where_nothing_gains(method, size, h):
    solution = solve(torch.full((size,), h), torch.zeros(size, size), torch.arange(size) % 2 == 0, method=method)
    assert not solution.toggle_N.any()
    assert solution.energy == 0


@pytest.mark.parametrize("method", METHODS)
def test_two_weights_that_cost_alone_and_cancel_together_are_swapped(method):
    h = torch.tensor([1.0, 1.0])
    solution = solve(h, torch.tensor([[0.0, -3.0], [-3.0, 0.0]]), torch.tensor([True, False]), method=method)
    assert solution.toggle_N.all()
    assert solution.energy == -1


def test_the_exhaustive_solver_refuses_more_than_it_can_enumerate():
    h, C, pruned, _ = generic(17, 14)
    with pytest.raises(LLMPruneError, match="at most 16 weights, not 17"):
        solve(h, C, pruned, method="exhaustive")


def test_the_quadratic_is_the_mean_of_the_samples_quadratics():
    w, pruned, G, h, C = block(12, 5, 15, gamma=0.6, ridge=0.02)
    torch.testing.assert_close(fisher(G), sum(torch.outer(g, g) for g in G) / 5)
    for seed in range(10):
        z = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.5
        delta = torch.where(z, torch.where(pruned, w, -w), 0)
        u = G @ delta
        assert energy(h, C, z) == pytest.approx((0.6 * u + u**2 / 2).mean().item() + 0.02 * delta.square().sum().item())


def test_toggles_and_new_masks_are_two_forms_of_one_quadratic():
    # In x = pruned after the step, with dw = w_now - w: x'Q x + constant (the published form).
    gamma, ridge = 0.75, 1e-2
    w, pruned, G, h, C = block(12, 5, 16, gamma, ridge)
    g, H = G.mean(0), fisher(G)
    dw = torch.where(pruned, -w, 0)
    Q = torch.outer(w, w) * H / 2 + torch.diag(w * (H @ dw) - gamma * g * w + ridge * w * (2 * dw + w))
    constant = dw @ H @ dw / 2 - gamma * g @ dw + ridge * dw @ dw
    for seed in range(10):
        z = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.5
        x = (pruned ^ z).double()
        assert energy(h, C, z) == pytest.approx((x @ Q @ x + constant).item(), abs=1e-12)
    now = pruned.double()
    assert (now @ Q @ now + constant).item() == pytest.approx(0, abs=1e-12)
