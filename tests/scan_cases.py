"""What the tests of the selective scan share: arguments, gradients, and a comparison."""

import torch

from adbook.scan import selective_scan

ROUNDING = 2.0**-24  # of float32: the relative error of one operation


def case(length, channels=9, n_state=5, batch=2, b="step", c="step", full=True, seed=0, initial=False):
    """Arguments of a scan in float64, rounded to float32 so that every dtype starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    forms = {"step": (batch, n_state, length), "group": (batch, 3, n_state, length), "constant": (channels, n_state)}
    arguments = {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length) - 1 if full else normal(batch, channels, length).abs() / 8,
        "A": -4 * torch.rand(channels, n_state, generator=generator).double(),
        "B": normal(*forms[b]),
        "C": normal(*forms[c]),
    }
    if full:
        arguments |= {"D": normal(channels), "z": normal(batch, channels, length), "delta_bias": normal(channels)}
    if initial:
        arguments["initial_state"] = normal(batch, channels, n_state)
    return arguments


def differentiate(arguments, backend, dtype=None, softplus=True, device="cpu"):
    """Output, last state and the gradient of every argument, for a fixed random weighting of both results.

    `backend` is a name, or a function that takes the arguments and returns output and last state.
    """
    arguments = {name: x.detach().to(device, dtype).requires_grad_() for name, x in arguments.items()}
    if callable(backend):
        out, last = backend(**arguments)
    else:
        out, last = selective_scan(**arguments, delta_softplus=softplus, return_last_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in (out, last))
    gradients = torch.autograd.grad(loss, list(arguments.values()))
    results = {"out": out.detach(), "last": last.detach(), **dict(zip(arguments, gradients, strict=True))}
    return {name: x.cpu() for name, x in results.items()}


def assert_close(got, expected, tolerance):
    """Compare relative to each result's largest entry: rounding errors of a sum scale with its largest terms."""
    for name, x in expected.items():
        error = (got[name].double() - x).abs().max() / x.abs().max().clamp(min=1e-30)
        assert error < tolerance, f"{name}: {error:.1e} > {tolerance:.1e}"


def longest_sum(arguments):
    """Terms of the longest sum in values or gradients: over batch and steps (A, D), or over channels (B, C)."""
    batch, channels, length = arguments["u"].shape
    return batch * length + channels + arguments["A"].shape[1]
