"""What the tests of causal_conv1d, selective_scan and ssd share; a problem is a dict of arguments."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def in_place(update):
    """An update as a function: (y, new state), the state given left as it was."""

    def function(**problem):
        state = problem.pop("state").clone()
        return update(state=state, **problem), state

    return function


def in_double(problem: dict) -> dict:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in problem.items()
    }


def assert_accurate(op, reference, problem: dict, ulps: int = 4) -> None:
    """The operator errs at most twice as much as the reference in the same dtype, both against float64, and
    some units of the last place of fp32."""
    assert_results_accurate(op(**problem), reference, problem, ulps)


def assert_results_accurate(results, reference, problem: dict, ulps: int = 4) -> None:
    results = results, reference(**problem), reference(**in_double(problem))
    for got, same, exact in zip(*results, strict=True):
        assert got.shape == same.shape and got.dtype == same.dtype
        if exact.numel():
            slack = ulps * torch.finfo(torch.float32).eps * exact.abs().max()
            assert (got - exact).abs().max() <= 2 * (same - exact).abs().max() + slack


def assert_close_in_norm(op, yardstick, exact, problem: dict) -> None:
    """The operator's relative error is at most twice the yardstick's, and one rounding to x's dtype."""
    for got, same, expected in zip(
        op(**problem), yardstick(**problem), exact(**in_double(problem)), strict=True
    ):
        assert got.shape == same.shape and got.dtype == same.dtype
        errors = [(v.double() - expected).norm() for v in (got, same)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(problem["x"].dtype).eps / 2 * expected.norm()


def assert_accurate_on_isa(on_isa, op, reference, problems: list[dict]) -> None:
    schema = op.default._schema
    calls = [
        (reference.__name__, [p.get(a.name, a.default_value) for a in schema.arguments]) for p in problems
    ]
    for results, problem in zip(on_isa(calls), problems, strict=True):
        assert_results_accurate(results, reference, problem)


def assert_equal(results, expected) -> None:
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def poisoned(problem: dict, names: tuple[str, ...], tokens: int) -> dict:
    """The same values as slices of one tensor [tokens..., sum], with NaN between them."""
    flat = {name: problem[name].flatten(tokens) for name in names}
    width = sum(v.shape[-1] + 3 for v in flat.values())
    first = flat[names[0]]
    projection = first.new_full((*first.shape[:-1], width), torch.nan)
    slices, at = {}, 2
    for name, value in flat.items():
        piece = projection[..., at : at + value.shape[-1]]
        piece.copy_(value)
        slices[name] = piece.unflatten(-1, problem[name].shape[tokens:])
        at += value.shape[-1] + 3
    return problem | slices


def packed(problem: dict, lengths: tuple[int, ...]) -> dict:
    """Puts the bounds of sequences of these lengths beside a batch of one."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return problem | {"cu_seqlens": bounds.to(problem["x"].device, torch.int32)}


def assert_same_for_any_thread_count(op, problem: dict) -> None:
    threads = torch.get_num_threads()
    try:
        expected = op(**problem)
        for count in (1, 2, 3, 5, 8):
            torch.set_num_threads(count)
            assert_equal(op(**problem), expected)
    finally:
        torch.set_num_threads(threads)


def assert_gradients_match(op, reference, problem: dict, outputs: tuple[int, ...] = (0, 1)) -> None:
    """Gradients of the chosen outputs by every float tensor, against autograd through the reference."""
    names = [k for k, v in problem.items() if isinstance(v, Tensor) and v.is_floating_point()]
    gradients = []
    for function in (op, reference):
        leaves = {k: problem[k].detach().clone().requires_grad_() for k in names}
        results = function(**(problem | leaves))
        loss = sum(results[i].float().square().sum() for i in outputs)
        gradients.append(torch.autograd.grad(loss, leaves.values(), allow_unused=True))
    for name, got, expected in zip(names, *gradients, strict=True):
        if expected is None:
            assert got is None, name
        else:
            torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


def assert_reference_gradients(reference, problem: dict) -> None:
    """gradcheck of the reference in float64."""
    problem = in_double(problem)
    names = [k for k, v in problem.items() if isinstance(v, Tensor) and v.is_floating_point()]
    leaves = [problem[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(
        lambda *v: reference(**(problem | dict(zip(names, v, strict=True)))), leaves
    )


def check_citizen(op, problem: dict, needs_grad: bool = False) -> None:
    """opcheck, with every float tensor requiring a gradient or none."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if needs_grad:
        checks[-1] = (
            "test_aot_dispatch_static"  # tracing the reference with symbolic sizes takes half a minute
        )
        problem = {
            k: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in problem.items()
        }
    torch.library.opcheck(op.default, (), problem, test_utils=checks)


def ulps(got: Tensor, exact: Tensor) -> float:
    """Largest distance in units of the last place of the exact value in float32."""
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-126))) - 23)
    return ((got.double() - exact).abs() / spacing).max().item()
