import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.codecs.elements import codes, snap, values
from quant.elements import ELEMENTS, element
from quant.storage import SchemeError

PEERS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
every_float = pytest.mark.parametrize("name", PEERS)


def numbers(name):
    """Every value of the type, every midpoint and its neighbors, and a sweep over all magnitudes."""
    top = ELEMENTS[name].highest
    grid = values(torch.arange(1 << ELEMENTS[name].bits, dtype=torch.uint8), ELEMENTS[name])
    grid = grid[torch.isfinite(grid)].unique()
    middle = (grid[1:] + grid[:-1]) / 2
    sweep = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 5, 20000)
    around = [torch.nextafter(middle, torch.tensor(sign * torch.inf)) for sign in (1, -1)]
    return torch.cat((grid, middle, *around, sweep)).clamp(-top, top)


@every_float
def test_all_codes_stand_for_the_values_of_ml_dtypes(name):
    every = np.arange(1 << ELEMENTS[name].bits, dtype=np.uint8)
    ours = values(torch.from_numpy(every), ELEMENTS[name]).numpy()
    theirs = every.view(PEERS[name]).astype(np.float32)
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert np.array_equal(np.signbit(ours), np.signbit(theirs))


@every_float
def test_rounding_is_that_of_ml_dtypes_bit_for_bit(name):
    sent = numbers(name)
    theirs = sent.numpy().astype(PEERS[name]).view(np.uint8)
    assert np.array_equal(codes(sent, ELEMENTS[name]).numpy(), theirs)


@pytest.mark.parametrize("name", ELEMENTS)
def test_snap_is_encoding_and_decoding(name):
    sent = numbers(name)
    assert torch.equal(snap(sent, ELEMENTS[name]), values(codes(sent, ELEMENTS[name]), ELEMENTS[name]))
    assert torch.equal(snap(snap(sent, ELEMENTS[name]), ELEMENTS[name]), snap(sent, ELEMENTS[name]))


@pytest.mark.parametrize("name", ELEMENTS)
def test_numbers_beyond_the_range_saturate(name):
    top = ELEMENTS[name].highest
    beyond = torch.tensor([top * 1.1, -top * 3, 1e38])
    assert snap(beyond, ELEMENTS[name]).tolist() == [top, -top, top]
    assert values(codes(beyond, ELEMENTS[name]), ELEMENTS[name]).tolist() == [top, -top, top]


@given(st.floats(-1.5, 1.5, width=32))
def test_nf4_takes_the_nearest_level(number):
    levels = np.array(ELEMENTS["nf4"].levels)
    code = codes(torch.tensor([number]), ELEMENTS["nf4"]).item()
    assert abs(levels[code] - number) <= np.abs(levels - number).min() + 1e-7


def test_unknown_elements_are_refused():
    with pytest.raises(SchemeError, match="Element type must be one of e4m3, e5m2, e2m1, nf4. Got 'e3m3'"):
        element("e3m3")
