"""`moe` over Experts in plain torch: its values, Transformers' own paths beside it, opcheck, gradients, refusals."""

import pytest
import torch
from routed_cases import check_error, exact, make
from torch.nn import functional as F
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from pyprune import BackendError, InputError
from pyprune.base import reference
from pyprune.base.experts import Experts, ragged
from pyprune.ffn.moe_operator import MOE, arguments, moe

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def formula(x, experts, index, weights):
    """Written out, neuron by neuron."""
    act, d = reference.ACTIVATIONS[experts.activation], x.shape[1]
    out = torch.zeros_like(x)
    for t, k in torch.cartesian_prod(torch.arange(len(x)), torch.arange(index.shape[1])).view(-1, 2).tolist():
        for row in experts.rows[index[t, k]]:
            *inputs, down = row.split(d)
            first, *up = (x[t] @ part for part in inputs)
            out[t] += weights[t, k] * (act(first) * up[0] if up else act(first)) * down
    return out


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "picked", "d", "f"),
    [(5, 6, 2, 8, 12), (1, 1, 1, 1, 1), (0, 4, 2, 8, 3), (3, 4, 0, 8, 3), (7, 3, 3, 13, 5), (4, 2, 1, 5, 0)],
)
def test_equals_the_formula(gated, tokens, experts, picked, d, f):
    types = (torch.float64, torch.float64)
    for activation in ("silu", "relu2"):
        case = make(tokens, experts, picked, d, f, types, gated, activation)
        torch.testing.assert_close(case.of(moe), case.of(formula), rtol=1e-11, atol=1e-11)


class Own(torch.nn.Module):
    """What Transformers' paths ask of a module of experts, over the rows of a case."""

    has_gate, has_bias, has_post_expert_norm, is_transposed, _is_expert_parallel = True, False, False, False, False

    def __init__(self, experts):
        super().__init__()
        d = experts.hidden_size
        self.num_experts = len(experts.rows)
        self.gate_up_proj = experts.rows[..., : 2 * d].unflatten(2, (2, d)).transpose(1, 2).flatten(1, 2).contiguous()
        self.down_proj = experts.rows[..., 2 * d :].transpose(1, 2).contiguous()

    def _apply_gate(self, both):
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up


@pytest.mark.parametrize("path", [grouped_mm_experts_forward, batched_mm_experts_forward])
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_at_most_twice_that_of_transformers_paths(path, dtype):
    case = make(33, 8, 3, 64, 160, (dtype, dtype))
    check_error(case, moe, lambda x, experts, index, weights: path(Own(experts), x, index, weights))
    assert case.of(moe).dtype == dtype


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.int8), (torch.float32, torch.int8), FLOATS[:2]], ids=str)
def test_rows_of_another_dtype(types):
    case = make(9, 5, 2, 64, 40, types)
    want, got = exact(case), case.of(moe)
    assert got.dtype == types[0]
    assert (got.double() - want).norm() < (2e-2 if types[0] == torch.bfloat16 else 1e-5) * want.norm()


def without(experts):
    """The same experts with down rows of zeros in the place of an index."""
    rows = experts.rows.clone()
    for own, index, count in zip(rows, experts.index, experts.counts, strict=True):
        dropped = torch.ones(len(own), dtype=torch.bool)
        dropped[index[:count].long()] = False
        own[dropped, -experts.hidden_size :] = 0
    return Experts(rows, experts.gated, experts.activation, experts.scales)


@pytest.mark.parametrize("gated", [True, False])
def test_a_gather_runs_the_neurons_of_its_index_and_no_others(gated):
    case = make(9, 6, 3, 13, 21, (torch.float64, torch.float64), gated, gather=True)
    assert case.experts.counts.unique().numel() > 3 and case.experts.most == 21
    torch.testing.assert_close(case.of(moe), case.change(experts=without(case.experts)).of(formula))
    mean = case.experts.counts.double().mean()
    assert case.experts.nbytes == round(float(mean) * (case.experts.parts * 13 * 8 + 4))


def test_experts_that_nobody_names_do_not_run():
    case = make(5, 6, 2, 8, 12, among=3)
    case.experts.rows[:3] = float("nan")
    assert case.of(moe).isfinite().all()
    twice = case.change(index=case.index[:, :1].expand(-1, 2))  # one expert twice counts twice
    once = twice.change(index=twice.index[:, :1], weights=twice.weights.sum(1, keepdim=True))
    torch.testing.assert_close(twice.of(moe), once.of(moe))


@pytest.mark.parametrize("number", [-1, 6, 2**40])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_expert_that_there_is_not_is_refused(number, backend):
    case = make(5, 6, 2)
    case.index[3, 1] = number
    low, high = int(case.index.min()), int(case.index.max())
    with pytest.raises(InputError, match=rf"index must name experts in \[0, 6\); got \({low}, {high}\)"):
        moe(case.x, case.experts, case.index, case.weights, backend=backend)


REFUSED = {
    "x of one dimension": (lambda c: c.change(x=c.x[0]), r"x must have two dimensions; got \(67,\)"),
    "x too narrow": (lambda c: c.change(x=c.x[:, :60]), r"x must have shape \[\.\.\., 67\]; got \(5, 60\)"),
    "x of float64": (lambda c: c.change(x=c.x.double()), "dtype of x must be torch.float32, .*; got torch.float64"),
    "index of floats": (lambda c: c.change(index=c.index.float()), "index must be int64 or int32; got torch.float32"),
    "index flat": (lambda c: c.change(index=c.index.flatten()), r"index must have shape \[5, K\]; got \(10,\)"),
    "index too short": (lambda c: c.change(index=c.index[:4]), r"index must have shape \[5, K\]; got \(4, 2\)"),
    "weights too narrow": (
        lambda c: c.change(weights=c.weights[:, :1]),
        r"weights must have shape \(5, 2\), as index has; got \(5, 1\)",
    ),
    "weights of integers": (lambda c: c.change(weights=c.index), "weights must be floating point; got torch.int64"),
    "weights elsewhere": (
        lambda c: c.change(weights=c.weights.to("meta")),
        "weights must be on the device of x, cpu; got 'meta'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_operands_are_refused(name):
    change, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        change(make()).of(moe)


def test_bad_experts_and_backends_are_refused():
    rows, scales = torch.zeros(3, 4, 24), torch.ones(3, 4, 3)
    index, counts = ragged([torch.tensor(one) for one in ([], [1], [0, 3])])
    for given, message in (
        ((rows[0], True, "silu"), r"rows must have three dimensions; got \(4, 24\)"),
        ((rows[:0], True, "silu"), r"rows must hold one expert at least; got \(0, 4, 24\)"),
        ((rows[..., :23], True, "silu"), r"rows must have shape \(4, 21\); got \(4, 23\)"),
        ((rows, True, "swish"), "activation must be one of gelu, .*; got 'swish'"),
        ((rows.char(), True, "silu"), "scales must be given with int8 rows; got None"),
        ((rows.char(), True, "silu", scales[:2]), r"scales must have shape \(3, 4, 3\); got \(2, 4, 3\)"),
        ((rows, True, "silu", scales), r"scales must be None with rows of torch\.float32"),
        ((rows, True, "silu", None, index), "counts must be given with index; got None"),
        ((rows, True, "silu", None, None, counts), "counts must be None without index"),
        ((rows, True, "silu", None, index[:2], counts), r"index must have shape \[3, K\]; got \(2, 2\)"),
        ((rows, True, "silu", None, index.long(), counts), "index must have dtype torch.int32; got torch.int64"),
        ((rows, True, "silu", None, index, counts[:2]), r"counts must have shape \(3,\); got \(2,\)"),
        ((rows, True, "silu", None, index, counts + 1), r"counts must lie in \[0, 2\]; got \(1, 3\)"),
        ((rows, True, "silu", None, index + 1, counts), r"index must lie in \[0, 4\); got \(1, 4\)"),
    ):
        with pytest.raises(InputError, match=message):
            Experts(*given)
    case = make()
    with pytest.raises(InputError, match="backend must be one of torch, cpu, triton, cuda; got 'cublas'"):
        moe(case.x, case.experts, case.index, case.weights, backend="cublas")
    with pytest.raises(BackendError, match="cuda: needs tensors on a CUDA device, not on cpu"):
        moe(case.x, case.experts, case.index, case.weights, backend="cuda")
    case = make(types=(torch.float64, torch.float64))
    with pytest.raises(BackendError, match=r"cpu: no kernel for torch\.float64"):
        moe(case.x, case.experts, case.index, case.weights, backend="cpu")


@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.int8)], ids=str)
@pytest.mark.parametrize(("tokens", "picked"), [(5, 2), (0, 2), (3, 1)])
def test_opcheck(types, tokens, picked):
    case = make(tokens, 4, picked, 8, 6, types, gather=tokens == 5)
    torch.library.opcheck(MOE, case.of(arguments, "torch", picked == 1))
    for tensor in (case.x, case.experts.rows, case.weights):
        tensor.requires_grad_(tensor.is_floating_point() and tokens > 0)
    torch.library.opcheck(MOE, case.of(arguments, "torch"))


@pytest.mark.parametrize("gather", [False, True])
def test_gradcheck(gather):
    case = make(3, 3, 2, 3, 4, (torch.float64, torch.float64), activation="gelu_tanh", gather=gather)

    def of(x, rows, weights):
        kept = case.experts.index, case.experts.counts
        return moe(x, Experts.unchecked(rows, True, "gelu_tanh", None, *kept), case.index, weights)

    wanted = [t.requires_grad_() for t in (case.x, case.experts.rows, case.weights)]
    assert torch.autograd.gradcheck(of, wanted)
    for one in wanted:
        of(*(t if t is one else t.detach() for t in wanted)).sum().backward()
        assert one.grad is not None
    none = make(0, 3, 2, 3, 4, (torch.float64, torch.float64))
    none.of(lambda x, *rest: moe(x.requires_grad_(), *rest)).sum().backward()
    assert none.x.grad is not None and none.x.grad.shape == (0, 3)


def test_batch_invariant_rows_do_not_see_each_other():
    case = make(9, 4, 2, 64, 96, (torch.bfloat16, torch.bfloat16))
    whole = moe(case.x, case.experts, case.index, case.weights, batch_invariant=True)
    torch.testing.assert_close(whole, case.of(moe), rtol=2e-2, atol=2e-2)
    for t in range(9):
        alone = moe(case.x[t : t + 1], case.experts, case.index[t : t + 1], case.weights[t : t + 1])
        assert torch.equal(alone[0], whole[t])
