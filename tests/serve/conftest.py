"""A server whose engine is played by the test; a file may have an `address` of its own."""

import pytest
from serving import make_played, run_server, wait_until


@pytest.fixture(scope="module")
def address():
    with run_server(make_played()) as address:
        yield address


@pytest.fixture
def engine(address):
    engine = address.service.engine
    yield engine
    wait_until(lambda: address.service._texts == 0)
    engine.handles.clear()
    engine.cancelled.clear()
