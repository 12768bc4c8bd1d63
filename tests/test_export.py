"""Policies for the browser: what is written, and what is refused before anything is."""

import json
import zlib

import numpy as np
import pytest
import torch
from player_cases import policy

import adbook
from adbook.export import TOKEN, export
from adbook.mamba import MambaConfig
from adbook.rollout import RandomPolicy
from adbook.transformer import TransformerConfig

SMALL = MambaConfig(d_model=16, n_layers=2)


@pytest.fixture(scope="module")
def reacher():
    return adbook.family("reacher-goal")


@pytest.mark.parametrize(("bits", "kind"), [(16, "<f2"), (32, "<f4")])
def test_every_weight_is_there_in_the_order_that_the_header_tells(reacher, tmp_path, bits, kind):
    small = policy(SMALL)
    small.set_statistics(torch.randn(50, 8), torch.randn(50))
    folder = export(small, tmp_path / "a" / "b", reacher, bits=bits, about={"note": "é"})
    written = (folder / "weights.bin").read_bytes()
    header = json.loads((folder / "policy.json").read_text())
    assert header["weights"] == {"bits": bits, "bytes": len(written), "crc32": zlib.crc32(written)}
    values, at = np.frombuffer(written, kind), 0
    for (name, size), (expected, weight) in zip(header["tensors"], small.named_parameters(), strict=True):
        assert (name, size) == (expected, weight.numel())
        np.testing.assert_allclose(values[at : at + size], weight.detach().flatten(), rtol=2.0**-11, atol=2.0**-25)
        at += size
    assert at == len(values)
    assert header["normalisation"]["observation_mean"] == small.observation_mean.tolist()
    assert header["normalisation"]["reward_std"] == small.reward_std.item()
    assert header["shape"] == {"n_layers": 2, "d_model": 16, "d_inner": 32, "d_state": 16, "d_conv": 4}
    assert (header["family"], header["about"], tuple(header["token"])) == ("reacher-goal", {"note": "é"}, TOKEN)


def _with(weight):
    large = policy(SMALL)
    with torch.no_grad():
        large.head.weight[0, 0] = weight
    return large


@pytest.mark.parametrize(
    ("given", "options", "told"),
    [
        (lambda: policy(TransformerConfig(d_model=16, n_layers=1, n_heads=2)), {}, "backbone is transformer"),
        (lambda: policy(SMALL, return_to_go=True), {}, "return_to_go=False"),
        (lambda: RandomPolicy(2), {}, "a RandomPolicy cannot be exported"),
        (lambda: policy(SMALL), {"bits": 8}, "bits=8 must be 16 or 32"),
        (lambda: _with(1e5), {}, r"head.weight has a weight of 100000, .* use bits=32"),
        (lambda: _with(float("nan")), {"bits": 32}, "head.weight has a weight of nan, .*train it again"),
        (lambda: policy(SMALL, log_std_min=float("-inf")), {}, "bounds of log σ are not finite"),
        (lambda: policy(SMALL, action_scale=2.0), {}, r"action_scale 2\.0, reacher-goal has 1\.0"),
    ],
)
def test_what_a_page_cannot_run_is_refused_before_a_file_is_written(reacher, tmp_path, given, options, told):
    with pytest.raises(ValueError, match=told):
        export(given(), tmp_path / "policy", reacher, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("pusher-goal", "observation_size 8, pusher-goal has 20"),
        ("ant-dir", "cannot run ant-dir; it can run reacher-goal"),
    ],
)
def test_another_family_is_refused(tmp_path, family, told):
    with pytest.raises(ValueError, match=told):
        export(policy(SMALL), tmp_path, adbook.family(family))


def test_a_weight_too_large_for_16_bits_fits_32(reacher, tmp_path):
    folder = export(_with(1e5), tmp_path, reacher, bits=32)
    assert 1e5 in np.frombuffer((folder / "weights.bin").read_bytes(), "<f4")
