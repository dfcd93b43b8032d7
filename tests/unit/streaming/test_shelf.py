"""What waits for the backward pass keeps nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from longtrain.comm.group import Group
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.attend import all_gather
from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.lift import Away, Coming, Lift
from longtrain.sequence_parallel.prefix import Prefixes
from longtrain.sequence_parallel.rows import DeviceRows, DeviceSums, HostRows, HostSums
from longtrain.sequence_parallel.shard import Rows, Shard
from longtrain.streaming.shelf import DeviceShelf, HostShelf
from longtrain_kernels.block_attention import BlockAttention
from tests.harness.mixers import MIXERS
from tests.harness.streaming import LOCAL, StreamCase, problem_of, stream_gradients


@pytest.mark.parametrize("offload", ["none", "host"])
@pytest.mark.parametrize("name", sorted(MIXERS))
def test_what_crosses_chunks_keeps_no_chunk(
    name: str, offload: Literal["none", "host"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it while it leaves for the host."""
    waiting: list[Tensor] = []
    put, down = DeviceShelf.put, Lift.down

    def watch(shelf: DeviceShelf, chunk: int, tensors: Sequence[Tensor]) -> None:
        put(shelf, chunk, tensors)
        waiting.extend(shelf.look(chunk))

    def watch_down(lift: Lift, x: Tensor, place: Away | None = None) -> Away:
        waiting.append(x)
        return down(lift, x, place)

    monkeypatch.setattr(DeviceShelf, "put", watch)
    if name != "softmax":  # whose keys and values have stores of their own
        monkeypatch.setattr(Lift, "down", watch_down)
    case = StreamCase((name,), "all", chunk_tokens=13, offload=offload)
    stream_gradients(case, problem_of(case), Group(0, 1), LOCAL, torch.device("cpu"))
    assert waiting
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in waiting)


def test_gradients_take_the_place_of_inputs_at_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[int] = []
    down = Lift.down

    def watch(lift: Lift, x: Tensor, place: Away | None = None) -> Away:
        found = down(lift, x, place)
        places.append(found.tensor.data_ptr())
        return found

    monkeypatch.setattr(Lift, "down", watch)
    shelf = HostShelf(Lift(torch.device("cpu")))
    for chunk in range(3):
        shelf.put(chunk, [torch.full((2,), chunk)])
    for chunk in (2, 1, 0):
        [found] = shelf.take(chunk)
        shelf.put(chunk, [-found])
    assert places[3:] == places[2::-1]
    assert [shelf.take(chunk)[0].tolist() for chunk in (2, 1, 0)] == [[-2, -2], [-1, -1], [0, 0]]


@pytest.mark.parametrize("frozen", [(), ("embedding", "blocks.0"), ("embedding", "blocks.0", "blocks.1", "blocks.2")])
@pytest.mark.parametrize("attend", [local.attend, all_gather.attend])
@pytest.mark.parametrize("block_layers", [1, 3, "recurrent", "all"])
def test_keys_and_values_are_on_their_way_before_they_are_wanted_and_no_others(
    block_layers: int | Literal["recurrent", "all"],
    attend: Callable[[AttendCall, Shard], Tensor],
    frozen: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last chunk is shorter than the others. `all_gather` saves what it has gathered, and reads nothing again."""
    hits: list[bool] = []
    fetched: list[int] = []
    sums: list[bool] = []
    get, fetch, add = HostRows._get, HostRows._fetch, HostSums.add

    def watch(store: HostRows, rows: Rows, own: bool) -> Tensor:
        hits.append((rows.chunk, own) in store._soon)
        return get(store, rows, own)

    def watch_fetch(store: HostRows, rows: Rows, own: bool) -> Coming:
        fetched.append(rows.chunk)
        return fetch(store, rows, own)

    def watch_add(store: HostSums, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        sums.append((store._soon is not None) == (store._away is not None))
        return add(store, x, rows, dtype)

    monkeypatch.setattr(HostRows, "_get", watch)
    monkeypatch.setattr(HostRows, "_fetch", watch_fetch)
    monkeypatch.setattr(HostSums, "add", watch_add)
    case = StreamCase(
        ("softmax", "simple_gla", "softmax", "softmax"), block_layers, 5, 28, frozen=frozen, offload="host"
    )
    algorithms = replace(LOCAL, attend=attend)
    stream_gradients(case, problem_of(case), Group(0, 1), algorithms, torch.device("cpu"))
    assert hits
    assert all(hits)
    assert len(fetched) == len(hits)
    assert sums
    assert all(sums)


@pytest.mark.parametrize("block_layers", [1, 3, "recurrent", "all"])
def test_what_comes_is_asked_for_before_attention_is_queued(
    block_layers: int | Literal["recurrent", "all"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some attention is queued between asking and use, but for the keys and values with which a block begins."""
    attended, filling = 0, False
    asked: dict[object, int | None] = {}
    beside: list[bool] = []
    fetch, get, prefetch_sums, add = HostRows._fetch, HostRows._get, HostSums.prefetch, HostSums.add
    filled, forward, gradients = Prefixes.all_filled, BlockAttention.forward, BlockAttention.gradients

    def counted(compute: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            nonlocal attended
            attended += 1
            return compute(*arguments)

        return count

    def use(what: object) -> None:
        begun = asked.pop(what)
        if begun is not None:
            beside.append(attended > begun)

    def watch_fetch(store: HostRows, rows: Rows, own: bool) -> Coming:
        asked[store, rows.chunk, own] = None if filling else attended
        return fetch(store, rows, own)

    def watch_get(store: HostRows, rows: Rows, own: bool) -> Tensor:
        found = get(store, rows, own)
        use((store, rows.chunk, own))
        return found

    def watch_prefetch(store: HostSums, rows: Rows) -> None:
        if store._away is not None:
            asked.setdefault(store, attended)
        prefetch_sums(store, rows)

    def watch_add(store: HostSums, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        if store._away is not None:
            use(store)
        return add(store, x, rows, dtype)

    def watch_filled(prefixes: Prefixes) -> None:
        nonlocal filling
        filling = True
        filled(prefixes)
        filling = False

    monkeypatch.setattr(HostRows, "_fetch", watch_fetch)
    monkeypatch.setattr(HostRows, "_get", watch_get)
    monkeypatch.setattr(HostSums, "prefetch", watch_prefetch)
    monkeypatch.setattr(HostSums, "add", watch_add)
    monkeypatch.setattr(Prefixes, "all_filled", watch_filled)
    monkeypatch.setattr(BlockAttention, "forward", counted(forward))
    monkeypatch.setattr(BlockAttention, "gradients", counted(gradients))
    case = StreamCase(("softmax", "simple_gla", "softmax", "softmax"), block_layers, 5, 28, offload="host")
    stream_gradients(case, problem_of(case), Group(0, 1), LOCAL, torch.device("cpu"))
    assert len(beside) > 20
    assert all(beside)


def test_what_was_fetched_in_vain_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[tuple[int, ...]] = []
    wait = Coming.wait

    def watch(coming: Coming) -> Tensor:
        found = wait(coming)
        waited.append(tuple(found.shape))
        return found

    monkeypatch.setattr(Coming, "wait", watch)
    store = HostRows(Lift(torch.device("cpu")))
    x = torch.arange(5.0).view(1, 5, 1)
    first, second, third = (Rows(2, 5, chunk, (0, 0, 0)) for chunk in range(3))
    store.write(first, x[:, :2])
    store.prefetch(third, own=False)
    store.write(second, x[:, 2:4])
    assert torch.equal(store.read(second), x[:, :4])
    assert waited == [(1, 5, 1), (1, 4, 1)]


@pytest.mark.parametrize("stores", [(DeviceRows, DeviceSums), (HostRows, HostSums)], ids=["device", "host"])
def test_chunks_read_and_add_to_what_they_see_alone(stores: tuple[Any, Any]) -> None:
    """Of 2 sequences: the second and third see from the first on, the fourth from the third, the last itself."""
    args = [Lift(torch.device("cpu"))] if stores[0] is HostRows else []
    store, sums = (make(*args) for make in stores)
    x = torch.arange(2 * 9.0).view(2, 9, 1)
    chunks = [Rows(2, 9, chunk, (0, 0, 0, 2, 4)) for chunk in range(5)]
    for rows in chunks:
        store.prefetch(rows, own=False)
        assert torch.equal(store.join(rows, x[:, rows.begin : rows.end]), x[:, rows.first : rows.end])
    for rows in chunks:
        assert torch.equal(store.read(rows), x[:, rows.first : rows.end])
    found = []
    for rows in reversed(chunks):
        sums.prefetch(rows)
        found.append(sums.add(x[:, rows.first : rows.end], rows, torch.float64).clone())
    times = torch.tensor([sum(rows.first <= at < rows.end for rows in chunks) for at in range(9)])
    assert torch.equal(torch.cat(found[::-1], dim=1), (x * times[:, None]).double())


def test_frozen_layers_that_nobody_differentiates_have_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is before the first that is trained, the fourth is not."""
    pattern = ("simple_gla", "softmax", "gla", "softmax")
    case = StreamCase(pattern, "all", frozen=("embedding", "blocks.0", "blocks.1", "blocks.3"), offload="host")
    exact = problem_of(case)
    graphs: list[list[bool]] = [[] for _ in pattern]

    def watch(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: graphs[layer].append(output.requires_grad)

    hooks = [layer.register_forward_hook(watch(number)) for number, layer in enumerate(exact.model.layers)]
    stream_gradients(case, exact, Group(0, 1), LOCAL, torch.device("cpu"))
    for hook in hooks:
        hook.remove()
    assert [any(found) for found in graphs] == [False, False, True, True]
