"""Addresses that cannot be used are refused within seconds."""

import pytest

from longtrain.cluster.session import connected
from longtrain.core.errors import Refused


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", ":6379", "http://head:8265"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(Refused, match="is not an address"), connected(address, 1, {"CPU": 1}):
        pass


def test_an_address_where_nothing_listens_is_refused():
    with pytest.raises(Refused, match="cannot be reached"), connected("127.0.0.1:9", 1, {"CPU": 1}):
        pass
